//! Hosts whose KVM is incomplete.
