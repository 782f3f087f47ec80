//! The vCPU group process: the only holder of guest memory and of KVM.
//!
//! [`start::run`] is its whole life after birth. Three kinds of thread: `main` ([`control`]) talks to
//! the broker, `vcpu` ([`run_loop`]) runs the guest, `gate` ([`gate`]) moves data between guest and
//! device processes.

pub mod acpi;
pub mod birth;
pub mod boot;
pub mod control;
pub mod cpuid;
pub mod crash;
pub mod ear;
pub mod gate;
pub mod group;
pub mod irq;
pub mod kick;
pub mod kvm;
pub mod legacy_client;
pub mod lifecycle;
pub mod memory;
pub mod outbox;
pub mod paging;
pub mod ports;
pub mod quirks;
pub mod report;
pub mod run_loop;
pub mod setup;
pub mod slot_news;
pub mod start;
pub mod virtio;
pub mod wait;
