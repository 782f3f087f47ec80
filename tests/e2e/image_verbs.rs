//! `bulkhead image`: images are made, converted, resized, checked and put on top of each other, and other tools
//! read them the same.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{bulkhead, tool};
use std::fs;
use std::path::Path;
use std::process::Output;
use tempfile::TempDir;

const BYTES: usize = 8 << 20;

struct Home {
    place: TempDir,
    scratch: TempDir,
}

impl Home {
    fn new() -> Self {
        Self {
            place: tempfile::tempdir().unwrap(),
            scratch: tempfile::tempdir().unwrap(),
        }
    }

    fn run(&self, arguments: &str) -> Output {
        let mut command = bulkhead(self.scratch.path());
        command.current_dir(self.place.path());
        command.arg("image").args(arguments.split_whitespace());
        command.output().unwrap()
    }

    fn good(&self, arguments: &str) -> String {
        let done = self.run(arguments);
        assert!(done.status.success(), "{arguments}: {done:?}");
        assert!(
            self.leftovers().is_empty(),
            "{arguments}: {:?}",
            self.leftovers()
        );
        String::from_utf8(done.stdout).unwrap()
    }

    fn bad(&self, arguments: &str, wanted: &str) {
        let done = self.run(arguments);
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success(), "{arguments}: {done:?}");
        assert!(error.contains(wanted), "{arguments}: {error}");
        assert!(
            !error.contains("panicked") && error.lines().count() == 1,
            "{error}"
        );
        assert!(
            self.leftovers().is_empty(),
            "{arguments}: {:?}",
            self.leftovers()
        );
    }

    fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.place.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains("partial")).collect()
    }

    fn path(&self, name: &str) -> String {
        self.place.path().join(name).to_str().unwrap().to_owned()
    }

    fn qemu_img(&self, arguments: &str) -> String {
        let place = self.place.path().display();
        let arguments: Vec<_> = arguments
            .split_whitespace()
            .map(|word| word.replace("@", &format!("{place}/")))
            .collect();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        tool("qemu-img", &arguments)
    }

    /// What another program finds in an image.
    fn contents(&self, name: &str, format: &str) -> Vec<u8> {
        self.qemu_img(&format!("convert -q -f {format} -O raw @{name} @as.raw"));
        fs::read(self.path("as.raw")).unwrap()
    }
}

/// Data, holes, and data that are zero.
fn data(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    for (n, part) in bytes.chunks_mut(96 << 10).enumerate() {
        if n % 3 != 1 {
            for (at, byte) in part.iter_mut().enumerate() {
                *byte = u8::try_from((at / 512 + n) % 255).unwrap() ^ seed;
            }
        }
    }
    bytes
}

#[test]
fn image_is_converted_to_every_format_and_back() {
    let home = Home::new();
    let bytes = data(1);
    fs::write(home.path("a.img"), &bytes).unwrap();
    home.good("convert a.img b.qcow2 --to qcow2");
    assert!(home.contents("b.qcow2", "qcow2") == bytes);
    assert!(
        home.qemu_img("check -f qcow2 @b.qcow2")
            .contains("No errors")
    );
    home.good("convert b.qcow2 c.vmdk --from qcow2 --to vmdk");
    assert!(home.contents("c.vmdk", "vmdk") == bytes);
    home.good("convert c.vmdk d.img --from vmdk --extent c-flat.vmdk --to raw");
    assert!(fs::read(home.path("d.img")).unwrap() == bytes);
    // Holes stay holes.
    use std::os::unix::fs::MetadataExt;
    let allocated = fs::metadata(home.path("d.img")).unwrap().blocks() * 512;
    assert!(allocated < BYTES as u64 * 3 / 4, "{allocated}");
}

#[test]
fn images_of_other_makers_are_imported() {
    let home = Home::new();
    let bytes = data(2);
    fs::write(home.path("a.img"), &bytes).unwrap();
    for (format, options, from) in [
        ("vpc", "subformat=dynamic,force_size=on", "vhd"),
        ("vpc", "subformat=fixed,force_size=on", "vhd"),
        ("vmdk", "subformat=monolithicSparse", "vmdk-sparse"),
        ("vmdk", "subformat=streamOptimized", "vmdk-sparse"),
    ] {
        home.qemu_img(&format!(
            "convert -q -f raw -O {format} -o {options} @a.img @foreign"
        ));
        home.good(&format!(
            "convert foreign b.img --from {from} --to raw --force"
        ));
        assert!(
            fs::read(home.path("b.img")).unwrap() == bytes,
            "{format} {options}"
        );
    }
    home.qemu_img("convert -q -f raw -O qcow2 -c @a.img @packed.qcow2");
    home.good("convert packed.qcow2 b.img --from qcow2 --to raw --force");
    assert!(fs::read(home.path("b.img")).unwrap() == bytes);
    home.bad(
        "convert a.img c.img --from vhd --to raw",
        "expected a VHD image",
    );
    home.bad("convert a.img c.img --from vmdk-sparse --to raw", "magic");
    assert!(!Path::new(&home.path("c.img")).exists());
}

#[test]
fn layer_is_made_written_committed_and_empty_again() {
    let home = Home::new();
    let below = data(3);
    fs::write(home.path("base.img"), &below).unwrap();
    home.good("create top.qcow2 --format qcow2 --backing base.img:raw");
    assert!(home.contents("top.qcow2", "qcow2") == below);
    let info = home.good("info top.qcow2 --format qcow2");
    assert!(
        info.contains("base.img (raw); a disk needs backing=PATH:FORMAT"),
        "{info}"
    );
    let mut bytes = below;
    for (at, part) in [
        (0, vec![9; 4096]),
        (5_000_192, vec![0; 70_000]),
        (BYTES - 512, vec![7; 512]),
    ] {
        fs::write(home.path("part"), &part).unwrap();
        let len = part.len();
        tool(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                &format!("write -s {} {at} {len}", home.path("part")),
                &home.path("top.qcow2"),
            ],
        );
        bytes[at..at + len].copy_from_slice(&part);
    }
    assert!(home.contents("top.qcow2", "qcow2") == bytes);
    home.good("commit top.qcow2 --backing base.img:raw");
    assert!(fs::read(home.path("base.img")).unwrap() == bytes);
    assert!(home.contents("top.qcow2", "qcow2") == bytes);
    let info: serde_json::Value =
        serde_json::from_str(&home.good("check top.qcow2 --format qcow2 --json")).unwrap();
    assert!(info["clusters_used"].as_u64().unwrap() < 8, "{info}");
}

#[test]
fn image_on_another_base_shows_the_same() {
    let home = Home::new();
    let bytes = data(4);
    fs::write(home.path("old.img"), &bytes).unwrap();
    let mut other = bytes.clone();
    other[1_000_000..3_000_000].fill(5);
    other.truncate(6 << 20);
    fs::write(home.path("new.img"), &other).unwrap();
    home.good("create top.qcow2 --format qcow2 --backing old.img:raw");
    home.good("rebase top.qcow2 --backing old.img:raw --onto new.img:raw");
    assert!(home.contents("top.qcow2", "qcow2") == bytes);
    assert!(
        home.qemu_img("info -f qcow2 @top.qcow2")
            .contains("backing file: new.img")
    );
    home.good("rebase top.qcow2 --backing new.img:raw");
    assert!(
        !home
            .qemu_img("info -f qcow2 @top.qcow2")
            .contains("backing file")
    );
    assert!(home.contents("top.qcow2", "qcow2") == bytes);
    assert!(
        home.qemu_img("check -f qcow2 @top.qcow2")
            .contains("No errors")
    );
    home.good("create again.qcow2 --format qcow2 --backing old.img:raw");
    fs::rename(home.path("old.img"), home.path("moved.img")).unwrap();
    home.good("rebase again.qcow2 --onto moved.img:raw --name-only");
    assert!(home.contents("again.qcow2", "qcow2") == bytes);
}

#[test]
fn image_gets_another_size() {
    let home = Home::new();
    let bytes = data(5);
    fs::write(home.path("a.img"), &bytes).unwrap();
    home.good("convert a.img b.qcow2 --to qcow2");
    for (name, format) in [("a.img", "raw"), ("b.qcow2", "qcow2")] {
        home.good(&format!("resize {name} 12MiB --format {format}"));
        let contents = home.contents(name, format);
        assert!(contents[..BYTES] == bytes && contents[BYTES..].iter().all(|&b| b == 0));
        assert_eq!(contents.len(), 12 << 20);
        home.bad(
            &format!("resize {name} 4MiB --format {format}"),
            "`--shrink`",
        );
        home.good(&format!("resize {name} 4MiB --format {format} --shrink"));
        assert!(home.contents(name, format) == bytes[..4 << 20]);
    }
    assert!(
        home.qemu_img("check -f qcow2 @b.qcow2")
            .contains("No errors")
    );
}

#[test]
fn damaged_image_is_told_and_repaired() {
    let home = Home::new();
    home.good("create a.qcow2 4MiB --format qcow2");
    home.good("check a.qcow2 --format qcow2");
    // One cluster more that is counted.
    let path = home.path("a.qcow2");
    let mut image = fs::read(&path).unwrap();
    let clusters = image.len() / 65536;
    image.resize(image.len() + 65536, 0);
    let table = usize::try_from(u64::from_be_bytes(image[48..56].try_into().unwrap())).unwrap();
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap());
    let entry = usize::try_from(block).unwrap() + clusters * 2;
    image[entry..entry + 2].copy_from_slice(&1u16.to_be_bytes());
    fs::write(&path, image).unwrap();
    let done = home.run("check a.qcow2 --format qcow2 --json");
    assert_eq!(done.status.code(), Some(6), "{done:?}");
    let told: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(
        (&told["leaks"], &told["corruptions"]),
        (&1.into(), &0.into())
    );
    home.good("check a.qcow2 --format qcow2 --repair");
    assert!(
        home.qemu_img("check -f qcow2 @a.qcow2")
            .contains("No errors")
    );
}

#[test]
fn nothing_is_replaced_or_opened_unasked() {
    let home = Home::new();
    fs::write(home.path("a.img"), data(6)).unwrap();
    fs::write(home.path("b.qcow2"), "mine").unwrap();
    home.bad("convert a.img b.qcow2 --to qcow2", "File exists");
    home.bad("convert none b2.qcow2 --to qcow2", "No such file");
    assert_eq!(fs::read(home.path("b.qcow2")).unwrap(), b"mine");
    home.good("create top.qcow2 --format qcow2 --backing a.img:raw");
    home.bad(
        "convert top.qcow2 c.img --from qcow2 --to raw",
        "add `backing=PATH:FORMAT`",
    );
    home.bad(
        "convert a.img c.img --from qcow2 --to raw",
        "say `format=raw`",
    );
    assert!(!Path::new(&home.path("c.img")).exists());
    let held = fs::File::options()
        .read(true)
        .write(true)
        .open(home.path("a.img"))
        .unwrap();
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&held, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    home.bad("resize a.img 16MiB", "is in use");
    home.bad("convert a.img c.img --to qcow2", "is in use");
}
