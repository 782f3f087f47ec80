//! The vCPU group process.
