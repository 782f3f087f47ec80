//! The `bulkhead-fault` program: `bulkhead fault` runs it.

fn main() {}
