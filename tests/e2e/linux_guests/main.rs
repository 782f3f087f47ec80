//! What is seen from inside of Linux. Each of these boots a kernel or more, for up to minutes on a host without hardware
//! virtualization: in one program, so that none of them is waited for alone.

mod agent;
mod boot_from_disk;
mod linux;
mod medium;
mod seed;
