//! `bulkhead-switch`, as a program of its own.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    bulkhead_switch::run()
}
