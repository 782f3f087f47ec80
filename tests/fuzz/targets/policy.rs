//! Any text as a policy file and as an override of each built-in policy, and each accepted one compiled.
#![no_main]

use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::{built_in, check, compile, overrides};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for kind in ProcKind::ALL {
        let whole = check::policy("fuzz.toml", text, kind);
        let policy = check::policy("built-in", built_in(kind), kind).unwrap();
        let tighter = overrides::apply(policy, "fuzz.toml", text, false);
        for policy in [whole, tighter].into_iter().flatten() {
            let _too_large = compile::compile(&policy);
        }
    }
});
