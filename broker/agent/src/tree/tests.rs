//! Trees that are honest, and trees that are not.

use super::*;
use bulkhead_ipc::protocol::agent::{Copied, DEPTH_MAX};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

fn file(name: &str, bytes: u64) -> Entry {
    Entry::File {
        name: name.into(),
        mode: 0o640,
        bytes: Some(bytes),
    }
}

fn folder(name: &str) -> Entry {
    Entry::Folder {
        name: name.into(),
        mode: 0o750,
    }
}

fn plant(path: &Path, entries: impl IntoIterator<Item = Entry>) -> Result<Copied, TreeError> {
    let mut plant = Plant::new(path, b"copy", Limits::default())?;
    for entry in entries {
        plant.add(entry)?;
    }
    plant.finish()
}

fn copy(from: &Path, to: &Path) -> Result<Copied, TreeError> {
    let mut walk = Walk::new(from, true)?;
    plant(to, std::iter::from_fn(|| walk.next_entry().unwrap()))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_tree_arrives_as_it_is_and_links_stay_behind() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir_all(from.join("a/b")).unwrap();
    fs::write(from.join("a/large"), vec![7; 100_000]).unwrap();
    fs::write(from.join("empty"), b"").unwrap();
    fs::write(from.join("a/b/run"), b"#!").unwrap();
    fs::set_permissions(from.join("a/b/run"), fs::Permissions::from_mode(0o4755)).unwrap();
    symlink("/etc/passwd", from.join("link")).unwrap();
    let to = dir.path().join("to");
    let copied = copy(&from, &to).unwrap();
    let expected = Copied {
        files: 3,
        folders: 3,
        bytes: 100_002,
        skipped: 1,
    };
    assert_eq!(copied, expected);
    assert_eq!(names(&to), ["a", "empty"]);
    assert_eq!(fs::read(to.join("a/large")).unwrap(), vec![7; 100_000]);
    let mode = fs::metadata(to.join("a/b/run")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o7777, 0o755, "no set-user-id bit");
    // Into a folder that exists, under the name that was given.
    copy(&from, &to).unwrap();
    assert_eq!(names(&to), ["a", "copy", "empty"]);
}

#[test]
fn files_that_say_no_size_are_read_to_their_end() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("version");
    copy(Path::new("/proc/version"), &to).unwrap();
    assert_eq!(fs::read(to).unwrap(), fs::read("/proc/version").unwrap());
}

#[test]
fn what_is_neither_file_nor_folder_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Walk::new(&fifo, true), Err(TreeError::Special(_))));
    let copied = copy(dir.path(), &dir.path().join("../copy-of-fifo"));
    let _removed = fs::remove_dir_all(dir.path().join("../copy-of-fifo"));
    assert_eq!(copied.unwrap().skipped, 1);
}

#[test]
fn a_folder_is_not_copied_by_accident() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Walk::new(dir.path(), false),
        Err(TreeError::Folder(_))
    ));
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let long = "x".repeat(256);
    for name in ["..", ".", "", "/etc/cron.d/x", "a/b", "../x", "a\0b", &long] {
        for entry in [folder(name), file(name, 0)] {
            let dir = tempfile::tempdir().unwrap();
            let inside = dir.path().join("inside");
            let error = plant(&inside, [folder("x"), entry]).unwrap_err();
            assert!(matches!(error, TreeError::Name(_)), "{name:?}: {error}");
            assert_eq!(names(dir.path()), ["inside"]);
            assert!(names(&inside).is_empty());
        }
    }
}

#[test]
fn the_first_name_is_ours_whatever_the_other_side_calls_it() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    plant(&to, [file("../../evil", 0), Entry::FileEnd]).unwrap();
    assert_eq!(names(dir.path()), ["to"]);
}

#[test]
fn links_in_the_destination_are_replaced_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
    fs::create_dir_all(to.join("copy")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), b"kept").unwrap();
    symlink(&outside, to.join("copy/folder")).unwrap();
    symlink(outside.join("file"), to.join("copy/file")).unwrap();
    let through = [
        folder("x"),
        folder("folder"),
        file("evil", 0),
        Entry::FileEnd,
    ];
    assert!(matches!(plant(&to, through), Err(TreeError::Os { .. })));
    let data = Entry::Data(b"evil".to_vec());
    let over = [
        folder("x"),
        file("file", 4),
        data,
        Entry::FileEnd,
        Entry::Leave,
    ];
    plant(&to, over).unwrap();
    assert_eq!(names(&outside), ["file"]);
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"kept");
    let replaced = fs::symlink_metadata(to.join("copy/file")).unwrap();
    assert!(replaced.is_file());
}

#[test]
fn a_file_that_is_not_complete_never_has_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    fs::write(&to, b"old").unwrap();
    let data = || Entry::Data(vec![1; 10]);
    for entries in [
        vec![file("x", 20), data()],
        vec![file("x", 20), data(), Entry::FileEnd],
        vec![file("x", 5), data()],
        vec![file("x", 10), data(), data()],
    ] {
        plant(&to, entries).unwrap_err();
        assert_eq!(names(dir.path()), ["to"]);
        assert_eq!(fs::read(&to).unwrap(), b"old");
    }
}

#[test]
fn nobody_sends_more_than_the_limits() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        entries: 3,
        bytes: 10,
    };
    let new = |name: &str| Plant::new(&dir.path().join(name), b"x", limits).unwrap();
    let mut many = new("many");
    many.add(folder("x")).unwrap();
    for _ in 0..2 {
        many.add(folder("y")).unwrap();
        many.add(Entry::Leave).unwrap();
    }
    assert!(matches!(many.add(folder("z")), Err(TreeError::Many(3))));
    assert!(matches!(
        new("a").add(file("x", 11)),
        Err(TreeError::Large(10))
    ));
    let mut quiet = new("quiet");
    let name = b"x".to_vec();
    let unsized_file = Entry::File {
        name,
        mode: 0,
        bytes: None,
    };
    quiet.add(unsized_file).unwrap();
    let error = quiet.add(Entry::Data(vec![0; 11])).unwrap_err();
    assert!(matches!(error, TreeError::Large(10)));
    let deep = (0..=DEPTH_MAX).map(|_| folder("d"));
    assert!(matches!(
        plant(&dir.path().join("deep"), deep),
        Err(TreeError::Deep(_))
    ));
}

#[test]
fn entries_in_no_order_are_refused() {
    let data = || Entry::Data(vec![1]);
    for entries in [
        vec![],
        vec![Entry::Leave],
        vec![Entry::FileEnd],
        vec![data()],
        vec![file("a", 0), file("b", 0)],
        vec![file("a", 0), Entry::FileEnd, file("b", 0)],
        vec![folder("a")],
        vec![folder("a"), Entry::Leave, Entry::Leave],
        vec![folder("a"), file("b", 1), Entry::Leave],
        vec![file("a", 1), Entry::Data(vec![])],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let error = plant(&dir.path().join("to"), entries).unwrap_err();
        assert!(matches!(error, TreeError::Order(_)), "{error}");
    }
}

fn entries() -> impl Strategy<Value = Entry> {
    let name = prop_oneof![
        "[abc.]{0,3}".prop_map(String::into_bytes),
        Just(b"link".to_vec()),
        Just(b"a/../b".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..6),
    ];
    prop_oneof![
        (name.clone(), any::<u32>()).prop_map(|(name, mode)| Entry::Folder { name, mode }),
        Just(Entry::Leave),
        (name.clone(), any::<u32>(), proptest::option::of(0..8u64))
            .prop_map(|(name, mode, bytes)| Entry::File { name, mode, bytes }),
        proptest::collection::vec(any::<u8>(), 0..6).prop_map(Entry::Data),
        Just(Entry::FileEnd),
        name.prop_map(|name| Entry::Skipped { name }),
    ]
}

proptest! {
    #[test]
    fn nothing_is_ever_written_outside(tree in proptest::collection::vec(entries(), 0..40)) {
        let dir = tempfile::tempdir().unwrap();
        let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
        fs::create_dir_all(to.join("copy")).unwrap();
        fs::create_dir(&outside).unwrap();
        for link in ["copy/link", "copy/a"] {
            symlink(&outside, to.join(link)).unwrap();
        }
        let mut plant = Plant::new(&to, b"copy", Limits::default()).unwrap();
        // Past errors too: not even somebody who goes on after one gets out.
        for entry in std::iter::once(folder("x")).chain(tree) {
            let _refused = plant.add(entry);
        }
        let _incomplete = plant.finish();
        prop_assert!(names(&outside).is_empty());
        prop_assert_eq!(names(dir.path()), ["outside", "to"]);
        prop_assert_eq!(names(&to), ["copy"]);
    }
}
