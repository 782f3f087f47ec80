//! Which virtual networks there are.

use super::{Registry, RegistryError};
use crate::network::spec::NetworkSpec;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// Name to [`NetworkRecord`] as JSON.
const NETWORKS: TableDefinition<&str, &[u8]> = TableDefinition::new("networks");

/// A network that somebody has created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// What it was told to be; its name is the key.
    pub spec: NetworkSpec,
    /// When it was created, in milliseconds since 1970.
    pub created_at_ms: u64,
}

/// Makes the table if it is not there: programs before it did not have it, and do not mind.
pub(super) fn make(transaction: &WriteTransaction) -> Result<(), RegistryError> {
    transaction.open_table(NETWORKS)?;
    Ok(())
}

fn fault(name: &str) -> impl FnOnce(serde_json::Error) -> RegistryError {
    let name = format!("network {name}");
    move |cause| RegistryError::Record { name, cause }
}

impl Registry {
    /// Every network, by name.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub fn networks(&self) -> Result<Vec<NetworkRecord>, RegistryError> {
        self.with(|database: &Database| {
            let table = database.begin_read()?.open_table(NETWORKS)?;
            let mut records = Vec::new();
            for entry in table.iter()? {
                let (name, value) = entry?;
                let record = serde_json::from_slice(value.value());
                records.push(record.map_err(fault(name.value()))?);
            }
            Ok(records)
        })
    }

    /// Adds a network.
    ///
    /// # Errors
    /// [`RegistryError::NetworkExists`], or the disk's.
    pub fn add_network(&self, record: &NetworkRecord) -> Result<(), RegistryError> {
        let name = record.spec.name.as_str();
        let value = serde_json::to_vec(record).map_err(fault(name))?;
        self.with(|database| {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(NETWORKS)?;
                if table.get(name)?.is_some() {
                    return Err(RegistryError::NetworkExists(name.to_owned()));
                }
                table.insert(name, value.as_slice())?;
            }
            transaction.commit()?;
            Ok(())
        })
    }

    /// Forgets a network. One that is not there is forgotten already.
    ///
    /// # Errors
    /// The disk's.
    pub fn remove_network(&self, name: &str) -> Result<(), RegistryError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            transaction.open_table(NETWORKS)?.remove(name)?;
            transaction.commit()?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_outlive_the_daemon_until_they_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let record = |name: &str| NetworkRecord {
            spec: NetworkSpec::new(name),
            created_at_ms: 7,
        };
        {
            let registry = Registry::open(&path).unwrap();
            assert_eq!(registry.networks().unwrap(), []);
            registry.add_network(&record("lab")).unwrap();
            registry.add_network(&record("dmz")).unwrap();
            let twice = registry.add_network(&record("lab"));
            assert!(matches!(twice, Err(RegistryError::NetworkExists(_))));
        }
        let registry = Registry::open(&path).unwrap();
        assert_eq!(registry.networks().unwrap(), [record("dmz"), record("lab")]);
        registry.remove_network("lab").unwrap();
        registry.remove_network("lab").unwrap();
        assert_eq!(registry.networks().unwrap(), [record("dmz")]);
        assert_eq!(registry.all().unwrap(), []);
    }
}
