//! A machine boots the kernel that is on its own disk: found in the disk's file system by a process that can do
//! nothing else, whatever the image's format and whatever the guest has made of the file system.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, Ended, Machine, is_alive, kill, signal_process, tool};
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const DISK: &str = "32M";
/// Where the second partition begins, in sectors.
const PART_SECTOR: u64 = 4096;

/// What will be on a disk, and the disk.
struct Home(TempDir);

impl Home {
    /// With the test guest as the newest of two kernels, behind a link as Debian has it.
    fn new() -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        let boot = home.path("tree/boot");
        fs::create_dir_all(&boot).unwrap();
        let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
        fs::copy(guest, boot.join("vmlinuz-6.1.0-10-test")).unwrap();
        fs::write(boot.join("vmlinuz-6.1.0-9-test"), "no kernel at all").unwrap();
        symlink("boot/vmlinuz-6.1.0-10-test", home.path("tree/vmlinuz")).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// An ext4 file system of what is in the tree.
    fn ext4(&self, name: &str) -> String {
        let image = self.text(name);
        let tree = self.text("tree");
        let options = ["-q", "-F", "-t", "ext4", "-b", "4096", "-d"];
        tool("mke2fs", &[&options[..], &[&tree, &image, DISK]].concat());
        image
    }

    /// The same in the second partition of a disk with a GPT.
    fn partitioned(&self, name: &str) -> String {
        let (part, image) = (self.ext4("part.img"), self.path(name));
        let disk = fs::File::create_new(&image).unwrap();
        disk.set_len(40 << 20).unwrap();
        fs::write(
            self.path("layout"),
            format!("label: gpt\nstart=2048,size=2048,type=21686148-6449-6E6F-744E-656564454649\nstart={PART_SECTOR},size=65536\n"),
        )
        .unwrap();
        let script = format!("sfdisk -q {} <{}", image.display(), self.text("layout"));
        tool("sh", &["-c", &script]);
        disk.write_all_at(&fs::read(part).unwrap(), PART_SECTOR * 512)
            .unwrap();
        image.to_str().unwrap().to_owned()
    }
}

fn run(disk: &str, more: &[&str]) -> Machine {
    let mut all = vec!["--disk", disk, "-m", "64MiB", "--timeout=120s"];
    all.extend(["--cmdline", "mode=hello root=/dev/vda"]);
    if !more.iter().any(|word| word.starts_with("--boot-from-disk")) {
        all.push("--boot-from-disk");
    }
    all.extend(more);
    Machine::run(all)
}

fn boots(disk: &str, more: &[&str]) {
    let ended = run(disk, more).wait();
    assert_eq!(ended.code, 0, "{disk} {more:?}: {ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}

/// Expects an error of one line, and nothing left behind.
fn fails(disk: &str, more: &[&str], code: i32, wanted: &str) -> Ended {
    let (ended, scratch) = run(disk, more).wait_and_keep();
    assert_eq!(ended.code, code, "{disk} {more:?}: {ended:?}");
    let errors = ended.errors.trim_end();
    assert!(errors.contains(wanted), "no `{wanted}` in {errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    let left = fs::read_dir(scratch.path().join("run"))
        .into_iter()
        .flatten();
    let left: Vec<_> = left.flatten().map(|entry| entry.file_name()).collect();
    let work = left
        .iter()
        .filter(|name| name.to_string_lossy().starts_with("work-"));
    assert_eq!(work.count(), 0, "{left:?}");
    ended
}

#[test]
fn kernel_on_a_disk_of_any_format_is_booted() {
    let home = Home::new();
    let raw = home.ext4("raw.img");
    boots(&raw, &[]);
    boots(&raw, &["--boot-from-disk=disk0"]);
    boots(&raw, &["--ephemeral"]);
    boots(
        &format!("{raw},readonly,name=system"),
        &["--boot-from-disk=system"],
    );

    let overlay = home.text("top.qcow2");
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &overlay,
        ],
    );
    boots(&format!("{overlay},format=qcow2,backing={raw}:raw"), &[]);

    let packed = home.text("packed.qcow2");
    tool(
        "qemu-img",
        &["convert", "-q", "-c", "-O", "qcow2", &raw, &packed],
    );
    boots(&format!("{packed},format=qcow2"), &[]);

    let vmdk = home.text("d.vmdk");
    let flat = "subformat=monolithicFlat";
    tool(
        "qemu-img",
        &["convert", "-q", "-O", "vmdk", "-o", flat, &raw, &vmdk],
    );
    let extent = home.text("d-flat.vmdk");
    boots(&format!("{vmdk},format=vmdk,extent={extent}"), &[]);
}

#[test]
fn kernel_in_a_partition_is_booted() {
    let home = Home::new();
    let disk = home.partitioned("parts.img");
    boots(&disk, &[]);
    // The second table, at the disk's end, is as good as the first.
    let file = fs::File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&[0; 512], 512).unwrap();
    boots(&disk, &[]);
}

#[test]
fn kernel_is_named_or_the_newest() {
    let home = Home::new();
    fs::remove_file(home.path("tree/vmlinuz")).unwrap();
    let disk = home.ext4("d.img");
    boots(&disk, &[]);
    boots(&disk, &["--kernel", "boot/vmlinuz-6.1.0-10-test"]);
    boots(&disk, &["--kernel", "/boot/../boot/vmlinuz-6.1.0-10-test"]);
    // A file that is none is refused by the process that would start it, like one of the host.
    let ended = run(&disk, &["--kernel", "/boot/vmlinuz-6.1.0-9-test"]).wait();
    assert_eq!(ended.code, 6, "{ended:?}");
    assert!(ended.errors.contains("kernel"), "{ended:?}");
}

#[test]
fn what_is_lacking_is_told_in_one_line() {
    let home = Home::new();
    let expected = "booting from disk disk0: expected a kernel (/vmlinuz, /boot/vmlinuz or \
                    /boot/vmlinuz-VERSION) in an ext4 file system";
    let empty = home.text("empty.img");
    fs::write(&empty, [0; 1 << 20]).unwrap();
    fails(
        &empty,
        &[],
        2,
        &format!("{expected}, found the whole disk: no ext4 file system"),
    );

    let disk = home.ext4("d.img");
    let other = ["--kernel", "/boot/other"];
    fails(
        &disk,
        &other,
        2,
        "expected the kernel /boot/other in an ext4 file system",
    );
    let initrd = ["--initrd", "/boot/other"];
    fails(&disk, &initrd, 2, "/boot/other: there is no such file");
    fails(
        &disk,
        &["--boot-from-disk=data"],
        2,
        "expected one of the machine's disks: disk0",
    );

    fs::remove_file(home.path("tree/vmlinuz")).unwrap();
    symlink("boot/vmlinuz", home.path("tree/vmlinuz")).unwrap();
    symlink("../vmlinuz", home.path("tree/boot/vmlinuz")).unwrap();
    let circle = home.ext4("circle.img");
    fails(&circle, &[], 2, "/vmlinuz: too many symbolic links");

    for name in ["vmlinuz", "boot/vmlinuz"] {
        fs::remove_file(home.path("tree").join(name)).unwrap();
    }
    let large = fs::File::create(home.path("tree/boot/vmlinuz-7")).unwrap();
    large.set_len((256 << 20) + 1).unwrap();
    let large = home.ext4("large.img");
    fails(&large, &[], 2, "expected a kernel of 1 byte to 256 MiB");
}

#[test]
fn damaged_file_system_is_an_error_and_no_more() {
    let home = Home::new();
    let disk = home.ext4("d.img");
    let sound = fs::read(&disk).unwrap();
    let file = fs::File::options().write(true).open(&disk).unwrap();
    // Superblock, group descriptors, inodes and directories: each a block of its own.
    let damage: [(u64, usize); 4] = [(1024 + 24, 4), (4096, 64), (1024 + 4, 400), (0, 1 << 20)];
    for (at, bytes) in damage {
        file.write_all_at(&vec![0xa5; bytes], at).unwrap();
        let ended = fails(&disk, &[], 2, "booting from disk disk0: ");
        assert_eq!(ended.errors.trim_end().lines().count(), 1, "{ended:?}");
        file.write_all_at(&sound, 0).unwrap();
    }
    boots(&disk, &[]);
}

/// The pid of the process that reads the disk, as soon as there is one.
fn reader(machine: &Machine) -> u32 {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(pid) = machine.processes().of("image") {
            return pid;
        }
        assert!(Instant::now() < until, "{}", machine.errors());
        std::thread::yield_now();
    }
}

/// A disk whose kernel takes a while to read.
fn slow_disk(home: &Home) -> String {
    let long = fs::File::create(home.path("tree/boot/long")).unwrap();
    long.set_len(255 << 20).unwrap();
    home.ext4("d.img")
}

#[test]
fn reader_that_dies_is_a_start_that_failed() {
    let home = Home::new();
    let disk = slow_disk(&home);
    let machine = run(&disk, &["--kernel", "/boot/long"]);
    let pid = reader(&machine);
    kill(pid);
    let ended = machine.wait();
    assert_eq!(ended.code, 6, "{ended:?}");
    let wanted = "the process that reads the kernel from disk disk0 could not be started";
    assert!(ended.errors.contains(wanted), "{ended:?}");
    assert!(!is_alive(pid));
    // Nothing of it holds the disk.
    boots(&disk, &[]);
}

#[test]
fn reader_that_says_nothing_is_not_waited_for_for_ever() {
    if !bulkhead_tests::slow() {
        return;
    }
    let home = Home::new();
    let disk = slow_disk(&home);
    let machine = run(&disk, &["--kernel", "/boot/long"]);
    let pid = reader(&machine);
    signal_process(pid, Signal::SIGSTOP);
    let ended = machine.wait();
    assert_eq!(ended.code, 6, "{ended:?}");
    assert!(ended.errors.contains("was not done after 60s"), "{ended:?}");
    assert!(!is_alive(pid));
}

#[test]
fn daemon_looks_for_the_kernel_at_each_start() {
    let home = Home::new();
    let disk = home.ext4("d.img");
    let file = home.text("web.toml");
    let text = "[boot]\nfrom_disk = \"system\"\ncmdline = \"mode=idle\"\n[machine]\nmemory = \"64MiB\"\n\
                [[disk]]\nname = \"system\"\npath = \"d.img\"\n";
    fs::write(&file, text).unwrap();
    let change = |command: &str| tool("debugfs", &["-w", "-R", command, &disk]);

    let daemon = Daemon::start();
    daemon.good(&["create", &file]);
    daemon.good(&["start", "web"]);
    daemon.until_output("web", "BH idle ");
    let shown = daemon.inspect("web");
    let vm_file = shown["vm_file"].as_str().unwrap();
    assert!(vm_file.contains("from_disk = \"system\""), "{vm_file}");
    // Nobody else has the disk, and nobody boots from it.
    fails(&disk, &[], 2, "is in use");

    daemon.good(&["reset", "web"]);
    daemon.until_state("web", "running");
    daemon.good(&["kill", "web"]);

    // Another kernel is put in place, as an update does: one that is none.
    change("unlink /vmlinuz");
    change("symlink /vmlinuz boot/none");
    change("unlink /boot/vmlinuz-6.1.0-10-test");
    change("unlink /boot/vmlinuz-6.1.0-9-test");
    let started = daemon.run(&["start", "web"]);
    assert_ne!(started.code, 0, "{started:?}");
    assert!(
        started.errors.contains("expected a kernel (/vmlinuz"),
        "{started:?}"
    );

    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    change(&format!("write {} /boot/vmlinuz-7", guest.display()));
    daemon.good(&["start", "web"]);
    daemon.until_state("web", "running");
    daemon.until_output("web", "BH idle ");
    daemon.good(&["kill", "web"]);
}

/// A guest with a file system of its own installs another kernel, and boots it the next time.
#[test]
fn guest_that_changes_its_kernel_boots_the_new_one() {
    let home = Home::new();
    let linux = bulkhead_tests::path("BULKHEAD_TEST_LINUX_BZIMAGE");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD");
    fs::copy(linux, home.path("tree/boot/vmlinuz-5-small")).unwrap();
    fs::copy(initrd, home.path("tree/boot/initrd.img-5-small")).unwrap();
    fs::remove_file(home.path("tree/vmlinuz")).unwrap();
    symlink("boot/vmlinuz-5-small", home.path("tree/vmlinuz")).unwrap();
    let image = home.text("d.img");
    let tree = home.text("tree");
    tool(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-d", &tree, &image, "96M"],
    );

    let cmdline = format!(
        "{} mode=hello bh.mount=/dev/vda \
         bh.run=\"ln -sf boot/vmlinuz-6.1.0-10-test /mnt/vmlinuz && umount /mnt && reboot -f\"",
        bulkhead_tests::linux_cmdline()
    );
    let mut machine = Machine::run([
        "--disk",
        &image,
        "--boot-from-disk",
        "--cmdline",
        &cmdline,
        "-m",
        "96MiB",
        "--timeout=900s",
    ]);
    // Its initial RAM disk came from the disk, too.
    machine.expect_within("bh: mounted /dev/vda", Duration::from_secs(600));
    machine.expect_within("BH hello ", Duration::from_secs(120));
    machine.signal(Signal::SIGINT);
    let _ended = machine.wait();
    tool("e2fsck", &["-f", "-n", &image]);
}
