//! Seeds, as mtools and the checker of the kernel's own file system read them, where they are installed.

use super::*;
use crate::vm::spec::KernelSource;
use std::process::{Command, Output};

fn place() -> (tempfile::TempDir, CloudInitSpec) {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        Some(path)
    };
    // Several clusters, an end in the middle of one.
    let user_data = [b"#cloud-config\n".as_slice(), &[b'#'; 20_000]].concat();
    let spec = CloudInitSpec {
        user_data: file("user", &user_data),
        network_config: file("net", b"version: 2\n"),
        hostname: Some("web".to_owned()),
        ssh_keys: vec!["ssh-ed25519 AAAA \"quoted\" me".to_owned()],
        meta_data: None,
    };
    (dir, spec)
}

#[expect(clippy::disallowed_methods, reason = "tools that read what is written")]
fn tool(program: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new(program).args(arguments).output();
    // Not every machine that runs unit tests has them; the end-to-end test has a kernel.
    output.ok()
}

#[test]
fn mtools_read_label_names_and_contents() {
    let (dir, spec) = place();
    let path = dir.path().join("seed.img");
    write(&path, &image(&spec, "vm").unwrap(), false).unwrap();
    let image = path.to_str().unwrap();
    let Some(label) = tool("mlabel", &["-s", "-i", image, "::"]) else {
        return;
    };
    let label = String::from_utf8_lossy(&label.stdout).into_owned();
    assert!(label.contains("CIDATA"), "{label}");
    let user_data = tool("mtype", &["-i", image, "::user-data"]).unwrap();
    let wanted = fs::read(spec.user_data.as_ref().unwrap()).unwrap();
    assert!(user_data.stdout == wanted, "{:?}", user_data.stderr);
    let network = tool("mtype", &["-i", image, "::network-config"]).unwrap();
    assert_eq!(network.stdout, b"version: 2\n");
    let meta_data = tool("mtype", &["-i", image, "::meta-data"]).unwrap();
    let meta_data = String::from_utf8(meta_data.stdout).unwrap();
    assert_eq!(
        meta_data,
        "instance-id: \"bulkhead-vm\"\nlocal-hostname: \"web\"\npublic-keys:\n  \
         - \"ssh-ed25519 AAAA \\\"quoted\\\" me\"\n"
    );
}

#[test]
fn checker_of_fat_finds_nothing() {
    let (dir, spec) = place();
    let path = dir.path().join("seed.img");
    write(&path, &image(&spec, "vm").unwrap(), false).unwrap();
    if let Some(checked) = tool("fsck.fat", &["-n", "-v", path.to_str().unwrap()]) {
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(checked.status.success(), "{said}");
        assert!(said.contains("12 bit entries"), "{said}");
    }
}

#[test]
fn same_files_make_the_same_disk_and_whole_sectors() {
    let (_dir, spec) = place();
    let one = image(&spec, "vm").unwrap();
    assert_eq!(one, image(&spec, "vm").unwrap());
    assert_eq!(one.len() % 512, 0);
    assert_ne!(one, image(&spec, "other").unwrap());
}

#[test]
fn machine_gets_its_seed_as_its_last_disk_once() {
    let (dir, cloud_init) = place();
    let mut options = RunOptions::for_test(dir.path());
    options.state = dir.path().join("state");
    let mut spec = VmSpec::new("vm", KernelSource::File("k".into()));
    assert_eq!(*with_disk(&spec, &options).unwrap(), spec);
    spec.cloud_init = Some(cloud_init);
    let with = with_disk(&spec, &options).unwrap().into_owned();
    assert_eq!(with.disks.len(), 1);
    assert!(with.disks[0].read_only);
    assert_eq!(with.disks[0].path, options.state.join(IMAGE));
    // As a record has it.
    let again = with_disk(&with, &options).unwrap().into_owned();
    assert_eq!(again, with);
}

#[test]
fn folders_and_files_are_told_apart() {
    let (dir, spec) = place();
    let user = spec.user_data.unwrap();
    assert_eq!(of_path(&user).unwrap().user_data, Some(user));
    assert!(of_path(dir.path()).unwrap_err().contains("expected"));
    fs::write(dir.path().join("meta-data"), b"{}").unwrap();
    let found = of_path(dir.path()).unwrap();
    assert_eq!(found.meta_data, Some(dir.path().join("meta-data")));
    assert_eq!(found.user_data, None);
}

#[test]
fn large_files_and_missing_ones_are_named() {
    let (dir, mut spec) = place();
    let large = dir.path().join("large");
    File::create(&large)
        .unwrap()
        .set_len(FILE_BYTES_MAX + 1)
        .unwrap();
    spec.user_data = Some(large);
    assert!(matches!(image(&spec, "vm"), Err(SeedError::Large(_))));
    spec.user_data = Some(dir.path().join("none"));
    let error = image(&spec, "vm").unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");
    let path = dir.path().join("seed");
    write(&path, b"one", false).unwrap();
    assert!(matches!(
        write(&path, b"two", false),
        Err(SeedError::Write { .. })
    ));
    assert_eq!(fs::read(&path).unwrap(), b"one");
}
