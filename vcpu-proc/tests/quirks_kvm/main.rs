//! The quirks layer against this host's KVM.
//!
//! The differential tests run the same code in ring 0, where an incomplete KVM needs the quirks
//! layer, and in ring 3, where every KVM lets the processor run it; both must leave the same
//! registers and memory. On hosts with a complete KVM both are the processor, and all must hold too.
#![allow(
    unsafe_code,
    reason = "bytes of machine code between two labels of this image"
)]

#[cfg(test)]
mod agreement;
#[cfg(test)]
mod code;
#[cfg(test)]
mod exchange;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod kernel;
#[cfg(test)]
mod syscalls;
