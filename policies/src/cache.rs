//! Policies and their filters, ready made.
//!
//! Reading and compiling the policies takes longer than everything else that the broker does before
//! the first process is born, so the result is kept in a file of the broker's own cache directory.
//! The name of the file holds a hash of everything that the result depends on; a file that is
//! missing, malformed or belongs to somebody else is made again. Losing the cache costs time only.

use crate::check::PolicyError;
use crate::compile::{CompileError, Filters, compile};
use crate::plan::Policy;
use crate::{built_in, load, overrides};
use bulkhead_ipc::ident::ProcKind;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Largest cache file in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Changes with the format of the file.
const FORMAT: u32 = 2;

/// The policies of all kinds, with their filters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    entries: Vec<(Policy, Filters)>,
}

/// Why there are no policies.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file breaks a rule.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A filter does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

impl Compiled {
    /// Reads and compiles every policy.
    ///
    /// # Errors
    /// The first fault.
    pub fn fresh(directory: Option<&Path>, allow_looser: bool) -> Result<Self, LoadError> {
        let mut entries = Vec::with_capacity(ProcKind::ALL.len());
        for kind in ProcKind::ALL {
            let policy = load(kind, directory, allow_looser)?;
            let filters = compile(&policy)?;
            entries.push((policy, filters));
        }
        Ok(Self { entries })
    }

    /// As [`Compiled::fresh`], from the file in `cache` when it is there.
    ///
    /// # Errors
    /// As [`Compiled::fresh`]; trouble with the cache is none.
    pub fn cached(
        directory: Option<&Path>,
        allow_looser: bool,
        cache: &Path,
    ) -> Result<Self, LoadError> {
        let mut hasher = DefaultHasher::new();
        (FORMAT, env!("CARGO_PKG_VERSION"), allow_looser).hash(&mut hasher);
        for kind in ProcKind::ALL {
            built_in(kind).hash(&mut hasher);
            overrides::read(kind, directory)?.hash(&mut hasher);
        }
        let file = cache.join(format!("policies-{:016x}", hasher.finish()));
        if let Some(found) = read(&file) {
            return Ok(found);
        }
        let made = Self::fresh(directory, allow_looser)?;
        // Not being able to keep it costs the next start a few milliseconds.
        let _kept = write(cache, &file, &made);
        Ok(made)
    }

    /// The policy and filters of `kind`.
    #[must_use]
    pub fn get(&self, kind: ProcKind) -> Option<(&Policy, &Filters)> {
        self.entries
            .iter()
            .find(|(policy, _)| policy.kind == kind)
            .map(|(policy, filters)| (policy, filters))
    }
}

fn read(path: &Path) -> Option<Compiled> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .ok()?;
    let about = file.metadata().ok()?;
    // Only what this user wrote, and nobody else could have changed, is a policy.
    let mine = about.uid() == std::fs::metadata("/proc/self").ok()?.uid();
    if !mine || about.mode() & 0o022 != 0 || !about.is_file() || about.len() > FILE_BYTES_MAX {
        return None;
    }
    let mut bytes = Vec::with_capacity(usize::try_from(about.len()).ok()?);
    file.read_to_end(&mut bytes).ok()?;
    let compiled: Compiled = postcard::from_bytes(&bytes).ok()?;
    let whole = ProcKind::ALL
        .iter()
        .all(|&kind| compiled.get(kind).is_some());
    whole.then_some(compiled)
}

fn write(directory: &Path, path: &Path, compiled: &Compiled) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let bytes = postcard::to_stdvec(compiled).map_err(std::io::Error::other)?;
    let partial = path.with_extension(format!("{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)?;
    let done = file
        .write_all(&bytes)
        .and_then(|()| std::fs::rename(&partial, path));
    if done.is_err() {
        std::fs::remove_file(&partial)?;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_policies_equal_fresh_ones_and_damage_is_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = Compiled::fresh(None, false).unwrap();
        assert_eq!(Compiled::cached(None, false, dir.path()).unwrap(), fresh);
        assert_eq!(Compiled::cached(None, false, dir.path()).unwrap(), fresh);
        let file = std::fs::read_dir(dir.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        assert_eq!(read(&file).unwrap(), fresh);
        std::fs::write(&file, b"garbage").unwrap();
        assert!(read(&file).is_none());
        assert_eq!(Compiled::cached(None, false, dir.path()).unwrap(), fresh);
        assert_eq!(read(&file).unwrap(), fresh);
    }

    #[test]
    fn file_that_others_can_write_is_not_believed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        Compiled::cached(None, false, dir.path()).unwrap();
        let file = std::fs::read_dir(dir.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(read(&file).is_none());
    }
}
