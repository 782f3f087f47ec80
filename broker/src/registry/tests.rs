//! Tests of the registry.

use super::*;

fn record(name: &str) -> VmRecord {
    VmRecord {
        name: name.into(),
        id: "0123456789abcdef0123456789abcdef".into(),
        vm_file: "[machine]\n".into(),
        vcpus: 2,
        memory_bytes: 64 << 20,
        autostart: false,
        created_at_ms: 1,
        desired: Desired::Stopped,
        start_with_host: false,
        last: None,
    }
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    (dir, path)
}

#[test]
fn records_survive_a_restart_of_the_daemon() {
    let (_dir, path) = place();
    let registry = Registry::open(&path).unwrap();
    registry.add(&record("web")).unwrap();
    registry.add(&record("db")).unwrap();
    let ended = Ended {
        ending: "killed".into(),
        exit_code: 12,
        message: None,
        at_ms: 7,
    };
    let changed = registry
        .edit("web", |vm| {
            vm.desired = Desired::Running;
            vm.last = Some(ended.clone());
        })
        .unwrap();
    assert_eq!(changed.last, Some(ended));
    drop(registry);
    let all = Registry::open(&path).unwrap().all().unwrap();
    assert_eq!(all, [record("db"), changed]);
}

#[test]
fn machine_is_added_once_and_removed_any_number_of_times() {
    let (_dir, path) = place();
    let registry = Registry::open(&path).unwrap();
    registry.add(&record("web")).unwrap();
    let again = registry.add(&record("web"));
    assert!(matches!(again, Err(RegistryError::Exists(name)) if name == "web"));
    for _ in 0..2 {
        registry.remove("web").unwrap();
    }
    assert_eq!(registry.all().unwrap(), []);
    let gone = registry.edit("web", |_| {});
    assert!(matches!(gone, Err(RegistryError::Missing(name)) if name == "web"));
}

#[test]
fn second_owner_is_refused() {
    let (_dir, path) = place();
    let _first = Registry::open(&path).unwrap();
    let second = Registry::open(&path);
    assert!(matches!(second, Err(RegistryError::InUse(at)) if at == path));
}

#[test]
fn registry_of_a_newer_program_is_refused_and_left_alone() {
    let (_dir, path) = place();
    let newer: &[migrate::Step] = &[|_| Ok(()), |_| Ok(())];
    drop(open(&path, newer).unwrap());
    let before = std::fs::read(&path).unwrap();
    let error = Registry::open(&path).unwrap_err();
    assert!(matches!(error, RegistryError::Version { found: 3, newest } if newest < 3));
    drop(open(&path, newer).unwrap());
    assert_eq!(before.len(), std::fs::read(&path).unwrap().len());
}

/// Puts a mark behind every record's name.
fn mark(transaction: &redb::WriteTransaction) -> Result<(), RegistryError> {
    let mut table = transaction.open_table(VMS)?;
    let Some(value) = table.get("web")?.map(|value| value.value().to_vec()) else {
        return Ok(());
    };
    let mut record = read("web", &value)?;
    record.vm_file.push('#');
    table.insert("web", write(&record)?.as_slice())?;
    Ok(())
}

#[test]
fn each_migration_runs_once_and_in_order() {
    let (_dir, path) = place();
    Registry::open(&path).unwrap().add(&record("web")).unwrap();
    let start = migrate::STEPS.len();
    let mut steps = migrate::STEPS.to_vec();
    steps.push(mark);
    let file = |steps: &[migrate::Step]| {
        let database = open(&path, steps).unwrap();
        let table = database.begin_read().unwrap().open_table(VMS).unwrap();
        let value = table.get("web").unwrap().unwrap();
        read("web", value.value()).unwrap().vm_file
    };
    assert_eq!(file(&steps), "[machine]\n#");
    assert_eq!(file(&steps), "[machine]\n#", "not run again");
    steps.extend([mark as migrate::Step, mark]);
    assert_eq!(file(&steps), "[machine]\n###");
    assert_eq!(steps.len(), start + 3);
}

#[test]
fn migration_that_fails_changes_nothing() {
    let (_dir, path) = place();
    Registry::open(&path).unwrap().add(&record("web")).unwrap();
    let fails: migrate::Step = |transaction| {
        mark(transaction)?;
        Err(RegistryError::Missing("x".into()))
    };
    let mut steps = migrate::STEPS.to_vec();
    steps.push(fails);
    assert!(open(&path, &steps).is_err());
    assert_eq!(
        Registry::open(&path).unwrap().all().unwrap(),
        [record("web")]
    );
}

#[test]
fn damaged_record_is_an_error_that_names_it() {
    let (_dir, path) = place();
    let database = open(&path, migrate::STEPS).unwrap();
    let transaction = database.begin_write().unwrap();
    let mut table = transaction.open_table(VMS).unwrap();
    table.insert("web", &b"{\"name\":"[..]).unwrap();
    drop(table);
    transaction.commit().unwrap();
    drop(database);
    let error = Registry::open(&path)
        .unwrap()
        .all()
        .unwrap_err()
        .to_string();
    assert!(error.contains("record of web"), "{error}");
}

#[test]
fn file_that_is_no_registry_is_an_error() {
    let (_dir, path) = place();
    std::fs::write(&path, vec![7; 1 << 16]).unwrap();
    assert!(Registry::open(&path).is_err());
}

#[test]
fn registry_goes_on_after_a_failed_write() {
    let (_dir, path) = place();
    let registry = Registry::open(&path).unwrap();
    let broken = registry
        .with(|_| -> Result<(), _> { Err(RegistryError::Storage(redb::Error::PreviousIo)) });
    assert!(broken.is_err());
    registry.add(&record("web")).unwrap();
    assert_eq!(registry.all().unwrap().len(), 1);
}
