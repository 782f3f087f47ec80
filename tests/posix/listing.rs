//! Directories while they are read.

use crate::place::{Check, Failure, Outcome, Place, ok, open, same, want};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RawDir, link, mkdir, symlink, unlink};
use std::collections::HashSet;
use std::fs;
use std::mem::MaybeUninit;
use std::path::Path;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("every_name_is_listed_once", every_name),
    ("kinds_and_numbers_are_listed", kinds),
    ("an_empty_directory_is_empty", empty),
    (
        "names_that_stay_are_listed_while_others_come_and_go",
        meanwhile,
    ),
    ("all_is_removed_while_it_is_read", removed),
    ("a_listing_begins_again", again),
    ("a_listing_goes_on_where_it_was", goes_on),
    ("two_read_one_directory", two),
    ("what_is_listed_is_renamed", renamed),
];

/// Names in a large directory: more than several answers hold, for which Linux makes room of a page each.
const MANY: usize = 40;

fn many(p: &Place) -> Result<std::path::PathBuf, Failure> {
    let d = p.dir("many")?;
    // One file, since links are the cheapest names.
    let file = p.file("one", b"")?;
    for n in 0..MANY {
        ok!(link(&file, d.join(format!("{n:0200}"))));
    }
    Ok(d)
}

fn names(d: &Path) -> Result<Vec<String>, Failure> {
    let entries = ok!(fs::read_dir(d)).map(|entry| Ok(ok!(entry).file_name()));
    entries
        .map(|name| name.map(|name| name.to_string_lossy().into_owned()))
        .collect()
}

fn every_name(p: &Place) -> Outcome {
    let d = many(p)?;
    let listed = names(&d)?;
    same!(listed.len(), MANY);
    same!(listed.iter().collect::<HashSet<_>>().len(), MANY);
    Ok(())
}

fn kinds(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b""));
    ok!(mkdir(d.join("e"), Mode::RWXU));
    ok!(symlink("f", d.join("s")));
    let mut dir = ok!(Dir::new(ok!(open(&d, OFlags::RDONLY))));
    let mut seen = 0;
    while let Some(entry) = dir.read() {
        let entry = ok!(entry);
        let kind = match entry.file_name().to_bytes() {
            b"." | b".." => continue,
            b"f" => FileType::RegularFile,
            b"e" => FileType::Directory,
            _ => FileType::Symlink,
        };
        same!(entry.file_type(), kind);
        let about = ok!(rustix::fs::statat(
            ok!(dir.fd()),
            entry.file_name(),
            AtFlags::SYMLINK_NOFOLLOW
        ));
        same!(entry.ino(), about.st_ino);
        seen += 1;
    }
    same!(seen, 3);
    Ok(())
}

fn empty(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    same!(names(&d)?.len(), 0);
    ok!(fs::write(d.join("f"), b""));
    same!(names(&d)?.len(), 1);
    ok!(unlink(d.join("f")));
    same!(names(&d)?.len(), 0);
    Ok(())
}

fn meanwhile(p: &Place) -> Outcome {
    let d = many(p)?;
    let mut staying: HashSet<String> = names(&d)?.into_iter().collect();
    // Every second is taken away, when the first has been read, and others come.
    let gone: Vec<String> = staying.iter().step_by(2).cloned().collect();
    for name in &gone {
        staying.remove(name);
    }
    let mut seen = Vec::new();
    let mut reading = ok!(fs::read_dir(&d));
    let first = ok!(reading.next().ok_or("nothing listed"));
    seen.push(ok!(first).file_name().to_string_lossy().into_owned());
    for (n, name) in gone.iter().enumerate() {
        ok!(unlink(d.join(name)));
        if n % 8 == 0 {
            ok!(fs::write(d.join(format!("new {n}")), b""));
        }
    }
    for entry in reading {
        seen.push(ok!(entry).file_name().to_string_lossy().into_owned());
    }
    let all: HashSet<String> = seen.iter().cloned().collect();
    same!(all.len(), seen.len());
    want!(staying.iter().all(|name| all.contains(name)));
    Ok(())
}

fn removed(p: &Place) -> Outcome {
    let d = many(p)?;
    let mut gone = 0;
    for entry in ok!(fs::read_dir(&d)) {
        ok!(fs::remove_file(ok!(entry).path()));
        gone += 1;
    }
    same!(gone, MANY);
    ok!(fs::remove_dir(&d));
    Ok(())
}

fn again(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("a"), b""));
    let mut dir = ok!(Dir::new(ok!(open(&d, OFlags::RDONLY))));
    let mut count = || -> Result<usize, Failure> {
        dir.rewind();
        let mut count = 0;
        while let Some(entry) = dir.read() {
            if !ok!(entry).file_name().to_bytes().starts_with(b".") {
                count += 1;
            }
        }
        Ok(count)
    };
    same!(count()?, 1);
    ok!(fs::write(d.join("b"), b""));
    same!(count()?, 2);
    ok!(unlink(d.join("a")));
    same!(count()?, 1);
    Ok(())
}

fn goes_on(p: &Place) -> Outcome {
    let d = many(p)?;
    let file = ok!(open(&d, OFlags::RDONLY));
    let mut buffer = vec![MaybeUninit::uninit(); 64 << 10];
    let mut places = Vec::new();
    let mut entries = RawDir::new(&file, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = ok!(entry);
        places.push((entry.file_name().to_owned(), entry.next_entry_cookie()));
    }
    for n in [0, 1, MANY / 2, MANY - 10] {
        ok!(rustix::fs::seek(
            &file,
            rustix::fs::SeekFrom::Start(places[n].1)
        ));
        let mut entries = RawDir::new(&file, &mut buffer);
        let next = ok!(ok!(entries.next().ok_or("nothing follows")));
        same!(next.file_name().to_owned(), places[n + 1].0);
    }
    Ok(())
}

fn two(p: &Place) -> Outcome {
    let d = many(p)?;
    let (mut a, mut b) = (ok!(fs::read_dir(&d)), ok!(fs::read_dir(&d)));
    for _ in 0..MANY {
        want!(matches!((a.next(), b.next()), (Some(Ok(_)), Some(Ok(_)))));
    }
    want!(a.next().is_none() && b.next().is_none());
    Ok(())
}

fn renamed(p: &Place) -> Outcome {
    let (d, e) = (p.dir("d")?, p.dir("e")?);
    for n in 0..20 {
        ok!(fs::write(d.join(format!("f{n}")), b""));
    }
    for entry in ok!(fs::read_dir(&d)) {
        let entry = ok!(entry);
        ok!(fs::rename(entry.path(), e.join(entry.file_name())));
    }
    same!((names(&d)?.len(), names(&e)?.len()), (0, 20));
    Ok(())
}
