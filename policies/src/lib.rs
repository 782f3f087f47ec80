//! The only place that grants a process anything.
//!
//! One TOML file per kind of process says which descriptors it is born with, which system calls it
//! may make while it starts and after it has locked itself (each with a reason), which io_uring
//! operations, what surrounds it and which limits it has. The built-in files are part of the
//! program; an operator's directory can take away from them and, only when told so, add to them.
//!
//! [`schema`] is the notation, [`check`] the rules, [`plan`] the meaning, [`mod@compile`] the filters.

pub mod cache;
pub mod check;
pub mod compile;
pub mod constants;
pub mod decode;
pub mod denied;
pub mod evaluate;
pub mod explain;
pub mod grant;
pub mod overrides;
pub mod plan;
pub mod schema;
pub mod syscalls;

pub use check::PolicyError;
pub use compile::{Filters, compile};
pub use plan::Policy;

use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::FdRole;
use std::path::Path;

/// The built-in policy file of `kind`.
#[must_use]
pub const fn built_in(kind: ProcKind) -> &'static str {
    match kind {
        ProcKind::Vcpu => include_str!("../vcpu.toml"),
        ProcKind::Legacy => include_str!("../legacy.toml"),
        ProcKind::Console => include_str!("../console.toml"),
        ProcKind::Blk => include_str!("../blk.toml"),
        ProcKind::Rng => include_str!("../rng.toml"),
        ProcKind::Vsock => include_str!("../vsock.toml"),
        ProcKind::Fs => include_str!("../fs.toml"),
        ProcKind::Net => include_str!("../net.toml"),
        ProcKind::Image => include_str!("../image.toml"),
        ProcKind::Switch => include_str!("../switch.toml"),
    }
}

/// Reads the policy of `kind`, with the override in `directory` if there is one.
///
/// # Errors
/// The first fault of either file, or an override that grants more without `allow_looser`.
pub fn load(
    kind: ProcKind,
    directory: Option<&Path>,
    allow_looser: bool,
) -> Result<Policy, PolicyError> {
    let file = format!("built-in {}.toml", kind.name());
    let policy = check::policy(&file, built_in(kind), kind)?;
    match overrides::read(kind, directory)? {
        Some((file, text)) => overrides::apply(policy, &file, &text, allow_looser),
        None => Ok(policy),
    }
}

/// The name of a role as policies write it.
#[must_use]
pub fn role_name(role: FdRole) -> String {
    serde_json::to_value(role)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_policies_keep_the_rules_and_compile() {
        for kind in ProcKind::ALL {
            let policy = load(kind, None, false).unwrap();
            let filters = compile(&policy).unwrap();
            assert_eq!(filters.locked.len(), policy.locked.len());
            assert!(filters.startup.bpf.len() <= 4096 * 8);
        }
    }

    #[test]
    fn only_vcpu_is_granted_kvm_and_only_blk_and_image_a_disk() {
        for kind in ProcKind::ALL {
            let policy = load(kind, None, false).unwrap();
            assert_eq!(policy.fd(FdRole::Kvm).is_some(), kind == ProcKind::Vcpu);
            let has_disk = matches!(kind, ProcKind::Blk | ProcKind::Image);
            assert_eq!(policy.fd(FdRole::Disk).is_some(), has_disk);
            assert_eq!(policy.fd(FdRole::Entropy).is_some(), kind == ProcKind::Rng);
            let listens = kind == ProcKind::Vsock;
            assert_eq!(policy.fd(FdRole::Listener).is_some(), listens);
            assert_eq!(policy.fd(FdRole::Folder).is_some(), kind == ProcKind::Fs);
            for role in [FdRole::Tap, FdRole::Port] {
                assert_eq!(policy.fd(role).is_some(), kind == ProcKind::Net);
            }
        }
    }

    #[test]
    fn roles_are_named_as_in_policies() {
        assert_eq!(role_name(FdRole::LegacyInterrupt), "legacy-interrupt");
    }
}
