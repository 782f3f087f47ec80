//! One virtual machine: what it is ([`spec`]), what its owner says and hears ([`session`]), how it
//! lives ([`state`], which decides, and [`run`], which acts).

pub mod adopt;
mod any_path;
mod boot_files;
mod consoles;
pub mod devices;
mod disk_hold;
mod driver;
mod group_limits;
pub mod home;
mod household;
pub mod keeper;
mod net_spec;
pub mod record;
mod report;
pub mod resources;
pub mod session;
pub mod spec;
pub mod state;
pub mod vsock;

pub use driver::{Over, adopt as take_over, adopt_and_keep, clear, run, run_and_keep};
