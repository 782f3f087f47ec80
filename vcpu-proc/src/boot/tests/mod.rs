//! Claims about whole loads: what a kernel of each kind finds in memory, and what is refused.

mod bzimage;
mod elf;
mod multiboot;
