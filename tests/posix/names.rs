//! Names: made, given to another file, and taken away.

use crate::place::{Check, Outcome, Place, fails, mode, ok, open, open_as, same, stat, want};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, chmod, link, linkat, mkdir, mknodat,
    readlink, rename, renameat_with, rmdir, symlink, unlink,
};
use std::fs;
use std::path::Path;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("directories_have_the_mode_without_umask", mkdir_mode),
    ("a_directory_counts_its_directories", directory_links),
    ("a_name_is_made_once", made_once),
    ("names_have_255_bytes", name_length),
    ("nothing_is_below_a_file", below_a_file),
    ("full_directories_stay", full_directories),
    ("rmdir_and_unlink_are_not_each_other", rmdir_and_unlink),
    ("links_count", links_count),
    ("a_link_serves_when_the_first_name_is_gone", first_name_gone),
    ("a_link_is_linked_when_the_first_name_is_gone", link_of_link),
    ("a_link_moves_and_the_others_stay", link_moves),
    ("directories_have_one_name", directory_link),
    ("a_symbolic_link_is_linked_itself", link_of_symlink),
    ("symbolic_links_keep_their_text", symlink_text),
    ("symbolic_links_lead", symlink_leads),
    ("circles_of_links_end", symlink_circle),
    ("rename_replaces_a_file", rename_replaces),
    ("rename_of_two_names_of_one_file_does_nothing", rename_same),
    ("rename_replaces_an_empty_directory", rename_directory),
    ("rename_keeps_kinds_apart", rename_kinds),
    ("a_directory_is_not_moved_into_itself", rename_into_itself),
    ("a_moved_directory_takes_its_files_along", rename_deep),
    ("rename_does_not_replace_when_told", rename_noreplace),
    ("rename_exchanges", rename_exchange),
    (
        "exchanged_directories_keep_their_files",
        rename_exchange_dirs,
    ),
    ("a_file_that_was_replaced_is_itself_still", rename_open),
    ("other_file_systems_are_refused", other_file_system),
    ("mknod_makes_a_file", mknod_file),
    ("pipes", pipes),
    ("sockets", sockets),
    ("device_nodes", device_nodes),
    ("a_removed_directory_has_no_names", removed_directory),
    ("names_are_bytes", names_are_bytes),
];

fn mkdir_mode(p: &Place) -> Outcome {
    for (wanted, umask) in [(0o755, 0), (0o777, 0o027), (0o1777, 0)] {
        let path = p.at("d");
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
        let made = mkdir(&path, Mode::from_raw_mode(wanted));
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        ok!(made);
        same!(mode(&path)?, wanted & !umask);
        ok!(rmdir(&path));
    }
    Ok(())
}

fn directory_links(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    same!(stat(&d)?.st_nlink, 2);
    ok!(mkdir(d.join("a"), Mode::RWXU));
    ok!(mkdir(d.join("b"), Mode::RWXU));
    same!(stat(&d)?.st_nlink, 4);
    ok!(rename(d.join("a"), p.at("a")));
    same!(stat(&d)?.st_nlink, 3);
    ok!(rmdir(d.join("b")));
    same!(stat(&d)?.st_nlink, 2);
    Ok(())
}

fn made_once(p: &Place) -> Outcome {
    for name in ["f", "d", "s"] {
        match name {
            "f" => drop(p.file(name, b"x")?),
            "d" => drop(p.dir(name)?),
            _ => ok!(symlink("nowhere", p.at(name))),
        }
        let other = p.at("other");
        ok!(fs::write(&other, b"y"));
        fails!(mkdir(p.at(name), Mode::RWXU), EXIST);
        fails!(symlink("f", p.at(name)), EXIST);
        fails!(link(&other, p.at(name)), EXIST);
        fails!(
            open_as(
                &p.at(name),
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
                0o600
            ),
            EXIST
        );
    }
    same!(ok!(fs::read(p.at("f"))), b"x");
    Ok(())
}

fn name_length(p: &Place) -> Outcome {
    let (long, too_long) = ("x".repeat(255), "x".repeat(256));
    let file = p.file(&long, b"long")?;
    same!(ok!(fs::read(&file)), b"long");
    let far_too_long = "x".repeat(2000);
    for name in [&too_long, &far_too_long] {
        let bad = p.at(name);
        fails!(
            open_as(&bad, OFlags::WRONLY | OFlags::CREATE, 0o600),
            NAMETOOLONG
        );
        fails!(rustix::fs::lstat(&bad), NAMETOOLONG);
        fails!(mkdir(&bad, Mode::RWXU), NAMETOOLONG);
        fails!(rename(&file, &bad), NAMETOOLONG);
        fails!(unlink(&bad), NAMETOOLONG);
    }
    let longest = "y".repeat(255);
    ok!(rename(&file, p.at(&longest)));
    ok!(unlink(p.at(&longest)));
    Ok(())
}

fn below_a_file(p: &Place) -> Outcome {
    let below = p.file("f", b"")?.join("x");
    fails!(
        open_as(&below, OFlags::WRONLY | OFlags::CREATE, 0o600),
        NOTDIR
    );
    fails!(mkdir(&below, Mode::RWXU), NOTDIR);
    fails!(rustix::fs::lstat(&below), NOTDIR);
    fails!(unlink(&below), NOTDIR);
    fails!(rename(p.at("f"), p.at("f/x")), NOTDIR);
    fails!(open(&p.at("f"), OFlags::RDONLY | OFlags::DIRECTORY), NOTDIR);
    Ok(())
}

fn full_directories(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("x"), b""));
    fails!(rmdir(&d), NOTEMPTY | EXIST);
    fails!(rename(p.dir("e")?, &d), NOTEMPTY | EXIST);
    fails!(rmdir(d.join(".")), INVAL);
    ok!(unlink(d.join("x")));
    ok!(rmdir(&d));
    fails!(rmdir(&d), NOENT);
    Ok(())
}

fn rmdir_and_unlink(p: &Place) -> Outcome {
    let (f, d) = (p.file("f", b"")?, p.dir("d")?);
    fails!(rmdir(&f), NOTDIR);
    fails!(unlink(&d), ISDIR | PERM);
    ok!(symlink("d", p.at("s")));
    fails!(rmdir(p.at("s")), NOTDIR);
    ok!(unlink(p.at("s")));
    want!(d.exists());
    fails!(unlink(p.at("s")), NOENT);
    Ok(())
}

fn links_count(p: &Place) -> Outcome {
    let f = p.file("f", b"x")?;
    for n in 2..5u64 {
        ok!(link(&f, p.at(format!("l{n}"))));
        same!(stat(&f)?.st_nlink, n);
        same!(stat(&p.at("l2"))?.st_nlink, n);
    }
    same!(stat(&f)?.st_ino, stat(&p.at("l4"))?.st_ino);
    for n in (2..5u64).rev() {
        ok!(unlink(p.at(format!("l{n}"))));
        same!(stat(&f)?.st_nlink, n - 1);
    }
    same!(ok!(fs::read(&f)), b"x");
    Ok(())
}

fn first_name_gone(p: &Place) -> Outcome {
    let (f, l) = (p.file("f", b"x")?, p.at("l"));
    ok!(link(&f, &l));
    let held = ok!(open(&l, OFlags::RDWR));
    ok!(unlink(&f));
    // By what is open, without the name.
    same!(ok!(rustix::fs::fstat(&held)).st_nlink, 1);
    ok!(rustix::fs::fchmod(&held, Mode::from_raw_mode(0o600)));
    ok!(rustix::fs::ftruncate(&held, 5));
    // By the other name.
    same!(mode(&l)?, 0o600);
    ok!(chmod(&l, Mode::from_raw_mode(0o640)));
    ok!(rustix::fs::fstat(&held));
    same!(ok!(rustix::fs::fstat(&held)).st_mode & 0o777, 0o640);
    same!(ok!(fs::read(&l)), b"x\0\0\0\0");
    fails!(rustix::fs::lstat(&f), NOENT);
    Ok(())
}

fn link_of_link(p: &Place) -> Outcome {
    let (f, l, m) = (p.file("f", b"x")?, p.at("l"), p.at("m"));
    ok!(link(&f, &l));
    ok!(unlink(&f));
    ok!(link(&l, &m));
    ok!(unlink(&l));
    ok!(chmod(&m, Mode::from_raw_mode(0o600)));
    same!(ok!(fs::read(&m)), b"x");
    same!(stat(&m)?.st_nlink, 1);
    Ok(())
}

fn link_moves(p: &Place) -> Outcome {
    let (f, l, d) = (p.file("f", b"x")?, p.at("l"), p.dir("d")?);
    ok!(link(&f, &l));
    ok!(rename(&l, d.join("l")));
    ok!(fs::write(&f, b"both"));
    same!(ok!(fs::read(d.join("l"))), b"both");
    ok!(unlink(d.join("l")));
    same!(ok!(fs::read(&f)), b"both");
    same!(stat(&f)?.st_nlink, 1);
    Ok(())
}

fn directory_link(p: &Place) -> Outcome {
    fails!(link(p.dir("d")?, p.at("l")), PERM);
    fails!(link(p.at("none"), p.at("l")), NOENT);
    Ok(())
}

fn link_of_symlink(p: &Place) -> Outcome {
    p.file("f", b"x")?;
    ok!(symlink("f", p.at("s")));
    ok!(linkat(CWD, p.at("s"), CWD, p.at("t"), AtFlags::empty()));
    want!(ok!(fs::symlink_metadata(p.at("t"))).is_symlink());
    same!(stat(&p.at("s"))?.st_nlink, 2);
    let follow = AtFlags::SYMLINK_FOLLOW;
    ok!(linkat(CWD, p.at("s"), CWD, p.at("g"), follow));
    want!(ok!(fs::symlink_metadata(p.at("g"))).is_file());
    Ok(())
}

fn symlink_text(p: &Place) -> Outcome {
    let long = "t/".repeat(500);
    for text in ["x", "../..", "/absolute/path", "with blank\n", &long] {
        let s = p.at("s");
        ok!(symlink(text, &s));
        let told = ok!(readlink(&s, Vec::new()));
        same!(told.as_bytes(), text.as_bytes());
        same!(usize::try_from(stat(&s)?.st_size), Ok(text.len()));
        ok!(unlink(&s));
    }
    fails!(symlink("", p.at("s")), NOENT);
    fails!(readlink(p.file("f", b"")?, Vec::new()), INVAL);
    Ok(())
}

fn symlink_leads(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b"x"));
    ok!(symlink("d", p.at("s")));
    same!(ok!(fs::read(p.at("s/f"))), b"x");
    ok!(symlink("s/f", p.at("t")));
    same!(ok!(fs::read(p.at("t"))), b"x");
    fails!(open(&p.at("t"), OFlags::RDONLY | OFlags::NOFOLLOW), LOOP);
    // A file is made where a link leads that leads to nothing yet.
    ok!(symlink("d/new", p.at("n")));
    ok!(fs::write(p.at("n"), b"made"));
    same!(ok!(fs::read(d.join("new"))), b"made");
    ok!(rename(p.at("t"), p.at("u")));
    want!(d.join("f").exists());
    ok!(unlink(p.at("u")));
    want!(d.join("f").exists());
    Ok(())
}

fn symlink_circle(p: &Place) -> Outcome {
    ok!(symlink("b", p.at("a")));
    ok!(symlink("a", p.at("b")));
    fails!(open(&p.at("a"), OFlags::RDONLY), LOOP);
    fails!(chmod(p.at("a/x"), Mode::RWXU), LOOP);
    fails!(mkdir(p.at("a/x"), Mode::RWXU), LOOP);
    Ok(())
}

fn rename_replaces(p: &Place) -> Outcome {
    let (a, b) = (p.file("a", b"a")?, p.file("b", b"b")?);
    let (ino, replaced) = (stat(&a)?.st_ino, ok!(open(&b, OFlags::RDONLY)));
    ok!(rename(&a, &b));
    fails!(rustix::fs::lstat(&a), NOENT);
    same!(ok!(fs::read(&b)), b"a");
    same!(stat(&b)?.st_ino, ino);
    same!(ok!(rustix::fs::fstat(&replaced)).st_nlink, 0);
    fails!(rename(p.at("none"), &b), NOENT);
    fails!(rename(&b, p.at("none/x")), NOENT);
    Ok(())
}

fn rename_same(p: &Place) -> Outcome {
    let (a, b) = (p.file("a", b"a")?, p.at("b"));
    ok!(link(&a, &b));
    ok!(rename(&a, &b));
    same!(stat(&a)?.st_nlink, 2);
    ok!(rename(&a, &a));
    same!(ok!(fs::read(&b)), b"a");
    Ok(())
}

fn rename_directory(p: &Place) -> Outcome {
    let (a, b) = (p.dir("a")?, p.dir("b")?);
    ok!(fs::write(a.join("f"), b"f"));
    ok!(rename(&a, &b));
    same!(ok!(fs::read(b.join("f"))), b"f");
    want!(!a.exists());
    Ok(())
}

fn rename_kinds(p: &Place) -> Outcome {
    let (f, d) = (p.file("f", b"")?, p.dir("d")?);
    fails!(rename(&f, &d), ISDIR);
    fails!(rename(&d, &f), NOTDIR);
    fails!(rename(d.join("."), p.at("e")), BUSY | INVAL);
    fails!(rename(d.join(".."), p.at("e")), BUSY | INVAL);
    Ok(())
}

fn rename_into_itself(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(mkdir(d.join("e"), Mode::RWXU));
    fails!(rename(&d, d.join("x")), INVAL);
    fails!(rename(&d, d.join("e/x")), INVAL);
    fails!(rename(d.join("e"), &d), NOTEMPTY | EXIST);
    Ok(())
}

fn rename_deep(p: &Place) -> Outcome {
    let a = p.dir("a")?;
    ok!(fs::create_dir_all(a.join("b/c/d")));
    let file = a.join("b/c/d/f");
    ok!(fs::write(&file, b"deep"));
    let (held, dir) = (
        ok!(open(&file, OFlags::RDWR)),
        ok!(open(&a.join("b/c"), OFlags::RDONLY)),
    );
    ok!(mkdir(p.at("z"), Mode::RWXU));
    ok!(rename(&a, p.at("z/y")));
    ok!(rename(p.at("z/y/b"), p.at("b")));
    same!(ok!(fs::read(p.at("b/c/d/f"))), b"deep");
    ok!(rustix::fs::fchmod(&held, Mode::from_raw_mode(0o600)));
    same!(mode(&p.at("b/c/d/f"))?, 0o600);
    // What was opened before the move is the same directory.
    let made = OFlags::WRONLY | OFlags::CREATE;
    ok!(rustix::fs::openat(&dir, "new", made, Mode::RWXU));
    want!(p.at("b/c/new").exists());
    ok!(rustix::fs::unlinkat(&dir, "new", AtFlags::empty()));
    Ok(())
}

fn rename_noreplace(p: &Place) -> Outcome {
    let (a, b) = (p.file("a", b"a")?, p.file("b", b"b")?);
    let flags = RenameFlags::NOREPLACE;
    fails!(renameat_with(CWD, &a, CWD, &b, flags), EXIST);
    same!(ok!(fs::read(&b)), b"b");
    ok!(renameat_with(CWD, &a, CWD, p.at("c"), flags));
    same!(ok!(fs::read(p.at("c"))), b"a");
    Ok(())
}

fn rename_exchange(p: &Place) -> Outcome {
    let (a, d) = (p.file("a", b"a")?, p.dir("d")?);
    ok!(fs::write(d.join("f"), b"f"));
    let flags = RenameFlags::EXCHANGE;
    ok!(renameat_with(CWD, &a, CWD, &d, flags));
    same!(ok!(fs::read(&d)), b"a");
    same!(ok!(fs::read(a.join("f"))), b"f");
    fails!(renameat_with(CWD, &a, CWD, p.at("none"), flags), NOENT);
    let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
    fails!(renameat_with(CWD, &a, CWD, &d, both), INVAL);
    Ok(())
}

fn rename_exchange_dirs(p: &Place) -> Outcome {
    let (a, b) = (p.dir("a")?, p.dir("b")?);
    ok!(fs::write(a.join("f"), b"a"));
    ok!(fs::write(b.join("f"), b"b"));
    let held = ok!(open(&a.join("f"), OFlags::RDONLY));
    ok!(renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE));
    same!(ok!(fs::read(a.join("f"))), b"b");
    same!(ok!(fs::read(b.join("f"))), b"a");
    ok!(rustix::fs::fchmod(&held, Mode::from_raw_mode(0o600)));
    same!(mode(&b.join("f"))?, 0o600);
    ok!(unlink(b.join("f")));
    want!(a.join("f").exists());
    Ok(())
}

fn rename_open(p: &Place) -> Outcome {
    let (a, b) = (p.file("a", b"a")?, p.file("b", b"b")?);
    let (held_a, held_b) = (ok!(open(&a, OFlags::RDWR)), ok!(open(&b, OFlags::RDWR)));
    ok!(rename(&a, &b));
    ok!(rustix::io::pwrite(&held_a, b"A", 0));
    ok!(rustix::io::pwrite(&held_b, b"B", 0));
    same!(ok!(fs::read(&b)), b"A");
    let mut byte = [0];
    ok!(rustix::io::pread(&held_b, &mut byte, 0));
    same!(byte, *b"B");
    Ok(())
}

fn other_file_system(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    let other = Path::new("/dev/shm");
    let other = if other.is_dir() {
        other
    } else {
        Path::new("/dev")
    };
    if stat(other)?.st_dev == stat(&f)?.st_dev {
        return Err(crate::place::Failure::Skipped("no other one".to_owned()));
    }
    fails!(rename(&f, other.join("posix-suite")), XDEV);
    fails!(link(&f, other.join("posix-suite")), XDEV);
    Ok(())
}

fn mknod_file(p: &Place) -> Outcome {
    let f = p.at("f");
    ok!(mknodat(
        CWD,
        &f,
        FileType::RegularFile,
        Mode::from_raw_mode(0o640),
        0
    ));
    same!(mode(&f)?, 0o640);
    fails!(
        mknodat(CWD, &f, FileType::RegularFile, Mode::RWXU, 0),
        EXIST
    );
    Ok(())
}

fn pipes(p: &Place) -> Outcome {
    let pipe = p.at("p");
    ok!(mknodat(
        CWD,
        &pipe,
        FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0
    ));
    let reader = ok!(open(&pipe, OFlags::RDONLY | OFlags::NONBLOCK));
    let writer = ok!(open(&pipe, OFlags::WRONLY | OFlags::NONBLOCK));
    same!(ok!(rustix::io::write(&writer, b"through")), 7);
    let mut buffer = [0; 7];
    same!(ok!(rustix::io::read(&reader, &mut buffer)), 7);
    same!(buffer, *b"through");
    Ok(())
}

fn sockets(p: &Place) -> Outcome {
    let path = p.at("s");
    let listener = ok!(std::os::unix::net::UnixListener::bind(&path));
    let client = ok!(std::os::unix::net::UnixStream::connect(&path));
    drop((listener, client));
    fails!(open(&path, OFlags::RDONLY), NXIO);
    Ok(())
}

fn device_nodes(p: &Place) -> Outcome {
    let null = rustix::fs::makedev(1, 3);
    ok!(mknodat(
        CWD,
        p.at("n"),
        FileType::CharacterDevice,
        Mode::RWXU,
        null
    ));
    same!(stat(&p.at("n"))?.st_rdev, null);
    ok!(mknodat(
        CWD,
        p.at("b"),
        FileType::BlockDevice,
        Mode::RWXU,
        0
    ));
    Ok(())
}

fn removed_directory(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    let held = ok!(open(&d, OFlags::RDONLY | OFlags::DIRECTORY));
    ok!(rmdir(&d));
    let flags = OFlags::WRONLY | OFlags::CREATE;
    fails!(rustix::fs::openat(&held, "x", flags, Mode::RWXU), NOENT);
    fails!(rustix::fs::mkdirat(&held, "x", Mode::RWXU), NOENT);
    fails!(rename(p.file("f", b"")?, d.join("x")), NOENT);
    // Another of that name is another.
    ok!(mkdir(&d, Mode::RWXU));
    ok!(fs::write(d.join("x"), b""));
    fails!(rustix::fs::statat(&held, "x", AtFlags::empty()), NOENT);
    Ok(())
}

fn names_are_bytes(p: &Place) -> Outcome {
    use std::os::unix::ffi::OsStrExt;
    for bytes in [
        &b"\xff\xfe"[..],
        b" ",
        b"\n",
        b"...",
        b"-",
        b"\\",
        b"\x01\x7f",
    ] {
        let path = p.at(std::ffi::OsStr::from_bytes(bytes));
        ok!(fs::write(&path, bytes));
        let listed = ok!(fs::read_dir(p.path())).next();
        let listed = ok!(ok!(listed.ok_or("nothing listed"))).file_name();
        same!(listed.as_bytes(), bytes);
        ok!(unlink(&path));
    }
    Ok(())
}
