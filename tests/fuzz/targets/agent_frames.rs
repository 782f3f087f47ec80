//! Any bytes as what either side of the guest agent's connection says, in pieces of any size: no more than a
//! frame and a piece is kept, what is understood can be said again, and no tree leaves its folder.
#![no_main]

use bulkhead_agent::tree::{Limits, Plant};
use bulkhead_ipc::agent_frames::{Frames, put};
use bulkhead_ipc::protocol::agent::{FRAME_BYTES_MAX, FromAgent, ToAgent};
use libfuzzer_sys::fuzz_target;
use std::fmt::Debug;
use std::path::Path;

/// Most entries of one run: each costs system calls.
const ENTRIES_MAX: u64 = 64;
const BYTES_MAX: u64 = 4096;

fn hear<T>(size: usize, data: &[u8], mut each: impl FnMut(T))
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + Debug,
{
    let mut frames = Frames::default();
    for piece in data.chunks(size.max(1)) {
        frames.add(piece);
        loop {
            match frames.take::<T>() {
                Ok(Some(message)) => {
                    let (mut bytes, mut again) = (Vec::new(), Frames::default());
                    put(&message, &mut bytes).expect("it came in a frame");
                    again.add(&bytes);
                    let heard: T = again.take().expect("what was said").expect("all of it");
                    assert_eq!(heard, message);
                    each(message);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(frames.len() <= FRAME_BYTES_MAX + 4);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&size, data)) = data.split_first() else {
        return;
    };
    let size = usize::from(size);
    hear::<ToAgent>(size, data, |_| ());
    let dir = tempfile::tempdir().expect("a folder");
    let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
    std::fs::create_dir(&to).expect("a folder");
    std::fs::create_dir(&outside).expect("a folder");
    let _link = std::os::unix::fs::symlink(&outside, to.join("a"));
    let limits = Limits {
        entries: ENTRIES_MAX,
        bytes: BYTES_MAX,
    };
    let mut plant = Plant::new(&to, b"copy", limits).expect("a folder to write to");
    hear::<FromAgent>(size, data, |message| {
        if let FromAgent::Entry(entry) = message {
            let _refused = plant.add(entry);
        }
    });
    drop(plant);
    let count = |path: &Path| std::fs::read_dir(path).map_or(0, Iterator::count);
    assert_eq!((count(&outside), count(dir.path())), (0, 2));
});
