//! The console input ring: keys arrive in order, whole, once.

use super::check;
use crate::input_ring::{InputReader, InputWriter};
use crate::shared::SharedMemory;
use loom::thread;

#[test]
fn keys_arrive_in_order_and_once() {
    check(|| {
        let memory = SharedMemory::with_cells([0, 0x40, 0x1000, 0x1001, 0x1002]);
        let mut writer = InputWriter::over(memory.clone());
        let mut reader = InputReader::over(memory, 0);
        let writer = thread::spawn(move || {
            assert_eq!(writer.write(b"a"), 1);
            assert_eq!(writer.write(b"bc"), 2);
        });
        let mut seen = Vec::new();
        let mut buffer = [0; 4];
        let mut look = || {
            let n = reader.peek(&mut buffer);
            seen.extend_from_slice(&buffer[..n]);
            reader.take(n);
        };
        look();
        writer.join().unwrap();
        look();
        assert_eq!(seen, b"abc");
    });
}
