//! Images without tables: a list of pieces, each in a file as it is, or nowhere.

use crate::vmdk::{Access, Backing, Descriptor};
use crate::{ImageError, ImageFormat, Layer, Place, name_of};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::Arc;

/// A range of the disk.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// First byte of the disk behind it.
    end: u64,
    bytes: u64,
    place: Place,
}

/// The pieces in the order of the disk, without gaps.
#[derive(Debug)]
pub struct Flat {
    pieces: Vec<Piece>,
    /// Of a raw image, its file.
    files: Vec<Arc<File>>,
}

impl Flat {
    pub(crate) fn open(layer: Layer, writable: bool) -> Result<Self, ImageError> {
        match layer.format {
            ImageFormat::Vmdk => Self::vmdk(layer, writable),
            _ => Self::raw(layer, writable),
        }
    }

    fn raw(layer: Layer, writable: bool) -> Result<Self, ImageError> {
        let mut files = layer.files.into_iter();
        let (Some(source), None) = (files.next(), files.next()) else {
            return Err(ImageError::Field {
                file: "disk".to_owned(),
                field: "extents",
                got: "another number".to_owned(),
                expected: "one file for a raw image".to_owned(),
            });
        };
        // The end of a block device is its size, too.
        let end = source.file.as_ref().seek(SeekFrom::End(0));
        let bytes = end.map_err(|e| ImageError::io(&source.name, e))?;
        let place = Place::File {
            number: source.number,
            at: 0,
            writable,
        };
        Ok(Self {
            pieces: vec![Piece {
                end: bytes,
                bytes,
                place,
            }],
            files: vec![source.file],
        })
    }

    fn vmdk(layer: Layer, writable: bool) -> Result<Self, ImageError> {
        let name = name_of(&layer).to_owned();
        let mut files = layer.files.into_iter();
        let descriptor = files.next().ok_or_else(|| ImageError::Chain {
            file: name.clone(),
            what: "no descriptor file".to_owned(),
        })?;
        let descriptor = Descriptor::read(&descriptor.file, &name)?;
        let mut pieces = Vec::new();
        let mut end = 0u64;
        for extent in &descriptor.extents {
            let bytes = extent.bytes;
            end = end.checked_add(bytes).ok_or_else(|| ImageError::Field {
                file: name.clone(),
                field: "extents",
                got: "more than 2^64 bytes".to_owned(),
                expected: "a disk that has a size".to_owned(),
            })?;
            let place = match &extent.backing {
                Backing::Zero => Place::Zeroes,
                Backing::Flat { name: wanted, at } => {
                    let source = files.next().ok_or_else(|| ImageError::Chain {
                        file: name.clone(),
                        what: format!("its extent {wanted:?} was not given; name it in `extents`"),
                    })?;
                    let has = source.file.as_ref().seek(SeekFrom::End(0));
                    let has = has.map_err(|e| ImageError::io(&source.name, e))?;
                    if at.checked_add(bytes).is_none_or(|needed| needed > has) {
                        return Err(ImageError::Field {
                            file: source.name,
                            field: "size of the extent",
                            got: format!("{has} bytes"),
                            expected: format!("{bytes} bytes from byte {at} on"),
                        });
                    }
                    Place::File {
                        number: source.number,
                        at: *at,
                        writable: writable && extent.access == Access::ReadWrite,
                    }
                }
            };
            if bytes > 0 {
                pieces.push(Piece { end, bytes, place });
            }
        }
        if let Some(source) = files.next() {
            return Err(ImageError::Chain {
                file: name,
                what: format!("{} is no extent of it", source.name),
            });
        }
        Ok(Self {
            pieces,
            files: Vec::new(),
        })
    }

    /// Gives a raw image another size.
    pub(crate) fn resize(&mut self, bytes: u64) -> Result<(), ImageError> {
        let (Some(file), [piece]) = (self.files.first(), self.pieces.as_mut_slice()) else {
            return Err(ImageError::Chain {
                file: "image".to_owned(),
                what: "only raw and qcow2 images are resized; convert it first".to_owned(),
            });
        };
        file.set_len(bytes)
            .map_err(|e| ImageError::io("image", e))?;
        (piece.bytes, piece.end) = (bytes, bytes);
        Ok(())
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    pub(crate) fn locate(&self, at: u64, bytes: u64) -> Option<(Place, u64)> {
        let index = self.pieces.partition_point(|piece| piece.end <= at);
        let piece = self.pieces.get(index)?;
        let inside = at - (piece.end - piece.bytes);
        let place = match piece.place {
            Place::File {
                number,
                at: from,
                writable,
            } => Place::File {
                number,
                at: from + inside,
                writable,
            },
            other => other,
        };
        Some((place, bytes.min(piece.end - at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Image, Source, Use};
    use std::io::Write;

    fn source(number: u32, bytes: &[u8]) -> Source {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Source {
            file: file.into(),
            number,
            name: format!("file-{number}"),
        }
    }

    fn vmdk(text: &str, extents: Vec<Source>) -> Result<Image, ImageError> {
        let mut files = vec![source(0, text.as_bytes())];
        files.extend(extents);
        let layer = Layer {
            format: ImageFormat::Vmdk,
            files,
        };
        Image::open(vec![layer], Use::Write)
    }

    const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                        createType=\"twoGbMaxExtentFlat\"\n";

    #[test]
    fn pieces_of_a_vmdk_are_found_in_their_files() {
        let text = format!("{HEAD}RW 2 FLAT \"a.vmdk\" 1\nRDONLY 1 FLAT \"b.vmdk\" 0\nRW 3 ZERO\n");
        let image = vmdk(&text, vec![source(1, &[1; 2048]), source(2, &[2; 512])]).unwrap();
        assert_eq!(image.bytes(), 6 * 512);
        let file = |number, at, writable| Place::File {
            number,
            at,
            writable,
        };
        assert_eq!(image.locate(0, 9999), Ok((file(1, 512, true), 1024)));
        assert_eq!(image.locate(512, 512), Ok((file(1, 1024, true), 512)));
        assert_eq!(image.locate(1024, 4096), Ok((file(2, 0, false), 512)));
        assert_eq!(image.locate(1536, 4096), Ok((Place::Zeroes, 1536)));
        assert!(image.locate(3072, 1).is_err());
    }

    #[test]
    fn extents_that_are_missing_too_many_or_too_short_are_refused() {
        let text = format!("{HEAD}RW 2 FLAT \"a.vmdk\" 0\n");
        for (extents, wanted) in [
            (vec![], "\"a.vmdk\" was not given"),
            (vec![source(1, &[0; 512])], "got 512 bytes, expected 1024"),
            (
                vec![source(1, &[0; 1024]), source(2, &[0; 512])],
                "file-2 is no extent of it",
            ),
        ] {
            let error = vmdk(&text, extents).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn raw_image_is_one_piece_and_has_no_backing_image() {
        let layer = |number| Layer {
            format: ImageFormat::Raw,
            files: vec![source(number, &[7; 1024])],
        };
        let image = Image::open(vec![layer(5)], Use::Read).unwrap();
        let place = Place::File {
            number: 5,
            at: 100,
            writable: false,
        };
        assert_eq!(image.locate(100, 4096), Ok((place, 924)));
        let error = Image::open(vec![layer(0), layer(1)], Use::Read).unwrap_err();
        assert!(
            error.to_string().contains("has no backing image"),
            "{error}"
        );
        let nothing: Vec<Layer> = Vec::new();
        assert!(Image::open(nothing, Use::Read).is_err());
    }
}
