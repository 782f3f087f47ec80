//! Built and fetched artifacts, kept outside the tree and shared by all clones of the repository.
//!
//! An artifact is a folder `<cache>/<name>/<key>`; the key is a hash of everything it was made
//! from, so that a folder that exists is fresh. Folders appear by `rename`, complete or not at all.
//! Several runs may ask at once: they take a lock file for each name, and all but the first find
//! the folder made.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow};

/// How many versions of one artifact stay; other branches may be using all but the newest.
const VERSIONS_KEPT: usize = 8;

/// The hash of everything that an artifact is made from.
pub(crate) struct Key(DefaultHasher);

impl Key {
    /// Starts a key; change `recipe` when the code that makes the artifact changes its result.
    pub(crate) fn new(recipe: &str) -> Self {
        let mut key = Self(DefaultHasher::new());
        key.add(recipe);
        key
    }

    /// Adds one ingredient.
    pub(crate) fn add(&mut self, ingredient: impl AsRef<[u8]>) {
        let bytes = ingredient.as_ref();
        self.0.write_usize(bytes.len());
        self.0.write(bytes);
    }

    /// Adds the content of a file.
    pub(crate) fn add_file(&mut self, path: &Path) -> Result<()> {
        self.add(fs::read(path).with_context(|| format!("cannot read {}", path.display()))?);
        Ok(())
    }

    /// Adds the names and contents of all files below `folder`, in a fixed order.
    pub(crate) fn add_tree(&mut self, folder: &Path) -> Result<()> {
        let listing =
            fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
        let mut entries = listing.collect::<std::io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if entry.file_name() == "target" {
                continue;
            }
            self.add(entry.file_name().as_encoded_bytes());
            if entry.file_type()?.is_dir() {
                self.add_tree(&entry.path())?;
            } else {
                self.add_file(&entry.path())?;
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

/// The folder that all artifacts live in: `$BULKHEAD_CACHE`, `$XDG_CACHE_HOME/bulkhead` or
/// `~/.cache/bulkhead`.
fn directory() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(own) = variable("BULKHEAD_CACHE") {
        return std::path::absolute(own).context("BULKHEAD_CACHE");
    }
    if let Some(xdg) = variable("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(xdg).join("bulkhead"));
    }
    let home = variable("HOME").ok_or_else(|| anyhow!("neither BULKHEAD_CACHE nor HOME is set"))?;
    Ok(PathBuf::from(home).join(".cache/bulkhead"))
}

/// Returns the folder of artifact `name` with `key`, after `build` has filled it when it is missing.
pub(crate) fn artifact(
    name: &str,
    key: &Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    artifact_in(&directory()?, name, key, build)
}

fn artifact_in(
    cache: &Path,
    name: &str,
    key: &Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let versions = cache.join(name);
    let finished = versions.join(key.name());
    if finished.is_dir() {
        // The versions used last are kept longest; a cache that cannot be written serves as well.
        let _ = File::open(&finished).and_then(|folder| folder.set_modified(SystemTime::now()));
        return Ok(finished);
    }
    fs::create_dir_all(&versions)
        .with_context(|| format!("cannot create the cache folder {}", versions.display()))?;
    let lock = File::create(cache.join(format!("{name}.lock")))?;
    if lock.try_lock().is_err() {
        eprintln!("waiting for another run that is making {name}");
        lock.lock()
            .with_context(|| format!("cannot lock the cache of {name}"))?;
    }
    if finished.is_dir() {
        return Ok(finished);
    }
    // Whatever lies there was left by a run that died: nobody else holds the lock.
    let unfinished = versions.join("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    fs::create_dir(&unfinished)?;
    build(&unfinished).with_context(|| format!("cannot make {name}"))?;
    fs::rename(&unfinished, &finished)?;
    forget_old_versions(&versions)?;
    Ok(finished)
}

fn forget_old_versions(versions: &Path) -> Result<()> {
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(versions)? {
        let entry = entry?;
        found.push((entry.metadata()?.modified()?, entry.path()));
    }
    found.sort();
    let surplus = found.len().saturating_sub(VERSIONS_KEPT);
    for (_, path) in found.iter().take(surplus) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(ingredient: &str) -> Key {
        let mut key = Key::new("test");
        key.add(ingredient);
        key
    }

    #[test]
    fn an_artifact_is_built_once_for_each_key() {
        let cache = tempfile::tempdir().unwrap();
        let mut builds = 0;
        for ingredient in ["a", "a", "b", "a", "b"] {
            let folder = artifact_in(cache.path(), "thing", &key(ingredient), |folder| {
                builds += 1;
                Ok(fs::write(folder.join("file"), ingredient)?)
            });
            let content = fs::read_to_string(folder.unwrap().join("file")).unwrap();
            assert_eq!(content, ingredient);
        }
        assert_eq!(builds, 2);
    }

    #[test]
    fn a_failed_build_leaves_no_artifact_and_is_tried_again() {
        let cache = tempfile::tempdir().unwrap();
        let failed = artifact_in(cache.path(), "thing", &key("a"), |folder| {
            fs::write(folder.join("half"), "half")?;
            Err(anyhow!("out of luck"))
        });
        assert!(failed.is_err());
        let folder = artifact_in(cache.path(), "thing", &key("a"), |_| Ok(())).unwrap();
        assert!(!folder.join("half").exists());
    }

    #[test]
    fn simultaneous_runs_build_once() {
        let cache = tempfile::tempdir().unwrap();
        let builds = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    artifact_in(cache.path(), "thing", &key("a"), |_| {
                        builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn ingredients_are_not_confused_by_where_they_end() {
        let (mut one, mut two) = (Key::new("r"), Key::new("r"));
        one.add("ab");
        one.add("c");
        two.add("a");
        two.add("bc");
        assert_ne!(one.name(), two.name());
    }

    #[test]
    fn only_the_newest_versions_stay() {
        let cache = tempfile::tempdir().unwrap();
        for number in 0..VERSIONS_KEPT + 3 {
            artifact_in(cache.path(), "thing", &key(&number.to_string()), |_| Ok(())).unwrap();
        }
        let left = fs::read_dir(cache.path().join("thing")).unwrap().count();
        assert_eq!(left, VERSIONS_KEPT);
    }
}
