//! The registry: which machines and networks there are and what they are wanted to do, in one file that survives
//! crashes and full disks.
//!
//! Each change is one transaction that is on disk when the call returns; a change that fails has
//! not happened. Facts about living processes are *not* here but in the runtime directory, which
//! the host's next start empties. `docs/registry.md` describes the tables.
//!
//! Calls block on the disk for milliseconds; the daemon makes them on a thread that may.

mod migrate;
mod networks;
mod record;
#[cfg(test)]
mod tests;

pub use networks::NetworkRecord;
pub use record::{Desired, Ended, VmRecord};

use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// File name in the state directory.
pub const FILE_NAME: &str = "registry.redb";
/// Most bytes of the file that are kept in memory.
const CACHE_BYTES: usize = 256 << 10;

/// Facts about the registry itself.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Key of the schema's version in [`META`].
const VERSION_KEY: &str = "schema_version";
/// Name to [`VmRecord`] as JSON.
const VMS: TableDefinition<&str, &[u8]> = TableDefinition::new("vms");

/// Why the registry could not be read or written. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Another program has it.
    #[error("the registry {0} is in use by another bulkhead serve")]
    InUse(PathBuf),
    /// A newer program wrote it.
    #[error(
        "the registry has schema version {found}, and this program knows versions up to {newest}"
    )]
    Version {
        /// Its version.
        found: u64,
        /// The newest known one.
        newest: u64,
    },
    /// A record cannot be read.
    #[error("the registry's record of {name} cannot be read: {cause}")]
    Record {
        /// Whose.
        name: String,
        /// Why.
        cause: serde_json::Error,
    },
    /// There is a machine of that name.
    #[error("there is a machine {0} already")]
    Exists(String),
    /// There is a network of that name.
    #[error("there is a network {0} already")]
    NetworkExists(String),
    /// There is no machine of that name.
    #[error("there is no machine {0}")]
    Missing(String),
    /// The file could not be read or written; the disk may be full.
    #[error("the registry cannot be read or written: {0}")]
    Storage(#[from] redb::Error),
}

/// Every error of the database that has no meaning of its own here.
macro_rules! storage {
    ($($error:ty),*) => {$(
        impl From<$error> for RegistryError {
            fn from(error: $error) -> Self {
                Self::Storage(error.into())
            }
        }
    )*};
}
storage!(
    StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError
);

impl RegistryError {
    /// Whether the database refuses everything until it is opened again.
    const fn is_broken(&self) -> bool {
        matches!(
            self,
            Self::Storage(redb::Error::Io(_) | redb::Error::PreviousIo)
        )
    }
}

/// The open registry.
#[derive(Debug)]
pub struct Registry {
    path: PathBuf,
    database: Mutex<Option<Database>>,
}

impl Registry {
    /// Opens or makes the registry at `path` and brings it to the present schema.
    ///
    /// # Errors
    /// When another program has it, a newer one wrote it, or the disk refuses.
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        Ok(Self {
            database: Mutex::new(Some(open(path, migrate::STEPS)?)),
            path: path.to_owned(),
        })
    }

    /// Does `work` with the database. One that an I/O error has broken is closed, and opened again
    /// for the next call: a disk that was full may have room again.
    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut place = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match place.take() {
            Some(database) => database,
            None => open(&self.path, migrate::STEPS)?,
        };
        let done = work(&database);
        if !done.as_ref().is_err_and(RegistryError::is_broken) {
            *place = Some(database);
        }
        done
    }

    /// Every machine, by name.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub fn all(&self) -> Result<Vec<VmRecord>, RegistryError> {
        self.with(|database| {
            let table = database.begin_read()?.open_table(VMS)?;
            let mut records = Vec::new();
            for entry in table.iter()? {
                let (name, value) = entry?;
                records.push(read(name.value(), value.value())?);
            }
            Ok(records)
        })
    }

    /// Adds a machine.
    ///
    /// # Errors
    /// [`RegistryError::Exists`], or the disk's.
    pub fn add(&self, record: &VmRecord) -> Result<(), RegistryError> {
        self.change(&record.name, |old| match old {
            Some(_) => Err(RegistryError::Exists(record.name.clone())),
            None => Ok(Some(record.clone())),
        })
        .map(drop)
    }

    /// Changes a machine's record by `edit`, and returns it.
    ///
    /// # Errors
    /// [`RegistryError::Missing`], or the disk's.
    pub fn edit(
        &self,
        name: &str,
        edit: impl FnOnce(&mut VmRecord),
    ) -> Result<VmRecord, RegistryError> {
        let missing = || RegistryError::Missing(name.to_owned());
        let new = self.change(name, |old| {
            let mut record = old.ok_or_else(missing)?;
            edit(&mut record);
            Ok(Some(record))
        })?;
        new.ok_or_else(missing)
    }

    /// Forgets a machine. One that is not there is forgotten already.
    ///
    /// # Errors
    /// The disk's.
    pub fn remove(&self, name: &str) -> Result<(), RegistryError> {
        self.change(name, |_| Ok(None)).map(drop)
    }

    /// One transaction on one record: `None` is no record.
    fn change(
        &self,
        name: &str,
        change: impl FnOnce(Option<VmRecord>) -> Result<Option<VmRecord>, RegistryError>,
    ) -> Result<Option<VmRecord>, RegistryError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            let new = {
                let mut table = transaction.open_table(VMS)?;
                let old = match table.get(name)? {
                    Some(value) => Some(read(name, value.value())?),
                    None => None,
                };
                let new = change(old)?;
                match &new {
                    Some(record) => {
                        let value = write(record)?;
                        table.insert(name, value.as_slice())?;
                    }
                    None => {
                        table.remove(name)?;
                    }
                }
                new
            };
            transaction.commit()?;
            Ok(new)
        })
    }
}

fn open(path: &Path, steps: &[migrate::Step]) -> Result<Database, RegistryError> {
    let opened = redb::Builder::new()
        .set_cache_size(CACHE_BYTES)
        .create(path);
    let database = opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => RegistryError::InUse(path.to_owned()),
        other => RegistryError::Storage(other.into()),
    })?;
    let transaction = database.begin_write()?;
    migrate::migrate(&transaction, steps)?;
    transaction.open_table(VMS)?;
    networks::make(&transaction)?;
    transaction.commit()?;
    Ok(database)
}

fn read(name: &str, value: &[u8]) -> Result<VmRecord, RegistryError> {
    serde_json::from_slice(value).map_err(|cause| RegistryError::Record {
        name: name.to_owned(),
        cause,
    })
}

fn write(record: &VmRecord) -> Result<Vec<u8>, RegistryError> {
    serde_json::to_vec(record).map_err(|cause| RegistryError::Record {
        name: record.name.clone(),
        cause,
    })
}
