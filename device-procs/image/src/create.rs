//! New images in empty files.

use crate::extent::Extent;
use crate::{ImageError, ImageFormat, Source};
use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2CreateBuilder;

/// Clusters of new images, as QEMU makes them.
pub const CLUSTER_BYTES: usize = 64 * 1024;

/// Makes `source`, whatever is in it, a qcow2 image of a disk of `bytes` bytes on top of `backing` (its name as it is to be
/// written into the image, and its format). Blocks.
///
/// # Errors
/// [`ImageError`] with the kernel's error, or for a size that the format cannot say.
pub fn create_qcow2(
    source: Source,
    bytes: u64,
    backing: Option<(&str, ImageFormat)>,
) -> Result<(), ImageError> {
    let name = source.name.clone();
    let failed = |e| ImageError::io(&name, e);
    let extent = Extent::blank(source).map_err(failed)?;
    let builder = Qcow2CreateBuilder::<Extent>::new(extent);
    let mut builder = builder.size(bytes).cluster_size(CLUSTER_BYTES);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_string());
    }
    builder.create().map_err(failed)
}
