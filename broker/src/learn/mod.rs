//! Which grants a run really uses: `bulkhead policy learn`.
//!
//! A run is started and followed with ptrace from the outside, as a debugger would. Every system call of its
//! sandboxed processes is looked at before the kernel's filters judge it, and matched with the grants of
//! the policy; operations on an io_uring are read from its submission queue when they are handed over.
//! **Nothing is weakened**: the filters are those of every other run and remain in force, there is no
//! permissive mode, and the product has no part in this beyond being watched. What is learnt is
//! therefore always a part of the policy; a call that the filters deny is told as denied.
//!
//! [`tracer`] follows processes, [`auxv`] hides the vDSO from them where that is asked for, [`rings`] reads submission queues, [`write`] prints policies.

mod auxv;
mod rings;
mod sys;
pub mod tracer;
pub mod write;

use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::grant::Grant;
use std::collections::{BTreeMap, BTreeSet};

/// What a run has used of the policies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Learnt {
    /// Used grants by kind. A kind that has not run is missing.
    pub used: BTreeMap<ProcKind, BTreeSet<Grant>>,
    /// System calls that the filters denied: kind, phase, and the call in words.
    pub denied: BTreeSet<(ProcKind, String, String)>,
    /// How the run ended: its exit code, 128 and the signal's number for a signal.
    pub exit_code: i32,
}
