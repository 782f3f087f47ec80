//! Any bytes as requests of a guest to a shared folder, one after the other, and as what a process before has left
//! in the window: every request is answered within its room, and nothing outside of the folder is changed.
#![no_main]

use bulkhead_fs::{Access, Held, REQUEST_BYTES_MAX, Server, Terms, front_bytes};
use bulkhead_runtime::Kept;
use libfuzzer_sys::fuzz_target;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::OnceLock;

const KEPT_BYTES: usize = 8 << 20;
const ROOM: usize = 1 << 16;
/// FUSE_INIT of Linux.
const INIT: [u8; 56] = {
    let mut bytes = [0; 56];
    (bytes[0], bytes[4], bytes[8], bytes[40], bytes[44]) = (56, 26, 2, 7, 31);
    bytes
};

fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let place = std::env::temp_dir().join(format!("bulkhead-fuzz-{}", std::process::id()));
        fs::create_dir_all(place.join("shared/deep")).unwrap();
        fs::write(place.join("secret"), b"outside").unwrap();
        fs::write(place.join("shared/f"), b"inside").unwrap();
        place
    })
}

fuzz_target!(|data: &[u8]| {
    let place = folder();
    let kept = Kept::of_its_own(KEPT_BYTES);
    let Some((&[spoil, count, number], mut rest)) = data.split_first_chunk() else {
        return;
    };
    let mut answer = Vec::new();
    for life in 0..2u64 {
        let folder = File::open(place.join("shared")).unwrap().into();
        let kept = Some(kept.clone());
        let mut server = Server::new(folder, Access::ReadWrite, Terms::default(), kept).unwrap();
        if life == 0 {
            server.serve_numbered(1, &INIT, &mut Held::new(&[]), ROOM, &mut answer);
        }
        for n in 0..u64::from(count % 16) {
            let Some((&[len], behind)) = rest.split_first_chunk() else {
                break;
            };
            let (body, behind) = behind.split_at(usize::from(len).min(behind.len()));
            rest = behind;
            let mut request = body.to_vec();
            // Past the first check, and onto operations that there are.
            if let Some(front) = request.get_mut(..8) {
                front.copy_from_slice(&[
                    len.min(body.len() as u8),
                    0,
                    0,
                    0,
                    front[4] % 48,
                    0,
                    0,
                    0,
                ]);
            }
            assert!(request.len() <= REQUEST_BYTES_MAX);
            let (front, given) = request.split_at(front_bytes(&request).min(request.len()));
            let mut data = Held::new(given);
            let number = u64::from(number) + n;
            let filled = server.serve_numbered(number, front, &mut data, ROOM, &mut answer);
            assert!(answer.len() + filled <= ROOM);
        }
    }
    // What the next one is left is whatever comes.
    for (at, byte) in rest.iter().enumerate() {
        let _inside = kept.write(usize::from(spoil) * 8 + at, &[*byte]);
    }
    let folder = File::open(place.join("shared")).unwrap().into();
    let _served = Server::new(folder, Access::ReadWrite, Terms::default(), Some(kept)).unwrap();
    assert_eq!(fs::read(place.join("secret")).unwrap(), b"outside");
});
