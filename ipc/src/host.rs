//! What the host offers, read from its file system by the broker on behalf of processes that have none.
//!
//! The functions take the root of sysfs so that tests can show them a host of their own making.
//! They only read; they must never load a module or change a setting.

use std::path::Path;

/// Whether KVM on this host needs completing by `bulkhead-vcpu` (`vcpu-proc/src/quirks/`).
///
/// True on hosts whose KVM runs on the `kvm_pvm` module, which shows itself as a directory below
/// `sys/module` even when it is built in. The answer is part of the birth configuration of
/// `bulkhead-vcpu`, which sees no file system.
#[must_use]
pub fn host_needs_quirks(sys: &Path) -> bool {
    sys.join("module/kvm_pvm").is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(name: &str, modules: &[&str]) -> std::path::PathBuf {
        let root =
            std::env::temp_dir().join(format!("bulkhead-host-{name}-{}", std::process::id()));
        for module in modules {
            std::fs::create_dir_all(root.join("module").join(module))
                .expect("a temporary directory");
        }
        root
    }

    #[test]
    fn pvm_module_means_quirks() {
        let root = sysfs("pvm", &["kvm", "kvm_pvm"]);
        assert!(host_needs_quirks(&root));
        std::fs::remove_dir_all(root).expect("own directory");
    }

    #[test]
    fn complete_kvm_means_no_quirks() {
        let root = sysfs("vmx", &["kvm", "kvm_intel"]);
        assert!(!host_needs_quirks(&root));
        std::fs::remove_dir_all(root).expect("own directory");
    }

    #[test]
    fn missing_sysfs_means_no_quirks() {
        assert!(!host_needs_quirks(Path::new("/nonexistent")));
    }
}
