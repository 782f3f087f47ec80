//! Any text as a VM file, and any text as a policy override.
#![no_main]

use bulkhead::vmfile;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Err(problems) = vmfile::parse("vm.toml", Path::new("/"), text) {
        assert!(problems.to_string().starts_with("vm.toml"));
    }
});
