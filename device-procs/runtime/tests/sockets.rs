//! Sockets that are taken, and watched, while a process serves. In a process of their own, since other tests count
//! descriptors.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::socket::accept;
use bulkhead_runtime::wait::{SocketNews, Waiter, Woken};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// More than one look takes.
const MANY: usize = 69;

#[test]
fn socket_has_news_until_it_is_closed() {
    let waiter = Waiter::new().unwrap();
    let (mut near, mut far) = UnixStream::pair().unwrap();
    waiter.watcher().watch(&near, 77).unwrap();
    let news = |hung_up| {
        vec![SocketNews {
            number: 77,
            hung_up,
            failed: false,
        }]
    };
    let look = || waiter.sleep(Some(Duration::ZERO)).unwrap().sockets;
    // There is room to write.
    assert_eq!(look(), news(false));
    assert_eq!(look(), []);
    far.write_all(b"x").unwrap();
    assert_eq!(look(), news(false));
    near.read_exact(&mut [0; 1]).unwrap();
    drop(far);
    assert_eq!(look(), news(true));
    drop(near);
    assert_eq!(look(), []);
}

#[test]
fn more_events_than_one_look_takes_come_with_the_next() {
    let waiter = Waiter::new().unwrap();
    let pairs: Vec<_> = (0..MANY).map(|_| UnixStream::pair().unwrap()).collect();
    for (number, (near, _)) in (0..).zip(&pairs) {
        waiter.watcher().watch(near, number).unwrap();
    }
    let look = || waiter.sleep(Some(Duration::ZERO)).unwrap().sockets;
    let mut numbers: Vec<u64> = look().iter().map(|news| news.number).collect();
    numbers.extend(look().iter().map(|news| news.number));
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..MANY as u64));
}

#[test]
fn connections_are_taken_one_by_one_and_do_not_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert!(accept(&listener).unwrap().is_none());
    let _clients = [(); 2].map(|()| UnixStream::connect(&path).unwrap());
    for _ in 0..2 {
        let mut taken = UnixStream::from(accept(&listener).unwrap().unwrap());
        let nothing = taken.read(&mut [0; 1]).unwrap_err();
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    }
    assert!(accept(&listener).unwrap().is_none());
}

#[test]
fn what_is_forgotten_wakes_nobody_though_others_have_it() {
    let bell = Doorbell::new().unwrap();
    let (own, waiter) = (bell.try_clone().unwrap(), Waiter::new().unwrap());
    let (watcher, now) = (waiter.watcher(), Some(Duration::ZERO));
    watcher.watch_input(&own, 77).unwrap();
    bell.ring();
    let news = SocketNews {
        number: 77,
        hung_up: false,
        failed: false,
    };
    assert_eq!(waiter.sleep(now).unwrap().sockets, [news]);
    watcher.forget(&own).unwrap();
    drop(own);
    bell.ring();
    assert_eq!(waiter.sleep(now).unwrap(), Woken::default());
}
