//! The mappings of a process, from `/proc/PID/maps`: what it can reach without any descriptor.

use serde::Serialize;
use std::fs;
use std::io;

/// A mapping that is shared, executable, or of a file. Private anonymous memory is only summed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// Size in bytes.
    pub bytes: u64,
    /// `r`, `w`, `x` or `-` each.
    pub protection: String,
    /// Whether others see what is written.
    pub shared: bool,
    /// Device number of the file system, as `major:minor` in hexadecimal.
    pub device: String,
    /// Inode; 0 for none.
    pub inode: u64,
    /// The kernel's name of it, such as `/memfd:bulkhead-window (deleted)`; may be empty.
    pub of: String,
}

impl Mapping {
    /// Whether code in it can run.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        self.protection.contains('x')
    }

    /// Whether it can be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.protection.contains('w')
    }
}

/// All mappings of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Private memory without a file, in bytes: heap, stacks, guest memory.
    pub private_bytes: u64,
    /// Everything else.
    pub mappings: Vec<Mapping>,
}

/// Reads the mappings of `pid`.
pub(super) fn measure(pid: i32) -> io::Result<Memory> {
    Ok(parse(&fs::read_to_string(format!("/proc/{pid}/maps"))?))
}

fn parse(text: &str) -> Memory {
    let mut memory = Memory::default();
    for mapping in text.lines().filter_map(line) {
        let plain = mapping.inode == 0 && !mapping.is_executable() && !mapping.shared;
        if plain {
            memory.private_bytes += mapping.bytes;
        } else {
            memory.mappings.push(mapping);
        }
    }
    memory
}

fn line(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let (_offset, device, inode) = (fields.next()?, fields.next()?, fields.next()?);
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some(Mapping {
        bytes: address(end)?.checked_sub(address(start)?)?,
        protection: permissions.get(..3)?.to_owned(),
        shared: permissions.ends_with('s'),
        device: device.to_owned(),
        inode: inode.parse().ok()?,
        of: fields.next().unwrap_or_default().trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_executable_and_file_mappings_are_told_apart_from_plain_memory() {
        let text = "\
7f00-8f00 rw-p 00000000 00:00 0 \n\
a000-b000 rw-s 00000000 00:01 70901                      /memfd:bulkhead-window (deleted)\n\
c000-e000 r-xp 00000000 00:00 0                          [vdso]\n\
f000-f100 rw-p 00000000 00:00 0                          [heap]\n";
        let memory = parse(text);
        assert_eq!(memory.private_bytes, 0x1100);
        let [window, vdso] = &memory.mappings[..] else {
            panic!("{memory:?}");
        };
        assert_eq!(
            (window.bytes, window.inode, window.shared),
            (0x1000, 70901, true)
        );
        assert_eq!(window.of, "/memfd:bulkhead-window (deleted)");
        assert!(vdso.is_executable() && !vdso.is_writable());
    }
}
