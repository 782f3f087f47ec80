//! Scenarios: what is run, what goes wrong in it, and what must hold all the same.

mod check;
mod schema;

pub use check::ScenarioError;
pub use schema::{
    Action, Deed, Disk, DiskPlace, Expect, Family, Fault, Host, Random, Scenario, Step, Vm, Who,
    Work, json_schema,
};
