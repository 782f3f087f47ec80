//! Faults that a guest sees directly: the place of NMIs and steps of its clock, made in the vCPU
//! process by ptrace (`bulkhead::authority::guided`).
