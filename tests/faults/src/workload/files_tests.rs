use super::*;

const SEED: u64 = 4;
const BYTES: u64 = 8 << 20;

fn says(checker: &mut Files, what: &str, step: u64) {
    checker.record(Duration::ZERO, &format!("bh.files {what} {step}\r"));
}

/// A guest that has done so many steps, and its files.
fn after(steps: u64) -> (Files, Tree) {
    let (mut checker, mut tree) = (Files::new(SEED), Tree::new());
    says(&mut checker, "start", 0);
    for step in 1..=steps {
        says(&mut checker, "begin", step);
        tree.insert(format!("f{step}"), contents(SEED, step));
        says(&mut checker, "created", step);
        tree.insert("current".into(), format!("{step}\n").into_bytes());
        says(&mut checker, "current", step);
        if step > KEPT {
            tree.remove(&format!("f{}", step - KEPT));
            says(&mut checker, "removed", step - KEPT);
        }
    }
    (checker, tree)
}

fn verdict(mut checker: Files, tree: &Tree) -> Verified {
    checker.judge(tree);
    Box::new(checker).finish()
}

fn refuses(checker: Files, tree: &Tree, text: &str) {
    let found = verdict(checker, tree);
    let told = found.errors.iter().any(|error| error.contains(text));
    assert!(told && !found.held(), "no `{text}`: {found:?}");
}

fn ended(steps: u64) -> (Files, Tree) {
    let (mut checker, tree) = after(steps);
    says(&mut checker, "end", steps);
    (checker, tree)
}

#[test]
fn whole_run_is_accepted() {
    let (checker, tree) = ended(30);
    let found = verdict(checker, &tree);
    assert!(found.held(), "{found:?}");
    assert_eq!(found.count, KEPT + 1);
}

#[test]
fn nothing_done_verifies_nothing() {
    refuses(Files::new(SEED), &Tree::new(), "nothing was verified");
    let (checker, _) = ended(3);
    assert!(!Box::new(checker).finish().held(), "without an image");
}

#[test]
fn guest_that_was_cut_off_may_have_done_more_than_it_told() {
    let (mut checker, mut tree) = after(30);
    says(&mut checker, "begin", 31);
    assert!(verdict(checker, &tree).held());
    let (checker, _) = after(30);
    tree.insert("f31".into(), contents(SEED, 31));
    tree.insert("current".into(), b"31\n".to_vec());
    tree.insert("new".into(), b"half".to_vec());
    tree.remove("f11");
    assert!(verdict(checker, &tree).held());
}

#[test]
fn guest_that_has_ended_has_told_everything() {
    let (checker, mut tree) = ended(30);
    tree.insert("f31".into(), contents(SEED, 31));
    refuses(checker, &tree, "nobody has made f31");
    let (checker, mut tree) = ended(30);
    tree.remove("f11");
    refuses(checker, &tree, "f11 was synchronised and is lost");
}

#[test]
fn lost_half_and_foreign_files_are_refused() {
    type Spoil = fn(&mut Tree);
    let spoilt: [(Spoil, &str); 8] = [
        (
            |t| drop(t.remove("f30")),
            "f30 was synchronised and is lost",
        ),
        (
            |t| t.get_mut("f30").unwrap().truncate(100),
            "f30 does not hold",
        ),
        (|t| t.get_mut("f30").unwrap()[100] ^= 1, "f30 does not hold"),
        (|t| drop(t.remove("current")), "`current` was synchronised"),
        (
            |t| drop(t.insert("current".into(), b"29\n".to_vec())),
            "`current` holds 29",
        ),
        (
            |t| drop(t.insert("current".into(), b"39\n".to_vec())),
            "`current` holds 39",
        ),
        (
            |t| drop(t.insert("current".into(), b"".to_vec())),
            "`current` holds []",
        ),
        (
            |t| drop(t.insert("g3".into(), b"".to_vec())),
            "nobody has made g3",
        ),
    ];
    for (spoil, text) in spoilt {
        let (checker, mut tree) = after(30);
        spoil(&mut tree);
        refuses(checker, &tree, text);
    }
    let (checker, mut tree) = after(30);
    tree.insert("f3".into(), contents(SEED, 3));
    refuses(checker, &tree, "f3 was removed and is there");
}

#[test]
fn next_life_must_find_what_was_synchronised() {
    for (found, is_right) in [(29, false), (30, true), (31, true), (40, false)] {
        let (mut checker, tree) = after(30);
        says(&mut checker, "start", found);
        assert_eq!(verdict(checker, &tree).held(), is_right, "{found}");
    }
}

#[test]
fn steps_out_of_order_and_refused_ones_are_seen() {
    let (mut checker, tree) = after(30);
    says(&mut checker, "created", 32);
    refuses(checker, &tree, "created 32 while");
    let (mut checker, tree) = after(30);
    says(&mut checker, "refused", 30);
    assert_eq!(verdict(checker, &tree).refused, 1);
    let (mut checker, tree) = after(30);
    checker.record(Duration::ZERO, "[    1.0] EXT4-fs error (device vda)");
    assert!(!verdict(checker, &tree).held());
}

/// A disk with these files.
fn image_of(tree: &Tree) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in tree {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(BYTES).unwrap();
    let [quiet, from] = ["-q", "-d"].map(Path::new);
    let made = tool("mkfs.ext4", &[quiet, from, folder.path(), image.path()]).unwrap();
    assert_eq!(made.code, Some(0), "{}", made.text);
    fs::read(image.path()).unwrap()
}

#[test]
fn files_are_read_from_a_real_file_system() {
    let (mut checker, tree) = ended(25);
    checker.image(&image_of(&tree));
    let found = Box::new(checker).finish();
    assert!(found.held(), "{found:?}");
    let (mut checker, mut tree) = ended(25);
    tree.remove("f25");
    checker.image(&image_of(&tree));
    assert!(!Box::new(checker).finish().held());
}

#[test]
fn spoilt_file_system_is_refused() {
    let (mut checker, tree) = ended(25);
    let mut image = image_of(&tree);
    // Descriptors and bitmaps, and the first inodes.
    image[4096..64 << 10].fill(0xa5);
    checker.image(&image);
    assert!(!Box::new(checker).finish().held());
    let (mut checker, _) = ended(25);
    checker.image(&[]);
    assert!(!Box::new(checker).finish().held());
}

#[test]
fn fresh_disk_has_no_files_and_the_script_fits_a_command_line() {
    let tree = tree(&disk(BYTES).unwrap()).unwrap();
    assert!(tree.keys().eq(["lost+found"]), "{tree:?}");
    let script = script(3600, u64::MAX);
    assert!(
        !script.contains('"') && script.len() < 1500,
        "{} bytes",
        script.len()
    );
}
