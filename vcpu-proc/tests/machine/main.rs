//! The vCPU process as its broker and its legacy process see it, on the real KVM of this host.
//!
//! The process's life runs inside of the test, without walls; this program plays its broker and its
//! legacy process. It needs `/dev/kvm` and fails without.
#![allow(
    unsafe_code,
    reason = "the guests are assembled into this program and copied out of it"
)]

#[cfg(test)]
mod broker;
#[cfg(test)]
mod control;
#[cfg(test)]
mod endings;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod legacy;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod program;
#[cfg(test)]
mod walls;
