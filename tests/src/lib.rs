//! End-to-end tests live in the sub-folders.
