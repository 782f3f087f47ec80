use super::*;
use crate::network::card::{CardSpec, CardVlan};
use crate::vm::spec::{
    BootDisk, CloudInitSpec, ConsoleChoice, ConsoleSpec, DiskSpec, HostShare, KernelSource,
    Lifecycle, Limits, NetSource, NetSpec, OnEnd, ShareSpec, VmSpec, VsockSpec,
};
use bulkhead_ipc::protocol::birth::{DiskLimits, HugePages, ImageFormat, Rate};
use proptest::prelude::*;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use tempfile::TempDir;

const GOOD: &str = r#"name = "web"

[machine]
cpus = 2
memory = "64MiB"
hugepages = "off"

[boot]
kernel = "vmlinuz"
initrd = "initrd"
cmdline = "quiet"

[[disk]]
name = "root"
path = "root.img"

[[disk]]
path = "data.img"
readonly = true
serial = "D4"
queues = 2

[console]
attach = "virtio"
history = "64KiB"
size = "132x43"

[lifecycle]
on_reboot = "destroy"

[limits]
cpu_weight = 50
disk_read_per_s = "1MiB"

[vsock]
cid = 7
path = "v.sock"
"#;

pub(super) fn around() -> Surroundings {
    Surroundings {
        name: "vm".to_owned(),
        kernel: None,
        memory: HostMemory {
            available: Some(1 << 30),
            huge_pages_free: 32 << 20,
        },
        overcommit: false,
    }
}

/// A directory with the files that the VM files of these tests name.
fn place() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "initrd", "root.img", "data.img"] {
        fs::write(dir.path().join(name), [0; 1024]).unwrap();
    }
    fs::write(dir.path().join("odd.img"), [0; 1000]).unwrap();
    fs::write(dir.path().join("empty.img"), []).unwrap();
    fs::create_dir(dir.path().join("dir")).unwrap();
    std::os::unix::fs::symlink("root.img", dir.path().join("link.img")).unwrap();
    dir
}

fn read(dir: &TempDir, text: &str) -> Result<VmSpec, Problems> {
    check(parse("vm.toml", dir.path(), text)?, &around())
}

fn message(text: &str) -> String {
    read(&place(), text).unwrap_err().to_string()
}

#[test]
fn every_key_reaches_the_specification() {
    let dir = place();
    let spec = read(&dir, GOOD).unwrap();
    let disk = |name: &str, file: &str| DiskSpec {
        name: name.into(),
        path: dir.path().join(file),
        read_only: false,
        ephemeral: false,
        serial: name.into(),
        format: ImageFormat::Raw,
        extents: Vec::new(),
        backing: Vec::new(),
        limits: DiskLimits::default(),
        shareable: false,
        queues: 1,
        bytes_min: 0,
    };
    let kernel = KernelSource::File(dir.path().join("vmlinuz"));
    let wanted = VmSpec {
        vcpus: 2,
        memory_bytes: 64 << 20,
        huge_pages: HugePages::Off,
        initrd: Some(dir.path().join("initrd")),
        cmdline: "quiet".into(),
        disks: vec![
            disk("root", "root.img"),
            DiskSpec {
                read_only: true,
                serial: "D4".into(),
                queues: 2,
                ..disk("disk1", "data.img")
            },
        ],
        vsock: Some(VsockSpec {
            cid: 7,
            path: Some(dir.path().join("v.sock")),
        }),
        console: ConsoleSpec {
            attach: ConsoleChoice::Virtio,
            history_bytes: 64 << 10,
            size: (132, 43),
            ..ConsoleSpec::default()
        },
        lifecycle: Lifecycle {
            on_reboot: OnEnd::Destroy,
            ..Lifecycle::default()
        },
        limits: Limits {
            share: HostShare {
                cpu_weight: Some(50),
                disk_read_per_s: Some(1 << 20),
                ..HostShare::default()
            },
            ..Limits::default()
        },
        ..VmSpec::new("web", kernel)
    };
    assert_eq!(spec, wanted);
}

/// Replaces one piece of [`GOOD`] and expects one error, exactly.
fn fault(was: &str, is: &str, wanted: &str) {
    assert_eq!(GOOD.matches(was).count(), 1, "{was}");
    let got = message(&GOOD.replace(was, is));
    assert!(
        got.starts_with(wanted),
        "for {is:?}\n got {got}\nwant {wanted}"
    );
    assert!(!got.contains('\n'), "more than one error: {got}");
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    fault(
        "memory =",
        "memroy =",
        "vm.toml:5:1: machine.memroy = \"64MiB\": unknown key; did you mean `memory`?",
    );
    fault(
        "cpus = 2",
        "cpus = 2\ncolour = 'red'",
        "vm.toml:5:1: machine.colour = 'red': unknown key; expected one of cpus, memory, hugepages",
    );
    fault(
        "[lifecycle]",
        "[livecycle]",
        "vm.toml:28:2: livecycle: unknown key; did you mean `lifecycle`?",
    );
    fault(
        "readonly =",
        "read-only =",
        "vm.toml:19:1: disk.read-only = true: unknown key; did you mean `readonly`?",
    );
}

#[test]
fn socket_has_a_place_and_a_number_that_a_guest_can_have() {
    fault(
        "cid = 7",
        "cid = 2",
        "vm.toml:36:7: vsock.cid = 2: expected a whole number from 3 to 4294967294",
    );
    fault(
        "path = \"v.sock\"",
        "path = \"none/v.sock\"",
        "vm.toml:37:8: vsock.path = \"none/v.sock\": expected a socket to be made in a directory",
    );
    let long = format!("path = \"{}\"", "v".repeat(65));
    fault("path = \"v.sock\"", &long, "vm.toml:37:8: vsock.path");
    let none = GOOD.replace("cid = 7\npath = \"v.sock\"\n", "");
    let spec = read(&place(), &none).unwrap();
    assert_eq!(spec.vsock, Some(VsockSpec::default()));
}

#[test]
fn keys_of_later_features_are_refused_not_ignored() {
    let later = "this key is not supported yet";
    fault(
        "name = \"web\"",
        "policy = true",
        &format!("vm.toml:1:1: policy = true: {later}"),
    );
    fault(
        "[lifecycle]",
        "[snapshots]\n[lifecycle]",
        &format!("vm.toml:28:2: snapshots: {later}"),
    );
    fault(
        "cpu_weight = 50",
        "cpu_weight = 0",
        "vm.toml:32:14: limits.cpu_weight = 0: expected a whole number from 1 to 10000",
    );
    fault(
        "disk_read_per_s = \"1MiB\"",
        "disk_read_per_s = \"1KiB\"",
        "vm.toml:33:19: limits.disk_read_per_s = \"1KiB\": expected at least \"4KiB\" a second",
    );
    fault(
        "queues = 2",
        "limits = { iops = 3 }",
        "vm.toml:21:12: disk.limits.iops = 3: unknown key",
    );
    fault(
        "queues = 2",
        "limits = { bytes_burst = \"1MiB\" }",
        "vm.toml:21:26: disk.limits.bytes_burst = \"1MiB\": expected bytes_per_s beside it",
    );
    fault(
        "queues = 2",
        "limits = { bytes_per_s = \"1KiB\" }",
        "vm.toml:21:26: disk.limits.bytes_per_s = \"1KiB\": expected at least 4096",
    );
    fault(
        "initrd =",
        "firmware =",
        &format!("vm.toml:10:1: boot.firmware = \"initrd\": {later}"),
    );
}

#[test]
fn wrong_types_and_values_are_named() {
    fault(
        "\"64MiB\"",
        "67108864",
        "vm.toml:5:10: machine.memory = 67108864: expected a string with a unit such as \"512MiB\", not an integer",
    );
    fault(
        "\"64MiB\"",
        "\"64\"",
        "vm.toml:5:10: machine.memory = \"64\": expected a size with a unit",
    );
    fault(
        "\"64MiB\"",
        "\"8MiB\"",
        "vm.toml:5:10: machine.memory = \"8MiB\": expected at least 16MiB",
    );
    fault(
        "\"64MiB\"",
        "\"16777217B\"",
        "vm.toml:5:10: machine.memory = \"16777217B\": expected a multiple of 4KiB",
    );
    fault(
        "\"64MiB\"",
        "\"2GiB\"",
        "vm.toml:5:10: machine.memory = \"2GiB\": expected at most the 1024 MiB",
    );
    fault(
        "cpus = 2",
        "cpus = 33",
        "vm.toml:4:8: machine.cpus = 33: expected a whole number from 1 to 32",
    );
    fault(
        "cpus = 2",
        "cpus = \"2\"",
        "vm.toml:4:8: machine.cpus = \"2\": expected a whole number",
    );
    fault(
        "\"off\"",
        "\"on\"",
        "vm.toml:6:13: machine.hugepages = \"on\": expected \"off\" or \"transparent\"",
    );
    fault(
        "name = \"web\"",
        "name = \"a b\"",
        "vm.toml:1:8: name = \"a b\": expected 1 to 64 letters",
    );
    fault(
        "name = \"root\"",
        "name = \"disk1\"\n[[disk]]\nname = \"disk1\"",
        "vm.toml:13:1: disk: expected a `path`",
    );
    fault(
        "readonly = true",
        "readonly = \"yes\"",
        "vm.toml:19:12: disk.readonly = \"yes\": expected true or false, not a string",
    );
    fault(
        "\"132x43\"",
        "\"132\"",
        "vm.toml:26:8: console.size = \"132\": expected columns and rows",
    );
    fault(
        "\"64KiB\"",
        "\"1KiB\"",
        "vm.toml:25:11: console.history = \"1KiB\": expected 4KiB to 64MiB",
    );
    fault(
        "\"D4\"",
        "\"012345678901234567890\"",
        "vm.toml:20:10: disk.serial = \"012345678901234567890\": expected at most 20",
    );
    fault(
        "serial = \"D4\"",
        "format = \"vdi\"",
        "vm.toml:20:10: disk.format = \"vdi\": images of this format are not used as they are; \
         convert it with `bulkhead image convert --from vdi` first",
    );
    fault(
        "serial = \"D4\"",
        "format = \"qcow2\"\nshareable = true",
        "vm.toml:21:13: disk.shareable = true: expected a raw image for a disk that machines share",
    );
    let below = "backing = [{ path = \"initrd\", format = \"raw\" }]";
    fault(
        "serial = \"D4\"",
        below,
        "vm.toml:20:11: disk.backing = [{ path = \"initrd\", format = \"raw\" }]: \
         expected backing images only for a disk with format = \"qcow2\"",
    );
    fault(
        "serial = \"D4\"",
        "backing = [\"root.img\"]",
        "vm.toml:20:11: disk.backing = [\"root.img\"]: expected a list such as [{ path = \"base.img\", format = \"raw\" }]",
    );
    fault(
        "serial = \"D4\"",
        "extents = [\"initrd\"]",
        "vm.toml:20:11: disk.extents = [\"initrd\"]: expected at most 31 extents, of an image with format = \"vmdk\"",
    );
    fault(
        "attach = \"virtio\"",
        "virtio = false\nattach = \"virtio\"",
        "vm.toml:25:10: console.attach = \"virtio\": expected a console",
    );
    fault(
        "[console]",
        "[[console]]",
        "vm.toml:23:1: console: expected a section that begins with [console]",
    );
    fault(
        "[[disk]]\nname",
        "[disk]\nname",
        "vm.toml:17:3: duplicate key",
    );
}

#[test]
fn files_are_looked_at_before_anything_starts() {
    fault(
        "\"root.img\"",
        "\"none.img\"",
        "vm.toml:15:8: disk.path = \"none.img\": expected an image file or a block device: No such file or directory",
    );
    fault(
        "\"root.img\"",
        "\"dir\"",
        "vm.toml:15:8: disk.path = \"dir\": expected an image file or a block device, found a directory",
    );
    fault(
        "\"root.img\"",
        "\"/dev/null\"",
        "vm.toml:15:8: disk.path = \"/dev/null\": expected an image file or a block device, found a character device",
    );
    fault(
        "\"root.img\"",
        "\"odd.img\"",
        "vm.toml:15:8: disk.path = \"odd.img\": expected an image of whole 512-byte sectors, found 1000 bytes",
    );
    fault(
        "\"vmlinuz\"",
        "\"empty.img\"",
        "vm.toml:9:10: boot.kernel = \"empty.img\": expected a kernel image, found an empty file",
    );
    fault(
        "\"vmlinuz\"",
        "\"\"",
        "vm.toml:9:10: boot.kernel = \"\": expected the path of a file",
    );
    fault(
        "kernel = \"vmlinuz\"\n",
        "",
        "boot.kernel (default): the VM file names no kernel",
    );
}

/// [`GOOD`] with another `[boot]`.
fn booting(boot: &str) -> String {
    let was = "kernel = \"vmlinuz\"\ninitrd = \"initrd\"\n";
    assert!(GOOD.contains(was));
    GOOD.replace(was, boot)
}

#[test]
fn kernel_on_a_disk_is_found_by_paths_of_the_guest() {
    let dir = place();
    let boot = "from_disk = \"disk1\"\nkernel = \"boot/k\"\ninitrd = \"/i\"\n";
    let spec = read(&dir, &booting(boot)).unwrap();
    let wanted = BootDisk {
        disk: "disk1".to_owned(),
        kernel: Some("/boot/k".to_owned()),
        initrd: Some("/i".to_owned()),
    };
    assert_eq!(spec.kernel, KernelSource::Disk(wanted));
    assert_eq!(spec.initrd, None);
    let again = parse("p.toml", Path::new("/nowhere"), &print(&spec).unwrap());
    assert_eq!(again.and_then(|draft| check(draft, &around())), Ok(spec));

    let newest = read(&dir, &booting("from_disk = \"root\"\n")).unwrap();
    let wanted = BootDisk {
        disk: "root".to_owned(),
        kernel: None,
        initrd: None,
    };
    assert_eq!(newest.kernel, KernelSource::Disk(wanted));

    let error = message(&booting("from_disk = \"disk0\"\n"));
    let wanted = "vm.toml:9:13: boot.from_disk = \"disk0\": expected one of the machine's disks: root, disk1";
    assert_eq!(error, wanted);
    let long = format!("from_disk = \"root\"\nkernel = \"{}\"\n", "k".repeat(5000));
    assert!(message(&booting(&long)).contains("expected a path on the disk"));
}

#[test]
fn option_for_a_kernel_replaces_all_that_the_file_says_of_kernels() {
    let dir = place();
    let place = Place::Default {
        key: "option".to_owned(),
    };
    let on_disk = parse(
        "vm.toml",
        dir.path(),
        &booting("from_disk = \"root\"\ninitrd = \"i\"\n"),
    );
    let on_host = parse("vm.toml", dir.path(), GOOD).unwrap();
    let on_disk = on_disk.unwrap();
    let option = Draft {
        kernel: Some(Located {
            value: dir.path().join("vmlinuz"),
            place: place.clone(),
        }),
        ..Draft::default()
    };
    let spec = check(option.or(on_disk.clone()), &around()).unwrap();
    assert_eq!(spec.kernel, KernelSource::File(dir.path().join("vmlinuz")));
    assert_eq!(spec.initrd, None);

    let option = Draft {
        from_disk: Some(Located { value: None, place }),
        ..Draft::default()
    };
    let spec = check(option.clone().or(on_host), &around()).unwrap();
    let wanted = |initrd: Option<&str>| {
        KernelSource::Disk(BootDisk {
            disk: "root".to_owned(),
            kernel: None,
            initrd: initrd.map(str::to_owned),
        })
    };
    assert_eq!(spec.kernel, wanted(None));
    let spec = check(option.or(on_disk), &around()).unwrap();
    assert_eq!(spec.kernel, wanted(Some("/i")));
}

#[test]
fn two_writers_of_one_file_are_refused() {
    let second = "vm.toml:18:8: disk.path = \"root.img\": the same file is used at vm.toml:15:8: disk.path = \"root.img\"";
    fault("\"data.img\"", "\"root.img\"", second);
    fault(
        "\"data.img\"",
        "\"link.img\"",
        "vm.toml:18:8: disk.path = \"link.img\": the same file",
    );
    fault("\"data.img\"", "\"./dir/../root.img\"", "vm.toml:18:8: ");
    fault(
        "\"root.img\"",
        "\"initrd\"",
        "vm.toml:15:8: disk.path = \"initrd\": the same file is used at vm.toml:10:10",
    );
    let readers = GOOD.replace("\"data.img\"", "\"root.img\"").replace(
        "path = \"root.img\"\n\n",
        "path = \"root.img\"\nephemeral = true\n\n",
    );
    assert!(read(&place(), &readers).is_ok());
}

#[test]
fn syntax_errors_have_a_line() {
    fault("cpus = 2", "cpus = ", "vm.toml:4:");
    fault(
        "cpus = 2",
        "cpus = 2\ncpus = 3",
        "vm.toml:5:1: duplicate key",
    );
    fault("cpus = 2", "cpus 2", "vm.toml:4:");
}

#[test]
fn all_errors_are_shown_at_once_in_order() {
    let text = GOOD
        .replace("cpus = 2", "cpus = 0")
        .replace("queues", "queue");
    let lines: Vec<_> = message(&text).lines().map(|l| l[..11].to_owned()).collect();
    assert_eq!(lines, ["vm.toml:4:8", "vm.toml:21:"]);
}

#[test]
fn control_characters_in_a_file_do_not_reach_the_terminal() {
    let got = message(&GOOD.replace("cpus = 2", "\"\\u001b[2J\" = '\u{9b}'"));
    assert!(got.chars().all(|c| (' '..='~').contains(&c)), "{got:?}");
}

#[test]
fn overcommit_and_huge_pages_measure_against_their_own_pool() {
    let dir = place();
    let with = |text: &str, around: &Surroundings| {
        check(parse("vm.toml", dir.path(), text).unwrap(), around)
    };
    let large = GOOD.replace("64MiB", "4GiB");
    let overcommit = Surroundings {
        overcommit: true,
        ..around()
    };
    assert!(with(&large, &around()).is_err());
    assert!(with(&large, &overcommit).is_ok());
    let reserved = GOOD.replace("\"off\"", "\"reserved\"");
    let error = with(&reserved, &overcommit).unwrap_err().to_string();
    assert!(error.contains("expected at most the 32MiB"), "{error}");
    assert!(with(&reserved.replace("64MiB", "32MiB"), &around()).is_ok());
    let error = with(&reserved.replace("64MiB", "17MiB"), &around()).unwrap_err();
    assert!(error.to_string().contains("a multiple of 2MiB"), "{error}");
}

#[test]
fn options_win_over_the_file_and_add_disks() {
    let dir = place();
    let file = parse("vm.toml", dir.path(), GOOD).unwrap();
    let at = |value: &str| Place::Option {
        option: "--disk".into(),
        value: value.into(),
    };
    let options = Draft {
        vcpus: Some(Located {
            value: 4,
            place: at("4"),
        }),
        disks: vec![DraftDisk::new(at("x"))],
        ..Draft::default()
    };
    let both = options.or(file.clone());
    assert_eq!(both.vcpus.unwrap().value, 4);
    assert_eq!(both.memory, file.memory);
    assert_eq!(both.disks.len(), 3);
    assert_eq!(both.disks[2].place, at("x"));
}

#[test]
fn cloud_init_has_files_that_are_there_and_says_nothing_twice() {
    let dir = place();
    let with = |section: &str| read(&dir, &format!("{GOOD}\n[cloud_init]\n{section}"));
    let spec = with("user_data = \"data.img\"\nhostname = \"web.example\"").unwrap();
    let cloud_init = spec.cloud_init.clone().unwrap();
    assert_eq!(cloud_init.user_data, Some(dir.path().join("data.img")));
    // What runs has the seed among its disks, and a VM file does not say it a second time.
    let mut runs = spec.clone();
    let seed = DiskSpec {
        name: crate::vm::spec::SEED_DISK.to_owned(),
        ..spec.disks[1].clone()
    };
    runs.disks.push(seed);
    assert_eq!(print(&runs).unwrap(), print(&spec).unwrap());
    for (section, wanted) in [
        (
            "user_data = \"none\"",
            "cloud_init.user_data = \"none\": expected a file for cloud-init",
        ),
        (
            "hostname = \"a b\"",
            "cloud_init.hostname = \"a b\": expected letters",
        ),
        (
            "ssh_keys = [\"hello\"]",
            "expected public keys, one line each",
        ),
        ("ssh_keys = \"x\"", "expected a list of strings"),
        (
            "meta_data = \"data.img\"\nhostname = \"x\"",
            "expected no meta_data beside it",
        ),
        ("userdata = \"x\"", "unknown key; did you mean `user_data`?"),
    ] {
        let error = with(section).unwrap_err().to_string();
        assert!(error.contains(wanted), "{section}: {error}");
    }
    let taken = GOOD.replace("name = \"root\"", "name = \"cloud-init\"") + "\n[cloud_init]\n";
    let error = read(&dir, &taken).unwrap_err().to_string();
    assert!(error.contains("expected another name"), "{error}");
}

#[test]
fn schema_knows_exactly_the_keys_that_work() {
    let schema = json_schema();
    let keys = |pointer: &str| -> Vec<String> {
        let object = schema.pointer(pointer).unwrap().as_object().unwrap();
        let mut keys: Vec<_> = object.keys().cloned().collect();
        keys.sort();
        keys
    };
    for (pointer, known) in [
        ("/properties", parse::ROOT_KEYS),
        ("/$defs/Machine/properties", parse::MACHINE_KEYS),
        ("/$defs/Boot/properties", parse::BOOT_KEYS),
        ("/$defs/Disk/properties", parse::DISK_KEYS),
        ("/$defs/Vsock/properties", parse::VSOCK_KEYS),
        ("/$defs/CloudInit/properties", parse::CLOUD_INIT_KEYS),
        ("/$defs/Share/properties", parse::SHARE_KEYS),
        ("/$defs/Net/properties", parse::NET_KEYS),
        ("/$defs/NetLimit/properties", parse::NET_LIMITS_KEYS),
        ("/$defs/Console/properties", parse::CONSOLE_KEYS),
        ("/$defs/Lifecycle/properties", parse::LIFECYCLE_KEYS),
        ("/$defs/Limits/properties", parse::LIMITS_KEYS),
    ] {
        let working = known.iter().filter(|key| key.supported);
        let mut names: Vec<_> = working.map(|key| key.name.to_owned()).collect();
        names.sort();
        assert_eq!(keys(pointer), names, "{pointer}");
    }
}

#[test]
fn devices_of_all_kinds_share_the_slots() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("k"), [0; 512]).unwrap();
    fs::write(home.path().join("d"), [0; 512]).unwrap();
    let read = |disks: usize, nets: usize, more: &str| {
        let begin = "name = \"web\"\n[boot]\nkernel = \"k\"\n".to_owned();
        let disks = "[[disk]]\npath = \"d\"\nreadonly = true\n".repeat(disks);
        let nets = "[[net]]\nbridge = \"br0\"\n".repeat(nets);
        let text = begin + &disks + &nets + more;
        parse("f", home.path(), &text).and_then(|draft| check(draft, &around()))
    };
    let share = "[[share]]\npath = \".\"\n";
    let seed = "[vsock]\n[cloud_init]\n";
    assert_eq!(read(14, 0, "").map(|spec| spec.disks.len()).unwrap(), 14);
    read(7, 6, share).unwrap();
    read(6, 6, seed).unwrap();
    for (problems, wanted) in [
        (read(15, 0, ""), "f:46:1: disk: expected at most 14 disks"),
        (
            read(7, 7, share),
            "share: expected at most 14 disks, network devices and shared folders",
        ),
        (
            read(6, 7, seed),
            "expected at most 12 disks, network devices and shared folders together, beside the socket device, \
             beside the disk that cloud-init reads",
        ),
    ] {
        let problems = problems.unwrap_err().to_string();
        assert!(problems.contains(wanted), "{wanted}: {problems}");
    }
}

#[test]
fn committed_schema_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vm-file.schema.json");
    let current = serde_json::to_string_pretty(&json_schema()).unwrap() + "\n";
    if std::env::var_os("BULKHEAD_BLESS").is_some() {
        fs::write(path, &current).unwrap();
    }
    let committed = fs::read_to_string(path).unwrap_or_default();
    assert!(committed == current, "run this test with BULKHEAD_BLESS=1");
}

fn any_limits() -> impl Strategy<Value = DiskLimits> {
    let rate = |least: u64, most: u64| {
        prop::option::of(
            (least..most, least..most).prop_map(|(per_s, burst)| Rate { per_s, burst }),
        )
    };
    (rate(4096, 1 << 40), rate(1, 1 << 32))
        .prop_map(|(bytes, requests)| DiskLimits { bytes, requests })
}

prop_compose! {
    fn any_disk()(
        name in "[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}",
        read_only: bool, ephemeral: bool, shareable: bool, limits in any_limits(),
        serial in "[!-~]{0,20}", queues in 1u8..=8,
    ) -> DiskSpec {
        DiskSpec {
            name,
            path: PathBuf::new(),
            format: ImageFormat::Raw,
            extents: Vec::new(),
            backing: Vec::new(),
            read_only,
            ephemeral,
            limits,
            shareable,
            serial,
            queues,
            bytes_min: 0,
        }
    }
}

prop_compose! {
    fn any_folder()(
        name in "[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}",
        read_only: bool,
        owners in prop::array::uniform2(prop::option::of((0..u32::MAX, 0..u32::MAX))),
        cache_ms in 0u32..=3_600_000,
    ) -> ShareSpec {
        let [owner, guest_owner] = owners;
        ShareSpec { name, path: PathBuf::new(), read_only, owner, guest_owner, cache_ms }
    }
}

prop_compose! {
    fn any_net()(
        name in "[a-zA-Z0-9._-]{0,20}",
        interface in "[a-zA-Z0-9_-]{1,12}",
        kind in 0u8..4, link_up: bool, limits in any_limits(), port in 1u16..,
        first in 0u8..=127, rest in prop::array::uniform5(any::<u8>()),
        mtu in prop::option::of(68u16..=65_521), queues in 1u8..=8, card in any_card(),
    ) -> NetSpec {
        NetSpec {
            name,
            source: match kind {
                0 => NetSource::Bridge(interface),
                1 => NetSource::Tap(interface),
                2 => NetSource::Network("lab".into()),
                _ => NetSource::User {
                    publish: vec![format!("[::1]:{port}:80/udp").parse().unwrap()],
                },
            },
            mac: [first << 1 | 2, rest[0], rest[1], rest[2], rest[3], rest[4]],
            mtu: mtu.filter(|_| kind != 2),
            queues: if kind >= 2 { 1 } else { queues },
            link_up,
            limits,
            card: if kind == 2 { card } else { CardSpec::default() },
        }
    }
}

fn any_card() -> impl Strategy<Value = CardSpec> {
    let vlan = prop_oneof![
        Just(CardVlan::Network),
        (1u16..=4094).prop_map(CardVlan::Access),
        prop::collection::btree_set(1u16..=4094, 0..5)
            .prop_map(|vlans| CardVlan::Trunk(vlans.into_iter().collect())),
    ];
    let v6 = any::<u64>().prop_map(|n| Ipv6Addr::from(0xfd00 << 112 | u128::from(n)).into());
    let v4 = any::<[u8; 3]>().prop_map(|[a, b, c]| Ipv4Addr::new(10, a, b, c).into());
    let addresses = prop::collection::btree_set(prop_oneof![v4, v6], 0..5);
    let tenant = prop::option::of("[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?");
    (tenant, addresses, vlan).prop_map(|(tenant, addresses, vlan)| CardSpec {
        tenant,
        addresses: addresses.into_iter().collect(),
        vlan,
    })
}

prop_compose! {
    fn any_share()(
        cpu_weight in prop::option::of(1u32..=10_000),
        cpu_percent in prop::option::of(1u32..=100_000),
        rates in prop::array::uniform2(prop::option::of(4096u64..1 << 40)),
        iops in prop::array::uniform2(prop::option::of(1u32..)),
    ) -> HostShare {
        let ([disk_read_per_s, disk_write_per_s], [disk_read_iops, disk_write_iops]) = (rates, iops);
        HostShare {
            cpu_weight, cpu_percent, disk_read_per_s, disk_write_per_s, disk_read_iops, disk_write_iops,
        }
    }
}

prop_compose! {
    fn any_spec()(
        name in "[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}",
        vcpus in 1u8..=32,
        pages in 4096u64..=262_144,
        huge in 0usize..2,
        cmdline in "[^\0]{0,200}",
        with_initrd: bool,
        cid in prop::option::of(3u32..u32::MAX),
        (disks, nets, shares) in (
            prop::collection::vec(any_disk(), 0..4),
            prop::collection::vec(any_net(), 0..4),
            prop::collection::vec(any_folder(), 0..3),
        ),
        (virtio, attach, on_cmdline) in (any::<bool>(), any::<bool>(), any::<bool>()),
        history_bytes in 4096u64..=(64 << 20),
        size in (1u16.., 1u16..),
        ends in prop::array::uniform4(0usize..3),
        full in 0usize..2,
        autostart: bool,
        share in any_share(),
        cloud_init in prop::option::of(("[a-z]{1,9}", any::<bool>())),
    ) -> (VmSpec, bool) {
        let end = |n: usize| parse::ON_END[n].1;
        let spec = VmSpec {
    cmdline, disks, name, nets, shares, vcpus,
            memory_bytes: pages * 4096,
            huge_pages: parse::HUGE_PAGES[huge].1,
            kernel: KernelSource::File(PathBuf::new()),
            initrd: None,
            vsock: cid.map(|cid| VsockSpec { cid, path: None }),
            console: ConsoleSpec {
                virtio,
                attach: if virtio && attach { ConsoleChoice::Virtio } else { ConsoleChoice::Serial },
                on_cmdline, history_bytes, size,
            },
            cloud_init: cloud_init.map(|(name, keys)| CloudInitSpec {
                hostname: keys.then_some(name),
                ssh_keys: if keys { vec!["ssh-rsa \"A\\ é".to_owned()] } else { Vec::new() },
                ..CloudInitSpec::default()
            }),
            lifecycle: Lifecycle {
                on_poweroff: end(ends[0]), on_reboot: end(ends[1]), on_crash: end(ends[2]),
                on_host_shutdown: end(ends[3]),
                on_disk_full: parse::ON_DISK_FULL[full].1,
            },
            autostart,
            limits: Limits { share, ..Limits::default() },
        };
        (spec, with_initrd)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn printed_machine_reads_back_the_same((spec, with_initrd) in any_spec()) {
        let (home, mut spec) = (tempfile::tempdir().unwrap(), spec);
        let file = |name: &str| {
            let path = home.path().join(name);
            fs::write(&path, [0; 512]).unwrap();
            path
        };
        spec.kernel = KernelSource::File(file("kernel \"é\""));
        spec.initrd = with_initrd.then(|| file("in\\itrd"));
        if let Some(vsock) = spec.vsock.as_mut().filter(|vsock| vsock.cid % 2 == 0) {
            vsock.path = Some(home.path().join("v \" sock"));
        }
        for (n, disk) in spec.disks.iter_mut().enumerate() {
            disk.path = file(&format!("d{n}"));
            disk.name = format!("{n}{}", disk.name);
        }
        if let Some(cloud_init) = &mut spec.cloud_init {
            cloud_init.user_data = Some(file("user data"));
            if cloud_init.hostname.is_none() {
                cloud_init.meta_data = Some(file("meta"));
            }
        }
        for (n, share) in spec.shares.iter_mut().enumerate() {
            share.path = home.path().into();
            share.name = format!("s{n}{}", share.name);
        }
        for (n, net) in spec.nets.iter_mut().enumerate() {
            net.name = format!("n{n}{}", net.name);
            match &mut net.source {
                NetSource::Tap(interface) | NetSource::Bridge(interface) => {
                    *interface = format!("{n}{interface}");
                }
                NetSource::User { publish } => {
                    for port in publish {
                        port.port = 1 + u16::try_from(n).unwrap();
                    }
                }
                NetSource::Network(_) => {}
            }
        }
        let text = print(&spec).unwrap();
        // Another directory: printed paths must not depend on where the file lies.
        let again = parse("p.toml", Path::new("/nowhere"), &text)
            .and_then(|draft| check(draft, &around()));
        prop_assert_eq!(again.map_err(|e| format!("{e}\n{text}")), Ok(spec));
    }
}

fn assert_located(text: &str) -> Result<(), TestCaseError> {
    let lines = text.split('\n').count();
    if let Err(problems) = parse("f", Path::new("/"), text) {
        prop_assert!(!problems.0.is_empty());
        for problem in &problems.0 {
            let Place::File { line, column, .. } = problem.place else {
                return Err(TestCaseError::fail("no place"));
            };
            prop_assert!((1..=lines).contains(&line) && column >= 1);
            let shown = problem.to_string();
            prop_assert!(
                shown.starts_with(&format!("f:{line}:{column}: ")) && !shown.contains('\n'),
                "{}",
                shown
            );
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn mutated_files_give_a_place_and_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, any::<char>()), 1..6),
    ) {
        let mut text: Vec<char> = GOOD.chars().collect();
        let pieces = ["[", "]]", "\"", "=", "\n", "'''", "-1", "{", "1e9", "[[disk]]\n", "\0"];
        for (at, kind, letter) in edits {
            let at = at.index(text.len());
            match pieces.get(kind) {
                Some(piece) => drop(text.splice(at..at, piece.chars())),
                None => text[at] = letter,
            }
        }
        assert_located(&text.into_iter().collect::<String>())?;
    }

    #[test]
    fn random_toml_gives_a_place_and_never_panics(
        keys in prop::collection::vec((0usize..6, "[a-z_]{1,12}|cpus|memory|path|kernel|size",
            "-?[0-9]{1,20}|true|\"[a-zA-Z0-9]{0,9}\"|\\[1, 2\\]|\\{a = 1\\}|1979-05-27|0x[0-9A-F]+|inf"), 0..20),
    ) {
        let sections = ["[machine]", "[boot]", "[[disk]]", "[console]", "[lifecycle]", "[[net]]"];
        let text: String = keys
            .iter()
            .map(|(section, key, value)| format!("{}\n{key} = {value}\n", sections[*section]))
            .collect();
        assert_located(&text)?;
    }

    #[test]
    fn any_text_gives_a_place_and_never_panics(text: String) {
        assert_located(&text)?;
    }
}
