//! Another backing image in the header of a qcow2 image. The rest of the header stays as it is.

use crate::ImageError;
use crate::header::{EXTENSION_BACKING_FORMAT, Header, read_at};
use crate::offline::write_all;
use bulkhead_ipc::protocol::birth::ImageFormat;
use std::fs::File;

/// Longest name.
const NAME_BYTES_MAX: usize = 1023;
const V2_BYTES: usize = 72;

/// The first cluster of an image with another backing image, or none.
///
/// # Errors
/// [`ImageError`] when the name does not fit.
pub(crate) fn renamed(
    first_cluster: &[u8],
    onto: Option<(&str, ImageFormat)>,
    file: &str,
) -> Result<Vec<u8>, ImageError> {
    let header = Header::parse(first_cluster, file)?;
    let too_long = || ImageError::Field {
        file: file.to_owned(),
        field: "backing image",
        got: "a name that does not fit the header".to_owned(),
        expected: "a shorter one".to_owned(),
    };
    let word = |at: usize| {
        let bytes = first_cluster
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok());
        u32::from_be_bytes(bytes.unwrap_or_default()) as usize
    };
    let header_bytes = if header.version == 2 {
        V2_BYTES
    } else {
        word(100)
    };
    let fixed = first_cluster.get(..header_bytes).ok_or_else(too_long)?;
    let mut made = fixed.to_vec();
    let mut at = header_bytes;
    while let Some(head) = first_cluster.get(at..at + 8)
        && word(at) != 0
    {
        let len = word(at + 4).next_multiple_of(8);
        let data = first_cluster
            .get(at + 8..at + 8 + len)
            .ok_or_else(too_long)?;
        if u32::try_from(word(at)) != Ok(EXTENSION_BACKING_FORMAT) {
            made.extend(head);
            made.extend(data);
        }
        at += 8 + len;
    }
    let mut place = [0; 12];
    if let Some((name, format)) = onto {
        if name.len() > NAME_BYTES_MAX {
            return Err(too_long());
        }
        let format = format.to_string();
        made.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
        made.extend(u32::try_from(format.len()).unwrap_or(0).to_be_bytes());
        made.extend(format.as_bytes());
        made.resize(made.len().next_multiple_of(8), 0);
        made.extend([0; 8]);
        let (from, len) = (made.len() as u64, u32::try_from(name.len()).unwrap_or(0));
        place[..8].copy_from_slice(&from.to_be_bytes());
        place[8..].copy_from_slice(&len.to_be_bytes());
        made.extend(name.as_bytes());
    }
    if let Some(field) = made.get_mut(8..20) {
        field.copy_from_slice(&place);
    }
    if made.len() > first_cluster.len() {
        return Err(too_long());
    }
    made.resize(first_cluster.len(), 0);
    Ok(made)
}

/// Changes the name in `file`.
///
/// # Errors
/// As [`renamed`], or the kernel's.
pub(crate) fn rename(
    file: &File,
    onto: Option<(&str, ImageFormat)>,
    name: &str,
) -> Result<(), ImageError> {
    let header = Header::read(file, name)?;
    let mut cluster = vec![0; usize::try_from(header.cluster_bytes).unwrap_or(0)];
    let failed = |e| ImageError::io(name, std::io::Error::from(e));
    read_at(file, 0, &mut cluster).map_err(failed)?;
    write_all(file, 0, &renamed(&cluster, onto, name)?).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Version 3, clusters of 64 KiB, an extension of somebody else's.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
        bytes[96..100].copy_from_slice(&4u32.to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        bytes[104..112].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 4]);
        bytes[112..116].copy_from_slice(b"name");
        bytes
    }

    #[test]
    fn name_is_put_changed_and_taken_away() {
        let first = renamed(&image(), Some(("base.img", ImageFormat::Raw)), "x").unwrap();
        let header = Header::parse(&first, "x").unwrap();
        assert_eq!(header.backing.as_deref(), Some("base.img"));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        let longer = "a".repeat(1000);
        let second = renamed(&first, Some((&longer, ImageFormat::Qcow2)), "x").unwrap();
        let header = Header::parse(&second, "x").unwrap();
        assert_eq!(header.backing, Some(longer));
        assert_eq!(header.backing_format.as_deref(), Some("qcow2"));
        let third = renamed(&second, None, "x").unwrap();
        assert_eq!(Header::parse(&third, "x").unwrap().backing, None);
        assert!(third == image());
        assert!(renamed(&image(), Some((&"a".repeat(1024), ImageFormat::Raw)), "x").is_err());
    }

    proptest! {
        #[test]
        fn any_header_is_changed_or_refused(patch in prop::collection::vec((0usize..200, any::<u8>()), 0..10)) {
            let mut bytes = image();
            for (at, byte) in patch {
                bytes[at] = byte;
            }
            bytes.truncate(512);
            let _either = renamed(&bytes, Some(("b", ImageFormat::Raw)), "x");
        }
    }
}
