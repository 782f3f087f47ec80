//! Descriptors of flat VMDK images: a text file that lists the disk's pieces (VMware, "Virtual Disk
//! Format 5.0"). What is sparse or has a parent is converted with `bulkhead image convert` first.

use crate::ImageError;
use nix::errno::Errno;
use nix::sys::uio::pread;
use std::fmt::Write as _;
use std::fs::File;

/// Largest descriptor in bytes.
const DESCRIPTOR_BYTES_MAX: usize = 64 * 1024;
/// Most extents.
const EXTENTS_MAX: usize = 31;
/// Unit of sizes and offsets.
const SECTOR_BYTES: u64 = 512;

/// What may be done with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// RW.
    ReadWrite,
    /// RDONLY.
    ReadOnly,
}

/// Where an extent's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// In a file as they are.
    Flat {
        /// What the descriptor calls it.
        name: String,
        /// First byte of it there.
        at: u64,
    },
    /// Nowhere: zeroes.
    Zero,
}

/// A piece of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// What may be done with it.
    pub access: Access,
    /// Its length.
    pub bytes: u64,
    /// Where it is.
    pub backing: Backing,
}

/// A descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// `createType`.
    pub create_type: String,
    /// The pieces, in order.
    pub extents: Vec<Extent>,
}

impl Descriptor {
    /// Reads the descriptor file `file`.
    ///
    /// # Errors
    /// [`ImageError`] names the line.
    pub fn read(file: &File, name: &str) -> Result<Self, ImageError> {
        let mut bytes = vec![0; DESCRIPTOR_BYTES_MAX + 1];
        let mut has = 0;
        while let Some(rest) = bytes.get_mut(has..)
            && !rest.is_empty()
        {
            match pread(file, rest, i64::try_from(has).unwrap_or(i64::MAX)) {
                Ok(0) => break,
                Ok(n) => has += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(ImageError::io(name, errno)),
            }
        }
        bytes.truncate(has);
        Self::parse(&bytes, name)
    }

    /// Reads a descriptor.
    ///
    /// # Errors
    /// As [`Descriptor::read`].
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        let field = |field, got: &str, expected: &str| ImageError::Field {
            file: name.to_owned(),
            field,
            got: got.escape_debug().take(80).collect(),
            expected: expected.to_owned(),
        };
        if bytes.len() > DESCRIPTOR_BYTES_MAX {
            return Err(field(
                "descriptor",
                "a longer file",
                "at most 64 KiB of text",
            ));
        }
        if bytes.starts_with(b"KDMV") || bytes.starts_with(b"COWD") {
            return Err(field(
                "descriptor",
                "a sparse VMDK image",
                "the text file of a flat one; convert it with `bulkhead image convert` first",
            ));
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|_| field("descriptor", "bytes that are no text", "UTF-8"))?;
        let (mut create_type, mut extents, mut seen) = (None, Vec::new(), false);
        for line in text.lines().map(str::trim) {
            if line.starts_with('#') {
                seen |= line.eq_ignore_ascii_case("# Disk DescriptorFile");
                continue;
            }
            let word = line.split_whitespace().next().unwrap_or_default();
            if matches!(word, "RW" | "RDONLY" | "NOACCESS") {
                if extents.len() == EXTENTS_MAX {
                    return Err(field("extents", "more", "at most 31"));
                }
                extents.push(extent(line).ok_or_else(|| {
                    let form = "`RW SECTORS FLAT \"NAME\" SECTOR`, RDONLY for RW, ZERO for FLAT";
                    field("extent", line, form)
                })?);
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            let value = value.trim().trim_matches('"');
            match key.trim() {
                "version" if !matches!(value, "1" | "2" | "3") => {
                    return Err(field("version", value, "1 to 3"));
                }
                "parentCID" if !value.eq_ignore_ascii_case("ffffffff") => {
                    return Err(field(
                        "parentCID",
                        value,
                        "ffffffff: an image without a parent",
                    ));
                }
                "parentFileNameHint" => {
                    return Err(field(
                        "parentFileNameHint",
                        value,
                        "an image without a parent",
                    ));
                }
                "createType" => create_type = Some(value.to_owned()),
                _ => {}
            }
        }
        if !seen {
            return Err(field("first line", "another", "# Disk DescriptorFile"));
        }
        let create_type = create_type.ok_or_else(|| field("createType", "none", "one"))?;
        if extents.is_empty() {
            return Err(field("extents", "none", "at least one"));
        }
        Ok(Self {
            create_type,
            extents,
        })
    }

    /// The descriptor of a disk of `bytes` bytes in the one file `extent`.
    #[must_use]
    pub fn monolithic(extent: &str, bytes: u64, cid: u32) -> String {
        let sectors = bytes / SECTOR_BYTES;
        let mut text = format!(
            "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n\n# Extent description\n"
        );
        let _infallible = writeln!(text, "RW {sectors} FLAT \"{extent}\" 0\n");
        let cylinders = (sectors / (255 * 63)).max(1);
        let _infallible = write!(
            text,
            "# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n\
             ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"255\"\n\
             ddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
        );
        text
    }

    /// The names of its files, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.extents
            .iter()
            .filter_map(|extent| match &extent.backing {
                Backing::Flat { name, .. } => Some(name.as_str()),
                Backing::Zero => None,
            })
    }
}

/// `RW 4192256 FLAT "name.vmdk" 0`
fn extent(line: &str) -> Option<Extent> {
    let (access, rest) = line.split_once(char::is_whitespace)?;
    let access = match access {
        "RW" => Access::ReadWrite,
        "RDONLY" => Access::ReadOnly,
        _ => return None,
    };
    let (sectors, rest) = split(rest)?;
    let bytes = sectors.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)?;
    let (kind, rest) = split(rest).unwrap_or((rest.trim(), ""));
    let backing = match kind {
        "ZERO" if rest.trim().is_empty() => Backing::Zero,
        "FLAT" | "VMFS" => {
            let (name, rest) = rest.trim_start().strip_prefix('"')?.split_once('"')?;
            let at = match rest.trim() {
                // VMFS extents may leave it out.
                "" if kind == "VMFS" => 0,
                sector => sector.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)?,
            };
            if name.is_empty() {
                return None;
            }
            Backing::Flat {
                name: name.to_owned(),
                at,
            }
        }
        _ => return None,
    };
    Some(Extent {
        access,
        bytes,
        backing,
    })
}

fn split(text: &str) -> Option<(&str, &str)> {
    text.trim_start().split_once(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn own_descriptor_is_read_back() {
        let text = Descriptor::monolithic("disk-flat.vmdk", 1 << 20, 7);
        let read = Descriptor::parse(text.as_bytes(), "disk.vmdk").unwrap();
        assert_eq!(read.create_type, "monolithicFlat");
        assert_eq!(read.names().collect::<Vec<_>>(), ["disk-flat.vmdk"]);
        assert_eq!(read.extents[0].bytes, 1 << 20);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let head = "# Disk DescriptorFile\nversion=1\ncreateType=\"x\"\n";
        for (text, wanted) in [
            ("KDMV\u{1}", "convert it with"),
            ("version=1", "first line"),
            (
                "# Disk DescriptorFile\nRW 1 ZERO\n",
                "createType: got none, expected one",
            ),
            (head, "extents: got none"),
            (&format!("{head}version=9"), "version: got 9"),
            (&format!("{head}RW x FLAT \"a\" 0"), "extent: got RW x FLAT"),
            (
                &format!("{head}RW 1 SPARSE \"a\""),
                "extent: got RW 1 SPARSE",
            ),
            (
                &format!("{head}RW 36893488147419103 FLAT \"a\" 0"),
                "extent",
            ),
            (&format!("{head}parentCID=00000001"), "parentCID"),
            (
                &format!("{head}parentFileNameHint=\"/etc/shadow\""),
                "parent",
            ),
        ] {
            let error = Descriptor::parse(text.as_bytes(), "d.vmdk").unwrap_err();
            assert!(error.to_string().contains(wanted), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _either = Descriptor::parse(&bytes, "d");
        }

        #[test]
        fn any_extent_line_is_read_or_refused(line in "(RW|RDONLY) [0-9]{1,20} (FLAT|ZERO|VMFS)( \"[a-z\"/.]{0,8}\"( [0-9]{0,20})?)?") {
            let text = format!("# Disk DescriptorFile\ncreateType=x\n{line}\n");
            let _either = Descriptor::parse(text.as_bytes(), "d");
        }
    }
}
