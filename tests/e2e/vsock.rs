//! Sockets between guest and host: each side reaches the other's listeners, bytes arrive whole and in
//! order, and a process or broker that is killed costs the connections that it had and no more.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::pattern::stream_byte;
use bulkhead_tests::{Daemon, Machine, RamDisk, is_alive, kill};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// Where the test guest listens.
const PORT: u32 = 5000;

fn socket_of(runtime: &Path) -> PathBuf {
    runtime.join("vms/web/vsock.sock")
}

fn test_guest(cmdline: &str, vsock: &str) -> Machine {
    Machine::test_guest(cmdline, &["--name", "web", vsock])
}

/// Asks for a connection to `port` of the guest.
fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut client = UnixStream::connect(socket)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    client.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = String::new();
    // One byte at a time, so that nothing behind the line is taken.
    let mut slow = BufReader::with_capacity(1, client.try_clone()?);
    slow.read_line(&mut line)?;
    let host_port = line.strip_prefix("OK ").and_then(|l| l.strip_suffix('\n'));
    match host_port.map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(client),
        _ => Err(io::Error::other(format!("answered {line:?}"))),
    }
}

/// Sends `bytes` bytes of pattern `seed`, ends that direction, and verifies that the same come back.
fn exchange(mut client: UnixStream, seed: u64, bytes: u64) {
    let mut to = client.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let all: Vec<u8> = (0..bytes).map(|place| stream_byte(seed, place)).collect();
        to.write_all(&all).unwrap();
        to.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    assert_eq!(got.len() as u64, bytes);
    let wrong = (0u64..)
        .zip(&got)
        .find(|(place, byte)| **byte != stream_byte(seed, *place));
    assert_eq!(wrong, None);
}

/// Sends back what each connection sends, up to its end. Returns how many bytes that were so far.
fn echo(listener: UnixListener) -> Arc<AtomicU64> {
    let bytes = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&bytes);
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let count = Arc::clone(&count);
            std::thread::spawn(move || {
                let (mut from, mut to) = (client.try_clone().unwrap(), client);
                let mut buffer = vec![0; 1 << 16];
                while let Ok(n @ 1..) = from.read(&mut buffer) {
                    count.fetch_add(n as u64, Ordering::Relaxed);
                    if to.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
                let _gone = to.shutdown(Shutdown::Write);
                // The other side's end is waited for, so that what was sent arrives.
                while matches!(from.read(&mut buffer), Ok(1..)) {}
            });
        }
    });
    bytes
}

/// The number behind `key=` in the last record named `record`.
fn told(console: &str, record: &str, key: &str) -> u64 {
    let start = format!("BH {record} ");
    let line = console
        .lines()
        .rev()
        .find_map(|l| l.trim().strip_prefix(&start));
    let line = line.unwrap_or_else(|| panic!("no {record} in {console}"));
    let value = line.split(' ').find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == key).then(|| value.parse().unwrap())
    });
    value.unwrap_or_else(|| panic!("no {key} in {line}"))
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn clients_reach_the_guest_and_get_their_bytes_back() {
    const CLIENTS: u64 = 6;
    let mut machine = test_guest("mode=vsock-echo count=6 timeout=60", "--vsock");
    machine.expect("BH vsock-echo.ready cid=3");
    let socket = socket_of(&machine.runtime());
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    std::thread::scope(|scope| {
        for seed in 0..CLIENTS {
            let socket = &socket;
            scope.spawn(move || exchange(connect(socket, PORT).unwrap(), seed, (seed + 1) * MIB));
        }
    });
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let end = |key| told(&ended.console, "vsock-echo.end", key);
    assert_eq!((end("whole"), end("refused"), end("cut")), (CLIENTS, 0, 0));
    assert_eq!(end("bytes"), 21 * MIB);
    assert!(!socket.exists());
}

#[test]
fn port_at_which_no_guest_listens_is_refused_and_so_is_nonsense() {
    let mut machine = test_guest("mode=vsock-echo count=1 timeout=60", "--vsock");
    machine.expect("BH vsock-echo.ready");
    let socket = socket_of(&machine.runtime());
    let refused = connect(&socket, 77).unwrap_err();
    assert_eq!(refused.to_string(), "answered \"\"");
    let mut rude = UnixStream::connect(&socket).unwrap();
    rude.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    rude.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(rude.read(&mut [0; 1]), Ok(0) | Err(_)));
    exchange(connect(&socket, PORT).unwrap(), 1, MIB);
    assert_eq!(machine.wait().code, 0);
}

#[test]
fn guest_reaches_listeners_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    let bytes = echo(UnixListener::bind(dir.path().join("web.sock_5000")).unwrap());
    let vsock = format!("--vsock={}", path.display());
    let mut machine = test_guest(
        "mode=vsock-ask,vsock-ask count=8 size=2m timeout=60",
        &vsock,
    );
    machine.expect("BH vsock-ask.begin cid=3");
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let end = |key| told(&ended.console, "vsock-ask.end", key);
    assert_eq!((end("whole"), end("refused"), end("cut")), (8, 0, 0));
    assert_eq!(end("bytes"), 16 * MIB);
    assert_eq!(bytes.load(Ordering::Relaxed), 32 * MIB);
    assert!(!path.exists(), "the socket goes with its machine");
}

#[test]
fn guest_is_refused_where_nobody_listens() {
    let ended = test_guest("mode=vsock-ask count=3 port=9 timeout=60", "--vsock").wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let end = |key| told(&ended.console, "vsock-ask.end", key);
    assert_eq!((end("whole"), end("refused"), end("cut")), (0, 3, 0));
}

#[test]
fn socket_of_another_machine_is_not_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("taken.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let vsock = format!("--vsock={}", path.display());
    let ended = test_guest("mode=hello", &vsock).wait();
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.errors.contains("somebody listens there"), "{ended:?}");
    assert!(path.exists());
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let ended = test_guest("mode=hello", &vsock).wait();
    assert_eq!(ended.code, 2, "{ended:?}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

/// Writes and reads until the connection is cut.
fn load_until_cut(mut client: UnixStream) -> std::thread::JoinHandle<()> {
    let mut to = client.try_clone().unwrap();
    std::thread::spawn(move || {
        std::thread::spawn(move || while to.write_all(&[7; 4096]).is_ok() {});
        let mut buffer = [0; 4096];
        loop {
            match client.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => assert!(buffer[..n].iter().all(|&b| b == 7)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
                Err(error) => panic!("{error}"),
            }
        }
    })
}

#[test]
fn process_that_is_killed_cuts_its_connections_and_new_ones_work_at_once() {
    const ROUNDS: usize = 8;
    let mut machine = test_guest("mode=vsock-echo count=8 timeout=60", "--vsock");
    machine.expect("BH vsock-echo.ready");
    let socket = socket_of(&machine.runtime());
    for round in 1..=ROUNDS {
        let victim = machine.process("vsock");
        let loads: Vec<_> = (0..3)
            .map(|_| load_until_cut(connect(&socket, PORT).unwrap()))
            .collect();
        std::thread::sleep(Duration::from_millis(30));
        kill(victim);
        let killed = Instant::now();
        // Who comes meanwhile waits, and is not refused.
        let client = loop {
            match connect(&socket, PORT) {
                Ok(client) => break client,
                Err(error) => assert!(killed.elapsed() < PATIENCE, "{error}"),
            }
        };
        assert!(
            killed.elapsed() < Duration::from_secs(10),
            "{:?}",
            killed.elapsed()
        );
        exchange(client, round as u64, MIB);
        loads.into_iter().for_each(|load| load.join().unwrap());
        machine.expect_restarts(round);
    }
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let end = |key| told(&ended.console, "vsock-echo.end", key);
    assert_eq!(end("transport_resets"), ROUNDS as u64);
    assert_eq!(end("whole"), ROUNDS as u64);
}

#[test]
fn guest_whose_connections_are_cut_again_and_again_gets_no_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    let _bytes = echo(UnixListener::bind(dir.path().join("web.sock_5000")).unwrap());
    let vsock = format!("--vsock={}", path.display());
    let mut machine = test_guest(
        "mode=vsock-ask count=4 size=1m seconds=10 timeout=60",
        &vsock,
    );
    machine.expect("BH vsock-ask.round");
    for n in 1..=10 {
        kill(machine.process("vsock"));
        machine.expect_restarts(n);
        std::thread::sleep(Duration::from_millis(100));
    }
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let end = |key| told(&ended.console, "vsock-ask.end", key);
    assert!(end("whole") > 0 && end("cut") > 0, "{ended:?}");
    assert_eq!(end("transport_resets"), 10);
}

#[test]
fn brokers_come_and_go_and_both_sides_find_each_other() {
    let mut daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let asks = dir.path().join("asks.sock");
    let _bytes = echo(UnixListener::bind(dir.path().join("asks.sock_5000")).unwrap());
    daemon.create_and_start("web", "mode=vsock-echo seconds=0", &["--vsock"]);
    let vsock = format!("--vsock={}", asks.display());
    let ask = "mode=vsock-ask count=2 size=256k seconds=40 timeout=60";
    daemon.create_and_start("asks", ask, &[&vsock]);
    daemon.until_output("web", "BH vsock-echo.ready");
    daemon.until_output("asks", "BH vsock-ask.round");
    let socket = socket_of(&daemon.runtime());
    let mut kept = connect(&socket, PORT).unwrap();
    let says = |client: &mut UnixStream| {
        client.write_all(b"still there?").unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"still there?");
    };
    says(&mut kept);
    daemon.crash();
    // Without any broker.
    says(&mut kept);
    exchange(connect(&socket, PORT).unwrap(), 3, MIB);
    daemon.serve();
    says(&mut kept);
    exchange(connect(&socket, PORT).unwrap(), 4, MIB);
    let whole = |daemon: &Daemon| told(&daemon.output_of("asks"), "vsock-ask.round", "whole");
    let before = whole(&daemon);
    until("the guest reaches nobody", || whole(&daemon) > before + 4);
    // The new broker has no descriptor of the socket, and binds another one for a successor.
    let victim = daemon.process("web", "vsock");
    kill(victim);
    until("it does not die", || !is_alive(victim));
    let killed = Instant::now();
    let client = loop {
        match connect(&socket, PORT) {
            Ok(client) => break client,
            Err(error) => assert!(killed.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    exchange(client, 5, MIB);
    assert!(matches!(kept.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert_eq!(daemon.run(&["wait", "asks"]).code, 0);
    assert!(!asks.exists());
    daemon.good(&["kill", "web"]);
    until("its socket stays", || !socket.exists());
}

#[test]
fn linux_talks_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let initrd = dir.path().join("initrd");
    let probe = Path::new(env!("CARGO_BIN_EXE_vsock-probe"));
    RamDisk::linux().copy("vsock-probe", probe).write(&initrd);
    let path = dir.path().join("web.sock");
    let _bytes = echo(UnixListener::bind(dir.path().join("web.sock_5000")).unwrap());
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_BZIMAGE");
    let mut machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &bulkhead_tests::linux_cmdline(),
        "-m",
        "96MiB",
        "--timeout=900s",
        &format!("--vsock={}", path.display()),
    ]);
    let patience = Duration::from_secs(300);
    machine.expect_within("bh: ready", patience);
    machine.expect_within("# ", patience);
    machine.type_keys("/vsock-probe ask 9 1\n");
    machine.expect_within("probe: ECONNRESET", patience);
    machine.type_keys("/vsock-probe ask 5000 1048576\n");
    machine.expect_within("probe: verified 1048576", patience);
    machine.type_keys("/vsock-probe echo 5000 2\n");
    machine.expect_within("probe: listening", patience);
    exchange(connect(&path, PORT).unwrap(), 3, MIB);
    machine.expect_within("probe: echoed 1048576", patience);
    // What Linux itself does when the process behind its sockets dies.
    let mut cut = connect(&path, PORT).unwrap();
    // Linux resets what its program has accepted; what still waits for that is not connected, afterwards.
    cut.write_all(b"x").unwrap();
    cut.read_exact(&mut [0]).unwrap();
    kill(machine.process("vsock"));
    machine.expect_restarts(1);
    // It is reset if the program waits for more by then, and else not connected any more.
    machine.expect_within("probe: E", patience);
    drop(cut);
    machine.type_keys("/vsock-probe echo 5000 1\n");
    machine.expect_within("probe: listening", patience);
    exchange(connect(&path, PORT).unwrap(), 4, MIB);
    machine.expect_within("probe: echoed 1048576", patience);
    machine.type_keys("poweroff -f\n");
    assert_eq!(machine.wait_within(patience).code, 0);
}
