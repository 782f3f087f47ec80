//! Scenarios: what is run, what goes wrong in it, and what must hold all the same.

mod check;
mod schema;

pub use check::{ScenarioError, is_possible};
pub use schema::{
    Action, Deed, Disk, DiskPlace, Expect, Family, Fault, Host, Link, Random, Scenario, Step, Vm,
    Who, Work, json_schema,
};
