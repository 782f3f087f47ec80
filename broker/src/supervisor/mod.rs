//! Watches over the processes of one machine.
//!
//! [`state`] decides, without a clock or a descriptor; [`driver`] tells it what happens and does
//! what it says; [`fault`] puts a death into words.

mod allowance;
pub mod driver;
mod entry;
pub mod fault;
mod relay;
pub mod state;
