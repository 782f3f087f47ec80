//! The freestanding test guest: drives every device of a VM from ring 3 and reports on serial.
//!
//! `sys/boot.s` brings the first CPU from the PVH entry to [`guest_main`] in ring 3. The command
//! line names the modes to run and how to end; README.md lists them and every record.

#![no_std]
#![no_main]

mod end;
mod machine;
mod modes;
mod report;
mod sys;
mod virtio;

use report::say;

/// Ring 3 starts here, on the static stack.
#[unsafe(no_mangle)]
extern "sysv64" fn guest_main(start_info_address: u64) -> ! {
    let machine = machine::discover(start_info_address);
    modes::run_all(&machine);
    end::finish(&machine)
}

/// Every exception but the service call ends here, in ring 3.
#[unsafe(no_mangle)]
extern "sysv64" fn guest_exception(
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    cr2: u64,
    rsp: u64,
) -> ! {
    say!(
        "exception vector={vector} error={error:#x} rip={rip:#x} cs={cs:#x} cr2={cr2:#x} rsp={rsp:#x}"
    );
    end::fatal(end::EXCEPTION)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let (file, line) = info
        .location()
        .map_or(("?", 0), |place| (place.file(), place.line()));
    let mut text = report::Text::new();
    let _ = core::fmt::write(&mut text, format_args!("{}", info.message()));
    let message = bulkhead_guest::record::Escaped(text.bytes());
    say!("panic file={file} line={line} message={message}");
    end::fatal(end::PANIC)
}
