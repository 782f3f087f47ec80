//! What living processes can reach, measured from the kernel, is what their policies grant; and
//! anything that is planted in one of them beyond that is found and named.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead::authority::compare::{Difference, differences};
use bulkhead::authority::descriptors::{Descriptor, Object, duplicate};
use bulkhead::authority::graph::Graph;
use bulkhead::authority::{Authority, Measured, Subject, measure, svg, table};
use bulkhead::launch::users::UserRange;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_policies::cache::Compiled;
use bulkhead_tests::{Daemon, Fate, Intruder, Machine};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// A machine with every kind of process and two disks, all locked.
fn machine() -> (Machine, tempfile::TempDir) {
    let disks = tempfile::tempdir().unwrap();
    let disk = |name: &str| {
        let path = disks.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (first, second) = (disk("first.img"), disk("second.img"));
    let folder = format!("{},readonly", disks.path().display());
    let arguments = [
        "-c", "2", "--disk", &first, "--disk", &second, "--share", &folder, "--vsock",
    ];
    let mut machine = Machine::test_guest("mode=idle", &arguments);
    machine.expect("BH idle ");
    for kind in ProcKind::OF_EVERY_MACHINE {
        let _locked = machine.process(kind.name());
    }
    (machine, disks)
}

#[test]
fn switch_reaches_its_ports_and_nothing_else() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    for name in ["web", "db"] {
        daemon.create_and_start(name, "mode=idle", &["--net", "network=lab"]);
        daemon.until_output(name, "BH idle");
    }
    let shown = loop {
        let shown = daemon.json(&["network", "show", "lab"]);
        if shown["cards"][1]["connected"] == true && shown["cards"][0]["connected"] == true {
            break shown;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let users = UserRange::DEFAULT.exists().then_some(UserRange::DEFAULT);
    let subject = |kind, index, pid: u64| Subject {
        id: Some(ProcId {
            kind,
            index,
            generation: 1,
        }),
        pid: i32::try_from(pid).unwrap(),
        users,
    };
    let subjects = [
        subject(ProcKind::Switch, 0, shown["pid"].as_u64().unwrap()),
        subject(ProcKind::Net, 0, daemon.process("web", "net").into()),
        subject(ProcKind::Net, 1, daemon.process("db", "net").into()),
    ];
    let authority = measure(&subjects).unwrap();
    let policies = Compiled::fresh(None, false).unwrap();
    assert_eq!(differences(&authority, &policies), []);
    let held = authority.processes[0].descriptors.as_ref().unwrap();
    let ports = held
        .iter()
        .filter(|d| matches!(&d.of, Object::Memfd { name, .. } if name == "bulkhead-port"));
    assert_eq!(ports.count(), 2);
    let maps = &authority.processes[0].memory.as_ref().unwrap().mappings;
    let windows = maps.iter().filter(|m| m.of.contains("bulkhead-window"));
    assert_eq!(windows.count(), 0);
    // A card's own window in the switch would be found.
    let mut wrong = authority.clone();
    let stolen = wrong.processes[1].descriptors.as_ref().unwrap();
    let stolen = stolen
        .iter()
        .find(|d| matches!(&d.of, Object::Memfd { name, .. } if name == "bulkhead-window"));
    let stolen = stolen.unwrap().clone();
    wrong.processes[0]
        .descriptors
        .as_mut()
        .unwrap()
        .push(stolen);
    assert!(!differences(&wrong, &policies).is_empty());
}

#[test]
fn inspect_measures_the_switches_of_a_machines_networks() {
    let daemon = Daemon::start();
    for network in ["lab", "other", "third"] {
        daemon.good(&["network", "create", network]);
    }
    let cards = ["--net", "network=lab", "--net", "network=third"];
    daemon.create_and_start("web", "mode=idle", &cards);
    daemon.create_and_start("db", "mode=idle", &["--net", "network=other"]);
    for name in ["web", "db"] {
        daemon.until_output(name, "BH idle");
    }
    let pid = |network: &str| daemon.json(&["network", "show", network])["pid"].clone();
    let report = loop {
        // A process that is not locked yet differs.
        let report = daemon.run(&["inspect", "web", "--authority", "--json"]);
        if report.code == 0 {
            break report;
        }
        assert!(!report.errors.contains("switch"), "{report:?}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    let report: serde_json::Value = serde_json::from_str(&report.output).unwrap();
    let processes = report["processes"].as_array().unwrap();
    let switches = processes
        .iter()
        .filter(|process| process["name"].as_str().unwrap().starts_with("switch"));
    let measured: Vec<_> = switches
        .map(|switch| (switch["name"].as_str().unwrap(), switch["pid"].clone()))
        .collect();
    let expected = [("switch0.1", pid("lab")), ("switch1.1", pid("third"))];
    assert_eq!(measured, expected);
    // It is what connects them.
    let things = report["graph"]["things"].as_array().unwrap();
    let shared = things.iter().any(|thing| {
        let reached = thing["reached_by"].as_array().unwrap();
        let by = |name: &str| reached.iter().any(|reach| reach["process"] == name);
        by("net0.1") && by("switch0.1")
    });
    assert!(shared, "{report}");
}

/// The machine's processes and its broker, as they are to be measured.
fn subjects(machine: &Machine) -> Vec<Subject> {
    let pid = |pid: u32| i32::try_from(pid).unwrap();
    let processes = machine.processes();
    let mut subjects = Vec::new();
    for kind in ProcKind::OF_EVERY_MACHINE {
        for (index, process) in (0..).zip(processes.all_of(kind.name())) {
            let generation = 1;
            subjects.push(Subject {
                id: Some(ProcId {
                    kind,
                    index,
                    generation,
                }),
                pid: pid(process),
                users: UserRange::DEFAULT.exists().then_some(UserRange::DEFAULT),
            });
        }
    }
    subjects.push(Subject {
        id: None,
        pid: pid(machine.pid()),
        users: None,
    });
    subjects
}

fn measured(machine: &Machine) -> (Authority, Vec<Difference>) {
    let authority = measure(&subjects(machine)).unwrap();
    let policies = Compiled::fresh(None, false).unwrap();
    let found = differences(&authority, &policies);
    (authority, found)
}

fn named(found: &[Difference]) -> String {
    found.iter().map(|d| format!("{d}\n")).collect()
}

#[test]
fn every_kind_reaches_what_its_policy_grants_and_nothing_else() {
    let (machine, disks) = machine();
    let (authority, found) = measured(&machine);
    assert_eq!(named(&found), "");
    assert_eq!(authority.processes.len(), 7);
    for process in &authority.processes {
        assert!(process.descriptors.is_some() && process.memory.is_some());
        if process.id.is_some() {
            assert!(process.threads.iter().all(|t| t.permitted.is_some()));
            let landlock = process.landlock.map(|landlock| landlock.to_string());
            assert_eq!(landlock.as_deref(), Some("files+tcp"), "{}", process.name);
        }
    }
    let graph = Graph::of(&authority);
    let disk = disks.path().join("first.img");
    let disk = disk.to_str().unwrap();
    let thing = graph.things.iter().find(|t| t.label == disk).unwrap();
    // The broker holds the disk for the next process of it, and sees when the last lock on it is gone.
    assert_eq!(thing.processes(), ["blk0.1", "broker"]);
    assert_eq!(thing.reached_by[1].access, "rw");
    for device in ["console0.1", "blk0.1", "blk1.1", "rng0.1"] {
        let mut windows = graph.things.iter().filter(|t| t.is_window());
        let window = windows.find(|t| t.processes().contains(&device)).unwrap();
        assert_eq!(window.processes(), ["vcpu0.1", device]);
    }
    let (text, picture) = (table::text(&authority), svg::render(&graph));
    for shown in [text, picture, graph.dot()] {
        for process in &authority.processes {
            assert!(shown.contains(&process.name), "{shown}");
        }
        assert!(shown.contains("first.img"), "{shown}");
    }
}

/// Hands a descriptor to a locked process through its own control socket, as a taken-over process and a
/// taken-over broker could together: no locked process can make one by itself.
fn plant(machine: &Machine, kind: &str, descriptor: BorrowedFd<'_>) -> i64 {
    let victim = machine.process(kind);
    let everybody = measure(&subjects(machine)).unwrap();
    let pid = i32::try_from(victim).unwrap();
    let of = |pid: i32| {
        let process = everybody.processes.iter().find(|p| p.pid == pid);
        process.and_then(|p| p.descriptors.clone()).unwrap()
    };
    let his = of(pid).into_iter().find_map(|d| match d.of {
        Object::Socket { inode, .. } if d.number == 3 => Some(inode),
        _ => None,
    });
    let broker = i32::try_from(machine.pid()).unwrap();
    let ours = of(broker).into_iter().find(|d| match d.of {
        Object::Socket { peer, .. } => peer.is_some() && peer == his,
        _ => false,
    });
    let ours = duplicate(broker, ours.expect("the broker's end").number).unwrap();
    let mut intruder = Intruder::enter(victim, None);
    let fds = [descriptor.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let data = [IoSlice::new(b"!")];
    sendmsg::<()>(ours.as_raw_fd(), &data, &rights, MsgFlags::empty(), None).unwrap();
    // struct msghdr, struct iovec, room for the control message and for the byte.
    let at = intruder.place(&[0; 512]);
    let words = [0, 0, at + 64, 1, at + 128, 128, 0, 0, at + 448, 1];
    let mut bytes: Vec<u8> = words
        .iter()
        .flat_map(|word: &u64| word.to_ne_bytes())
        .collect();
    bytes.resize(512, 0);
    intruder.place(&bytes);
    let fate = intruder.call(libc::SYS_recvmsg, [3, at, 0, 0, 0, 0]);
    assert_eq!(fate, Fate::Returned(1));
    // The descriptor's number follows the header of the control message.
    let number = intruder.look(at + 128 + 16, 4);
    i64::from(i32::from_ne_bytes(number.try_into().unwrap()))
}

#[test]
fn descriptor_beyond_the_policy_is_found_and_named() {
    let (machine, disks) = machine();
    let disk = File::options()
        .read(true)
        .write(true)
        .open(disks.path().join("first.img"))
        .unwrap();
    let number = plant(&machine, "rng", disk.as_fd());
    let bell = EventFd::new().unwrap();
    plant(&machine, "legacy", bell.as_fd());
    let (authority, found) = measured(&machine);
    let text = named(&found);
    for line in [
        format!("rng0.1: descriptors: has 1 × file ({number}), expected at most 0"),
        "blk0.1: sharing: shares ".to_owned(),
        "legacy0.1: descriptors: has 6 × doorbell ".to_owned(),
    ] {
        assert!(text.contains(&line), "no `{line}` in\n{text}");
    }
    let graph = Graph::of(&authority);
    let disk = graph.things.iter().find(|t| t.label.ends_with("first.img"));
    assert_eq!(disk.unwrap().processes(), ["blk0.1", "rng0.1", "broker"]);
}

#[test]
fn every_way_in_which_a_process_can_differ_is_named() {
    let (machine, _disks) = machine();
    let (authority, found) = measured(&machine);
    assert_eq!(named(&found), "");
    let policies = Compiled::fresh(None, false).unwrap();
    let is_rng = |p: &&mut Measured| p.name == "rng0.1";
    let try_with = |what: &str, change: &dyn Fn(&mut Measured)| {
        let mut changed = authority.clone();
        change(changed.processes.iter_mut().find(is_rng).unwrap());
        let found = named(&differences(&changed, &policies));
        assert!(found.contains(what), "no `{what}` in `{found}`");
        assert!(found.starts_with("rng0.1: "), "{found}");
    };
    try_with("identity: is user 0", &|p| p.status.uid = 0);
    if UserRange::DEFAULT.exists() {
        try_with("identity: is user ", &|p| p.status.uid += 1);
        try_with("expected 1879048192 + ", &|p| {
            // The id of the process after it.
            (p.status.uid, p.status.gid) = (p.status.uid + 1, p.status.gid + 1);
        });
    }
    try_with("has the capabilities 0x4", &|p| p.status.capabilities = 4);
    try_with("may gain privileges", &|p| {
        p.status.may_gain_privileges = true;
    });
    try_with("is in the groups [27]", &|p| p.status.groups = vec![27]);
    try_with("is in the net namespace of the host", &|p| {
        p.status.namespaces.get_mut("net").unwrap().is_readers = true;
    });
    try_with("root directory has 20 entries", &|p| {
        p.status.root_entries = Some(20);
    });
    try_with("Max open files is unlimited", &|p| {
        p.status.limits.insert("Max open files".to_owned(), None);
    });
    try_with("can write and execute", &|p| {
        let memory = p.memory.as_mut().unwrap();
        let window = memory.mappings.iter_mut().find(|m| m.shared).unwrap();
        window.protection = "rwx".to_owned();
    });
    try_with("maps the file /etc/passwd", &|p| {
        let mappings = &mut p.memory.as_mut().unwrap().mappings;
        let mut file = mappings[0].clone();
        (file.inode, file.of, file.shared) = (1, "/etc/passwd".to_owned(), false);
        mappings.push(file);
    });
    try_with("has the seals [\"seal\"]", &|p| {
        for descriptor in p.descriptors.as_mut().unwrap() {
            if let Object::Memfd { seals, .. } = &mut descriptor.of {
                *seals = vec!["seal"];
            }
        }
    });
    try_with("has 0 × /dev/urandom, expected at least 1", &|p| {
        let not_device =
            |d: &Descriptor| d.number < 5 || !matches!(d.of, Object::CharDevice { .. });
        p.descriptors.as_mut().unwrap().retain(not_device);
    });
    try_with("thread main has 0 filters", &|p| p.threads[0].filters = 0);
    try_with("a thread gate, which the policy does not know", &|p| {
        let mut thread = p.threads[0].clone();
        (thread.tid, thread.name) = (1, "gate".to_owned());
        p.threads.push(thread);
    });
    let tighter = tempfile::tempdir().unwrap();
    let text = "kind = \"rng\"\n[[deny]]\nname = \"read\"\n";
    std::fs::write(tighter.path().join("rng.toml"), text).unwrap();
    let policies = Compiled::fresh(Some(tighter.path()), false).unwrap();
    let found = named(&differences(&authority, &policies));
    assert!(found.contains("it permits read beyond it"), "{found}");
}

#[test]
fn disk_process_that_could_grow_its_image_is_named() {
    let (machine, _disks) = machine();
    let (mut authority, _) = measured(&machine);
    let is_blk = |p: &&mut Measured| p.id.is_some_and(|id| id.kind == ProcKind::Blk);
    let blk = authority.processes.iter_mut().find(is_blk).unwrap();
    blk.status.limits.insert("Max file size".to_owned(), None);
    let policies = Compiled::fresh(None, false).unwrap();
    let found = named(&differences(&authority, &policies));
    assert!(found.contains("Max file size is unlimited"), "{found}");
}

#[test]
fn inspect_shows_the_authority_of_a_machine_and_fails_when_it_differs() {
    let daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle", &[]);
    for kind in ["vcpu", "legacy", "console", "rng"] {
        let _locked = daemon.process("web", kind);
    }
    let table = daemon.good(&["inspect", "web", "--authority"]);
    assert!(table.contains("/dev/urandom (r)"), "{table}");
    let json = daemon.json(&["inspect", "web", "--authority"]);
    assert_eq!(json["differences"], serde_json::json!([]));
    assert_eq!(json["processes"].as_array().unwrap().len(), 4);
    let dot = daemon.good(&["inspect", "web", "--authority", "--dot"]);
    assert!(
        dot.starts_with("graph authority {") && dot.contains("rng0.1"),
        "{dot}"
    );
    let picture = daemon.good(&["inspect", "web", "--authority", "--svg"]);
    assert!(
        picture.starts_with("<svg ") && picture.contains("rng0.1"),
        "{picture}"
    );
    // The operator changes a policy while the machine runs under the one that it was started with.
    let policies = daemon.scratch().join("etc/policies.d");
    std::fs::create_dir_all(&policies).unwrap();
    let text = "kind = \"rng\"\n[[deny]]\nname = \"read\"\n";
    std::fs::write(policies.join("rng.toml"), text).unwrap();
    let done = daemon.run(&["inspect", "web", "--authority"]);
    assert_eq!(done.code, 6, "{done:?}");
    assert!(
        done.errors.contains("rng0.1: filters: thread main"),
        "{done:?}"
    );
    assert!(
        done.errors.contains("it permits read beyond it"),
        "{done:?}"
    );
}
