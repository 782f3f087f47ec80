use super::*;
use proptest::prelude::*;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path as HostPath;
use std::sync::OnceLock;

/// An ext4 file system of 4 MiB that holds what is in a directory.
#[expect(
    clippy::disallowed_methods,
    reason = "file systems to be read are made by the tool that makes them everywhere"
)]
fn ext4(of: &HostPath, options: &[&str]) -> Vec<u8> {
    let home = tempfile::tempdir().unwrap();
    let image = home.path().join("d.img");
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let made = std::process::Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(of)
        .args(options)
        .arg(&image)
        .arg("8M")
        .env("PATH", path)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    fs::read(image).unwrap()
}

const KERNEL: &[u8] = b"the kernel of version 10";
const INITRD: &[u8] = b"its initial RAM disk";

/// A Debian-like tree.
fn tree() -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    let boot = tree.path().join("boot");
    fs::create_dir(&boot).unwrap();
    fs::write(boot.join("vmlinuz-6.1.0-9"), "old").unwrap();
    fs::write(boot.join("vmlinuz-6.1.0-10"), KERNEL).unwrap();
    fs::write(boot.join("vmlinuz-6.1.0-11.dpkg-new"), "half").unwrap();
    fs::write(boot.join("initrd.img-6.1.0-10"), INITRD).unwrap();
    tree
}

fn wish(kernel: &str, initrd: &str) -> Wish {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Wish {
        kernel: some(kernel),
        initrd: some(initrd),
    }
}

/// What is taken out of a disk: where it was, and the contents.
fn taken(disk: &[u8], wish: &Wish) -> Result<(BootReport, Vec<u8>, Vec<u8>), String> {
    let (kernel, initrd) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let disk: Rc<dyn Reader> = Rc::new(disk.to_vec());
    let report = take_out(disk, wish, &kernel, &initrd, |_, _| {}).map_err(|e| e.to_string())?;
    let read = |mut file: &File| {
        let mut bytes = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    };
    let (kernel, initrd) = (read(&kernel), read(&initrd));
    Ok((report, kernel, initrd))
}

#[test]
fn newest_kernel_is_found_with_its_ram_disk() {
    let tree = tree();
    let (report, kernel, initrd) = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap();
    assert_eq!((kernel, initrd), (KERNEL.to_vec(), INITRD.to_vec()));
    assert_eq!(report.kernel.path, "/boot/vmlinuz-6.1.0-10");
    assert_eq!(report.volume, "the whole disk");
    assert_eq!(report.initrd.unwrap().bytes, INITRD.len() as u64);
}

#[test]
fn links_are_followed_inside_of_the_file_system() {
    let tree = tree();
    symlink("boot/vmlinuz-6.1.0-9", tree.path().join("vmlinuz")).unwrap();
    let disk = ext4(tree.path(), &[]);
    let (report, kernel, initrd) = taken(&disk, &Wish::default()).unwrap();
    assert_eq!(
        (kernel.as_slice(), initrd.as_slice()),
        (&b"old"[..], &b""[..])
    );
    assert_eq!(
        (report.kernel.path.as_str(), report.initrd),
        ("/boot/vmlinuz-6.1.0-9", None)
    );

    // A link that is absolute, or goes up too far, starts at the root of the guest.
    fs::remove_file(tree.path().join("vmlinuz")).unwrap();
    symlink("/../../boot/vmlinuz-6.1.0-10", tree.path().join("vmlinuz")).unwrap();
    let (_, kernel, _) = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap();
    assert_eq!(kernel, KERNEL);
}

#[test]
fn link_that_leads_nowhere_is_no_kernel() {
    let tree = tree();
    symlink("boot/gone", tree.path().join("vmlinuz")).unwrap();
    let (_, kernel, _) = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap();
    assert_eq!(kernel, KERNEL);
}

#[test]
fn named_files_are_taken_and_missing_ones_are_named() {
    let tree = tree();
    let disk = ext4(tree.path(), &[]);
    let named = wish("/boot/vmlinuz-6.1.0-9", "/boot/initrd.img-6.1.0-10");
    let (_, kernel, initrd) = taken(&disk, &named).unwrap();
    assert_eq!(
        (kernel.as_slice(), initrd.as_slice()),
        (&b"old"[..], INITRD)
    );
    let error = taken(&disk, &wish("/boot/other", "")).unwrap_err();
    assert!(error.contains("expected the kernel /boot/other"), "{error}");
    let error = taken(&disk, &wish("", "/boot/other")).unwrap_err();
    assert_eq!(error, "the whole disk: /boot/other: there is no such file");
    let error = taken(&disk, &wish("/boot", "")).unwrap_err();
    assert_eq!(error, "the whole disk: /boot: expected a regular file");
}

#[test]
fn links_that_lead_in_a_circle_are_an_error() {
    let tree = tree();
    symlink("boot/vmlinuz", tree.path().join("vmlinuz")).unwrap();
    symlink("../vmlinuz", tree.path().join("boot/vmlinuz")).unwrap();
    let error = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap_err();
    assert!(
        error.contains("/vmlinuz: too many symbolic links"),
        "{error}"
    );
}

#[test]
fn file_that_is_too_large_or_empty_is_refused_unread() {
    let tree = tree();
    let path = tree.path().join("vmlinuz");
    let file = File::create(&path).unwrap();
    let error = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap_err();
    assert!(error.contains("/vmlinuz: has 0 bytes"), "{error}");
    file.set_len(KERNEL_BYTES_MAX + 1).unwrap();
    let error = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap_err();
    let expected = "/vmlinuz: has 268435457 bytes, expected a kernel of 1 byte to 256 MiB";
    assert!(error.contains(expected), "{error}");
    // What has holes is read with zeroes in their place.
    file.set_len(100_000).unwrap();
    let (_, kernel, _) = taken(&ext4(tree.path(), &[]), &Wish::default()).unwrap();
    assert_eq!(kernel, [0; 100_000]);
}

#[test]
fn every_layout_of_the_file_system_is_read() {
    let tree = tree();
    let large: Vec<u8> = (0..1_500_000u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    fs::write(tree.path().join("vmlinuz"), &large).unwrap();
    let layouts: [&[&str]; 5] = [
        &["-b", "1024"],
        &["-b", "4096", "-O", "64bit,metadata_csum"],
        &["-O", "^64bit,^metadata_csum"],
        &["-O", "^has_journal"],
        &["-O", "^extent,^64bit"],
    ];
    for options in layouts {
        let taken = taken(&ext4(tree.path(), options), &Wish::default());
        let (_, kernel, _) = taken.unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert!(kernel == large, "{options:?}");
    }
    let other = ext4(tree.path(), &["-O", "inline_data"]);
    let error = taken(&other, &Wish::default()).unwrap_err();
    assert!(
        error.contains("expected what mkfs.ext4 makes by default"),
        "{error}"
    );
}

#[test]
fn boot_partition_has_its_kernels_in_its_root() {
    let tree = tree();
    let part = ext4(&tree.path().join("boot"), &[]);
    let mut disk = vec![0; 2 << 20];
    disk.extend(&part);
    // A partition that is something else, and the one with the kernel.
    for (at, first, sectors) in [(446, 2048u32, 2048u32), (462, 4096, 16384)] {
        disk[at + 4] = 0x83;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let (report, kernel, initrd) = taken(&disk, &Wish::default()).unwrap();
    assert_eq!((kernel, initrd), (KERNEL.to_vec(), INITRD.to_vec()));
    assert_eq!(report.volume, "partition 2");
    assert_eq!(report.kernel.path, "/vmlinuz-6.1.0-10");

    let error = taken(&disk, &wish("/none", "")).unwrap_err();
    assert_eq!(
        error,
        "expected the kernel /none in an ext4 file system, found partition 1: no ext4 file system; \
         partition 2: an ext4 file system without it"
    );
}

#[test]
fn disk_without_a_file_system_says_what_was_expected() {
    for disk in [vec![], vec![0; 512], vec![7; 1 << 20]] {
        let error = taken(&disk, &Wish::default()).unwrap_err();
        assert_eq!(
            error,
            "expected a kernel (/vmlinuz, /boot/vmlinuz or /boot/vmlinuz-VERSION) in an ext4 file system, \
             found the whole disk: no ext4 file system"
        );
    }
}

#[test]
fn numbers_that_would_take_all_memory_are_refused() {
    let tree = tree();
    let sound = ext4(tree.path(), &[]);
    let spoilt = |at: usize, value: u32| {
        let mut disk = sound.clone();
        disk[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
        taken(&disk, &Wish::default()).unwrap_err()
    };
    let error = spoilt(24, 21);
    assert!(error.contains("block size is 2^21 KiB"), "{error}");
    let error = spoilt(4, u32::MAX);
    assert!(error.contains("expected no more than fit"), "{error}");
    let error = spoilt(336, u32::MAX);
    assert!(error.contains("expected no more than fit"), "{error}");
}

/// A file system that mutations start from.
fn sound() -> &'static [u8] {
    static SOUND: OnceLock<Vec<u8>> = OnceLock::new();
    SOUND.get_or_init(|| {
        let tree = tree();
        symlink("boot/vmlinuz-6.1.0-10", tree.path().join("vmlinuz")).unwrap();
        // Without checksums, which would refuse nearly every change.
        ext4(
            tree.path(),
            &["-b", "1024", "-N", "64", "-O", "^metadata_csum,^uninit_bg"],
        )
    })
}

/// Bytes of the image that are not zero: where changes matter.
fn used() -> &'static [usize] {
    static USED: OnceLock<Vec<usize>> = OnceLock::new();
    USED.get_or_init(|| {
        let bytes = sound().iter().enumerate();
        bytes
            .filter(|(_, byte)| **byte != 0)
            .map(|(at, _)| at)
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a guest makes of its file system, the reader ends, with an error or with files of permitted sizes.
    #[test]
    fn damaged_file_systems_end_in_an_error_or_a_file(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..8usize, any::<u8>()), 1..12),
    ) {
        let mut disk = sound().to_vec();
        for (index, behind, value) in changes {
            let at = used()[index.index(used().len())] + behind;
            if let Some(byte) = disk.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok((report, kernel, _)) = taken(&disk, &Wish::default()) {
            prop_assert!(report.kernel.bytes <= KERNEL_BYTES_MAX);
            prop_assert_eq!(report.kernel.bytes, kernel.len() as u64);
        }
    }
}
