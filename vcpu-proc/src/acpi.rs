//! The ACPI tables of the machine.
