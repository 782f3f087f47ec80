//! The gate's reading of a window header that a device wrote, and the legacy page's vCPU half.
#![no_main]

use bulkhead_ipc::control_page::{CONTROL_PAGE_BYTES, ControlPage};
use bulkhead_ipc::legacy_page::{LEGACY_PAGE_BYTES, LegacyPage};
use bulkhead_ipc::shared::{SharedMemory, sealed_memfd};
use bulkhead_ipc::window::{Window, WindowLayout};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let layout = WindowLayout::new(1 << 17, &[4]).unwrap();
    let fd = sealed_memfd("w", layout.bytes as u64).unwrap();
    let window = Window::map(fd, layout).unwrap();
    let header = &data[..data.len().min(4096)];
    window.memory.slice(0, header.len()).copy_from(header);
    let _state = window.device_state();
    if let Some(published) = window.published(0) {
        assert_eq!(published.seq % 2, 0);
        assert!(window.published(published.seq).is_none());
    }

    let fd = sealed_memfd("l", LEGACY_PAGE_BYTES).unwrap();
    let raw = SharedMemory::map(fd.try_clone().unwrap(), LEGACY_PAGE_BYTES).unwrap();
    let page = LegacyPage::map(fd).unwrap();
    raw.slice(0, header.len()).copy_from(header);
    let _seen = (
        page.consumed(),
        page.reply(1),
        page.take_requests(),
        page.mirror(255),
    );
    let _seen = (page.take_posted(0), page.take_call(0));

    let fd = sealed_memfd("c", CONTROL_PAGE_BYTES).unwrap();
    let raw = SharedMemory::map(fd.try_clone().unwrap(), CONTROL_PAGE_BYTES).unwrap();
    let page = ControlPage::map(fd).unwrap();
    raw.slice(0, header.len()).copy_from(header);
    let _seen = (page.phase(), page.denial());
});
