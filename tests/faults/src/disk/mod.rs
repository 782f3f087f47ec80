//! The faulty disk: a FUSE file that the harness serves as a machine's image.
