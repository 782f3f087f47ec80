//! The vCPU group process: the only holder of guest memory and of KVM.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod gate;
pub mod paging;
pub mod quirks;
pub mod report;
pub mod virtio;
