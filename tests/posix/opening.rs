//! Flags of `open`.

use crate::place::{Check, Outcome, Place, fails, mode, nap, ok, open, open_as, same, stat, want};
use rustix::fs::{Mode, OFlags, chmod, symlink};
use rustix::io::{Errno, pread, pwrite, read, write};
use std::fs;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("a_new_file_has_the_mode_without_umask", new_mode),
    (
        "a_new_file_is_written_whatever_its_mode",
        new_without_rights,
    ),
    ("create_finds_what_is_there", create_finds),
    ("exclusive_means_new", exclusive),
    ("truncated_when_opened", truncated),
    ("truncated_when_opened_to_read", truncated_to_read),
    ("truncation_is_a_change", truncation_is_a_change),
    ("directories_are_not_written", directories),
    ("links_are_not_followed_when_told", nofollow),
    ("what_is_opened_to_read_is_not_written", access),
    ("a_path_alone_gives_no_content", path_only),
    ("written_through_at_once", synchronous),
    ("a_slash_at_the_end_means_a_directory", trailing_slash),
    ("opened_many_times", many),
    ("an_executed_file_is_not_written", executed),
    ("the_host_clears_nothing_of_sticky", sticky_kept),
];

const NEW: OFlags = OFlags::CREATE.union(OFlags::EXCL);

fn new_mode(p: &Place) -> Outcome {
    for (name, wanted, umask) in [("a", 0o666, 0o022), ("b", 0o777, 0), ("c", 0o640, 0o777)] {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
        let made = open_as(&p.at(name), OFlags::WRONLY | NEW, wanted);
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        ok!(made);
        same!(mode(&p.at(name))?, wanted & !umask);
    }
    Ok(())
}

fn new_without_rights(p: &Place) -> Outcome {
    let f = p.at("f");
    let file = ok!(open_as(&f, OFlags::RDWR | NEW, 0));
    same!(ok!(write(&file, b"data")), 4);
    let mut buffer = [0; 4];
    same!(ok!(pread(&file, &mut buffer, 0)), 4);
    same!(buffer, *b"data");
    same!(mode(&f)?, 0);
    Ok(())
}

fn create_finds(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    ok!(chmod(&f, Mode::from_raw_mode(0o640)));
    let file = ok!(open_as(&f, OFlags::RDWR | OFlags::CREATE, 0o777));
    let mut buffer = [0; 8];
    same!(ok!(read(&file, &mut buffer)), 4);
    same!(mode(&f)?, 0o640);
    fails!(
        open_as(&p.at("none/f"), OFlags::RDWR | OFlags::CREATE, 0o777),
        NOENT
    );
    fails!(open(&p.at("none"), OFlags::RDWR), NOENT);
    Ok(())
}

fn exclusive(p: &Place) -> Outcome {
    fails!(
        open_as(&p.file("f", b"")?, OFlags::RDWR | NEW, 0o600),
        EXIST
    );
    ok!(symlink("nowhere", p.at("s")));
    fails!(open_as(&p.at("s"), OFlags::RDWR | NEW, 0o600), EXIST);
    fails!(open_as(&p.dir("d")?, OFlags::RDONLY | NEW, 0o600), EXIST);
    Ok(())
}

fn truncated(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::RDWR | OFlags::CREATE] {
        ok!(fs::write(&f, b"data"));
        let file = ok!(open(&f, flags | OFlags::TRUNC));
        same!(stat(&f)?.st_size, 0);
        ok!(write(&file, b"x"));
        same!(ok!(fs::read(&f)), b"x");
    }
    Ok(())
}

fn truncated_to_read(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let file = ok!(open(&f, OFlags::RDONLY | OFlags::TRUNC));
    same!(stat(&f)?.st_size, 0);
    same!(ok!(read(&file, &mut [0; 4])), 0);
    same!(write(&file, b"x"), Err(Errno::BADF));
    Ok(())
}

fn truncation_is_a_change(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let before = ok!(fs::metadata(&f));
    nap();
    ok!(open(&f, OFlags::WRONLY | OFlags::TRUNC));
    let after = ok!(fs::metadata(&f));
    want!(ok!(after.modified()) > ok!(before.modified()));
    Ok(())
}

fn directories(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    fails!(open(&d, OFlags::WRONLY), ISDIR);
    fails!(open(&d, OFlags::RDWR), ISDIR);
    fails!(open_as(&d, OFlags::RDWR | OFlags::CREATE, 0o600), ISDIR);
    let opened = ok!(open(&d, OFlags::RDONLY | OFlags::DIRECTORY));
    fails!(read(&opened, &mut [0; 4]), ISDIR);
    ok!(rustix::fs::fsync(&opened));
    Ok(())
}

fn nofollow(p: &Place) -> Outcome {
    p.file("f", b"x")?;
    p.dir("d")?;
    ok!(symlink("f", p.at("s")));
    ok!(symlink("d", p.at("t")));
    fails!(open(&p.at("s"), OFlags::RDONLY | OFlags::NOFOLLOW), LOOP);
    let directory = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::DIRECTORY;
    fails!(open(&p.at("t"), directory), NOTDIR | LOOP);
    ok!(open(&p.at("f"), OFlags::RDONLY | OFlags::NOFOLLOW));
    let link = ok!(open(&p.at("s"), OFlags::PATH | OFlags::NOFOLLOW));
    let text = ok!(rustix::fs::readlinkat(&link, "", Vec::new()));
    same!(text.as_bytes(), b"f");
    Ok(())
}

fn access(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let (reader, writer) = (ok!(open(&f, OFlags::RDONLY)), ok!(open(&f, OFlags::WRONLY)));
    same!(write(&reader, b"x"), Err(Errno::BADF));
    same!(read(&writer, &mut [0; 1]).map(|_| ()), Err(Errno::BADF));
    fails!(rustix::fs::ftruncate(&reader, 1), INVAL | BADF);
    same!(ok!(fs::read(&f)), b"data");
    Ok(())
}

fn path_only(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let path = ok!(open(&f, OFlags::PATH));
    fails!(read(&path, &mut [0; 1]), BADF);
    same!(ok!(rustix::fs::fstat(&path)).st_size, 4);
    fails!(rustix::fs::fchmod(&path, Mode::RWXU), BADF);
    Ok(())
}

fn synchronous(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    for flags in [OFlags::SYNC, OFlags::DSYNC] {
        let file = ok!(open(&f, OFlags::WRONLY | flags));
        ok!(write(&file, b"data"));
        ok!(rustix::fs::fdatasync(&file));
        ok!(rustix::fs::fsync(&file));
    }
    same!(ok!(fs::read(&f)), b"data");
    Ok(())
}

fn trailing_slash(p: &Place) -> Outcome {
    p.file("f", b"")?;
    p.dir("d")?;
    fails!(open(&p.at("f/"), OFlags::RDONLY), NOTDIR);
    fails!(
        open_as(&p.at("new/"), OFlags::WRONLY | OFlags::CREATE, 0o600),
        ISDIR
    );
    ok!(open(&p.at("d/"), OFlags::RDONLY));
    ok!(rustix::fs::mkdir(p.at("e/"), Mode::RWXU));
    fails!(rustix::fs::unlink(p.at("f/")), NOTDIR);
    Ok(())
}

fn many(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let mut all = Vec::new();
    for _ in 0..40 {
        all.push(ok!(open(&f, OFlags::RDWR)));
    }
    for (n, file) in (0u8..).zip(&all) {
        ok!(pwrite(file, &[n], u64::from(n)));
    }
    let content = ok!(fs::read(&f));
    same!(content.len(), 40);
    want!((0u8..).zip(content).all(|(n, byte)| n == byte));
    Ok(())
}

fn executed(p: &Place) -> Outcome {
    let program = p.at("program");
    ok!(fs::copy("/proc/self/exe", &program));
    ok!(chmod(&program, Mode::from_raw_mode(0o755)));
    // It waits for the end of its input.
    let mut running = ok!(crate::locks::start_holder(&program));
    let written = open(&program, OFlags::WRONLY);
    let truncated = rustix::fs::open(&program, OFlags::RDONLY | OFlags::TRUNC, Mode::empty());
    drop(running.stdin.take());
    let ended = ok!(running.wait());
    fails!(written, TXTBSY);
    fails!(truncated, TXTBSY);
    same!(ended.to_string(), "exit status: 0");
    ok!(open(&program, OFlags::WRONLY));
    Ok(())
}

fn sticky_kept(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(chmod(&d, Mode::from_raw_mode(0o1777)));
    same!(mode(&d)?, 0o1777);
    ok!(fs::write(d.join("f"), b""));
    same!(mode(&d)?, 0o1777);
    Ok(())
}
