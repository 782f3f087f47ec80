//! Raw disk images that hold an ext4 file system.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::{command, packages};

/// Smallest file system that gets a journal, so that tests exercise one.
const SIZE_MIB_MIN: u64 = 8;

/// `cargo xtask guest disk …`
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The file to make; it must not exist.
    file: PathBuf,
    /// Size in MiB.
    #[arg(long, default_value_t = 32)]
    size_mib: u64,
    /// A folder whose content the file system starts with.
    #[arg(long)]
    from: Option<PathBuf>,
}

/// Makes the image and prints its path.
pub(super) fn make(options: &Options) -> Result<()> {
    if options.size_mib < SIZE_MIB_MIN {
        bail!(
            "--size-mib {}: expected at least {SIZE_MIB_MIN}",
            options.size_mib
        );
    }
    packages::ensure(&["e2fsprogs"])?;
    let file = File::create_new(&options.file)
        .with_context(|| format!("cannot create {}", options.file.display()))?;
    file.set_len(options.size_mib << 20)?;
    let mut mkfs = command::command("mkfs.ext4");
    // Everything is initialised here: a guest must not find work that mkfs put off.
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    if let Some(folder) = &options.from {
        mkfs.arg("-d").arg(folder);
    }
    command::run(mkfs.arg(&options.file))?;
    println!("{}", options.file.display());
    Ok(())
}
