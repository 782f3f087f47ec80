//! `bulkhead-vcpu`: the vCPU group of one virtual machine.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    bulkhead_vcpu::birth::run()
}
