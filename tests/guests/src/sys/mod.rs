//! Everything that touches the machine: the only modules of the guest with `unsafe`.

pub mod irq;
pub mod mem;
pub mod phys;
pub mod port;
pub mod ring0;
pub mod time;
