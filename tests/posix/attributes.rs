//! What is told of a file besides its data: permissions, owners, times, extended attributes.

use crate::place::{
    ALICE, Check, Failure, Outcome, Place, fails, mode, nap, ok, open, open_as, same, stat, want,
};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, chmod,
    fchmod, futimens, getxattr, link, listxattr, removexattr, rename, setxattr, statvfs, symlink,
    unlink, utimensat,
};
use std::fs;
use std::os::unix::fs::{chown, lchown};
use std::path::Path;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("permissions_are_kept", permissions),
    (
        "permissions_of_directories_are_kept",
        permissions_of_directories,
    ),
    ("set_user_and_group_id_are_kept", set_ids),
    ("writing_ends_set_user_id", set_ids_end),
    (
        "new_in_a_set_group_id_directory_is_of_its_group",
        set_group_directory,
    ),
    ("permissions_go_through_links", through_links),
    ("the_owner_is_given_what_he_is", chown_same),
    ("files_are_given_away", chown_other),
    ("links_are_given_away", lchown_other),
    ("times_are_set", times_set),
    ("times_before_1970_and_after_2038", times_far),
    ("times_are_omitted", times_omitted),
    ("times_are_now", times_now),
    ("times_of_links_and_directories", times_of_others),
    ("times_are_checked", times_checked),
    ("reading_is_an_access", access_time),
    ("writing_is_a_change", write_times),
    ("asking_is_no_change", asking),
    ("permissions_are_a_change_of_status", status_change),
    ("names_are_a_change_of_their_directory", directory_times),
    ("links_are_a_change_of_status", link_times),
    ("times_never_go_back", monotonous),
    ("extended_attributes", extended),
    ("extended_attributes_that_are_not_there", extended_missing),
    ("the_file_system_tells_of_itself", file_system),
    ("kinds_and_sizes", kinds),
];

fn permissions(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    for wanted in [0, 0o111, 0o222, 0o444, 0o640, 0o755, 0o777, 0o1777] {
        ok!(chmod(&f, Mode::from_raw_mode(wanted)));
        same!(mode(&f)?, wanted);
    }
    let file = ok!(open(&f, OFlags::RDONLY));
    ok!(fchmod(&file, Mode::from_raw_mode(0o604)));
    same!(mode(&f)?, 0o604);
    same!(ok!(rustix::fs::fstat(&file)).st_mode & 0o7777, 0o604);
    Ok(())
}

fn permissions_of_directories(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    for wanted in [0o500, 0o711, 0o1777, 0o755] {
        ok!(chmod(&d, Mode::from_raw_mode(wanted)));
        same!(mode(&d)?, wanted);
    }
    Ok(())
}

fn set_ids(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    for wanted in [0o4755, 0o2755, 0o6711] {
        ok!(chmod(&f, Mode::from_raw_mode(wanted)));
        same!(mode(&f)?, wanted);
    }
    Ok(())
}

fn set_ids_end(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    ok!(chmod(&f, Mode::from_raw_mode(0o6777)));
    same!(mode(&f)?, 0o6777);
    let file = ok!(open(&f, OFlags::WRONLY));
    crate::rights::as_user(ALICE, &[], || {
        ok!(rustix::io::write(&file, b"x"));
        Ok(())
    })?;
    same!(mode(&f)?, 0o777);
    ok!(chmod(&f, Mode::from_raw_mode(0o6777)));
    ok!(chown(&f, Some(ALICE), Some(ALICE)));
    same!(mode(&f)?, 0o777);
    Ok(())
}

fn set_group_directory(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(chown(&d, None, Some(ALICE)));
    ok!(chmod(&d, Mode::from_raw_mode(0o2755)));
    ok!(fs::write(d.join("f"), b""));
    same!(stat(&d.join("f"))?.st_gid, ALICE);
    ok!(fs::create_dir(d.join("e")));
    same!(mode(&d.join("e"))? & 0o2000, 0o2000);
    Ok(())
}

fn through_links(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    ok!(symlink("f", p.at("s")));
    ok!(chmod(p.at("s"), Mode::from_raw_mode(0o600)));
    same!(mode(&f)?, 0o600);
    same!(mode(&p.at("s"))?, 0o777);
    ok!(symlink("nowhere", p.at("n")));
    fails!(chmod(p.at("n"), Mode::RWXU), NOENT);
    Ok(())
}

fn chown_same(p: &Place) -> Outcome {
    for path in [p.file("f", b"")?, p.dir("d")?] {
        ok!(chown(&path, Some(0), Some(0)));
        ok!(chown(&path, None, None));
        ok!(chown(&path, Some(0), None));
        ok!(chown(&path, None, Some(0)));
        let about = stat(&path)?;
        same!((about.st_uid, about.st_gid), (0, 0));
    }
    ok!(symlink("nowhere", p.at("s")));
    ok!(lchown(p.at("s"), Some(0), Some(0)));
    Ok(())
}

fn chown_other(p: &Place) -> Outcome {
    for path in [p.file("f", b"")?, p.dir("d")?] {
        ok!(chown(&path, Some(ALICE), Some(7)));
        let about = stat(&path)?;
        same!((about.st_uid, about.st_gid), (ALICE, 7));
    }
    Ok(())
}

fn lchown_other(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    ok!(symlink("f", p.at("s")));
    ok!(lchown(p.at("s"), Some(ALICE), None));
    same!((stat(&f)?.st_uid, stat(&p.at("s"))?.st_uid), (0, ALICE));
    Ok(())
}

const fn at(tv_sec: i64, tv_nsec: i64) -> Timespec {
    Timespec { tv_sec, tv_nsec }
}

fn set(path: &Path, access: Timespec, change: Timespec) -> Outcome {
    let times = Timestamps {
        last_access: access,
        last_modification: change,
    };
    ok!(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW));
    Ok(())
}

type Moments = ((i64, u64), (i64, u64), (i64, u64));

/// Of access, of the data's change, of the status's change.
fn times(path: &Path) -> Result<Moments, Failure> {
    let s = stat(path)?;
    Ok((
        (s.st_atime, s.st_atime_nsec),
        (s.st_mtime, s.st_mtime_nsec),
        (s.st_ctime, s.st_ctime_nsec),
    ))
}

fn times_set(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    set(
        &f,
        at(1_000_000_000, 123_456_789),
        at(1_900_000_000, 987_654_321),
    )?;
    let (access, change, _) = times(&f)?;
    same!(access, (1_000_000_000, 123_456_789));
    same!(change, (1_900_000_000, 987_654_321));
    let file = ok!(open(&f, OFlags::RDONLY));
    let both = Timestamps {
        last_access: at(5, 0),
        last_modification: at(6, 0),
    };
    ok!(futimens(&file, &both));
    let (access, change, _) = times(&f)?;
    same!((access, change), ((5, 0), (6, 0)));
    Ok(())
}

fn times_far(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    for seconds in [-1, -1_000_000_000, 0, 1 << 31, 1 << 33] {
        set(&f, at(seconds, 5), at(seconds, 6))?;
        let (access, change, _) = times(&f)?;
        same!((access, change), ((seconds, 5), (seconds, 6)));
    }
    Ok(())
}

fn times_omitted(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    set(&f, at(5, 0), at(6, 0))?;
    set(&f, at(0, UTIME_OMIT), at(7, 0))?;
    let (access, change, _) = times(&f)?;
    same!((access, change), ((5, 0), (7, 0)));
    set(&f, at(8, 0), at(0, UTIME_OMIT))?;
    let (access, change, _) = times(&f)?;
    same!((access, change), ((8, 0), (7, 0)));
    Ok(())
}

fn times_now(p: &Place) -> Outcome {
    let (f, other) = (p.file("f", b"")?, p.file("other", b"")?);
    set(&f, at(5, 0), at(6, 0))?;
    set(&f, at(0, UTIME_NOW), at(0, UTIME_NOW))?;
    let (access, change, _) = times(&f)?;
    let (_, now, _) = times(&other)?;
    want!(access.0 >= now.0 && access.0 < now.0 + 600);
    want!(change.0 >= now.0 && change.0 < now.0 + 600);
    set(&f, at(5, 0), at(6, 0))?;
    set(&f, at(0, UTIME_OMIT), at(0, UTIME_NOW))?;
    let (access, change, _) = times(&f)?;
    same!(access, (5, 0));
    want!(change.0 >= now.0);
    Ok(())
}

fn times_of_others(p: &Place) -> Outcome {
    let (f, d) = (p.file("f", b"")?, p.dir("d")?);
    ok!(symlink("f", p.at("s")));
    let before = times(&f)?;
    set(&p.at("s"), at(5, 0), at(6, 0))?;
    same!(times(&p.at("s"))?.1, (6, 0));
    same!(times(&f)?.1, before.1);
    set(&d, at(7, 0), at(8, 0))?;
    same!(times(&d)?.1, (8, 0));
    Ok(())
}

fn times_checked(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    let bad = Timestamps {
        last_access: at(0, 1_000_000_000),
        last_modification: at(0, 0),
    };
    fails!(utimensat(CWD, &f, &bad, AtFlags::empty()), INVAL);
    let good = Timestamps {
        last_access: at(0, 0),
        last_modification: at(0, 0),
    };
    fails!(utimensat(CWD, p.at("none"), &good, AtFlags::empty()), NOENT);
    Ok(())
}

fn access_time(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    // Older than the change: so it is set whatever the mount says of how often that is done.
    set(&f, at(5, 0), at(6, 0))?;
    ok!(fs::read(&f));
    want!(times(&f)?.0 > (6, 0));
    same!(times(&f)?.1, (6, 0));
    let d = p.dir("d")?;
    ok!(fs::write(d.join("x"), b""));
    set(&d, at(5, 0), at(6, 0))?;
    same!(ok!(fs::read_dir(&d)).count(), 1);
    want!(times(&d)?.0 > (6, 0));
    Ok(())
}

/// What finds out, each time it is called, whether the content's and the attributes' times have moved on since the call before.
fn later_each_time(path: &Path) -> Result<impl FnMut(&str) -> Outcome, Failure> {
    let mut before = times(path)?;
    Ok(move |what: &str| {
        let after = times(path)?;
        if after.1 <= before.1 || after.2 <= before.2 {
            return Err(Failure::Failed(format!(
                "{what}: {before:?} and then {after:?}"
            )));
        }
        before = after;
        nap();
        Ok(())
    })
}

fn write_times(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let file = ok!(open(&f, OFlags::RDWR));
    let mut next = later_each_time(&f)?;
    nap();
    ok!(rustix::io::write(&file, b"x"));
    next("write")?;
    ok!(rustix::fs::ftruncate(&file, 100));
    next("ftruncate")?;
    ok!(nix::unistd::truncate(&f, 50));
    next("truncate")?;
    ok!(rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::empty(),
        0,
        5000
    ));
    next("fallocate")?;
    Ok(())
}

fn asking(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let before = times(&f)?;
    nap();
    ok!(open(&f, OFlags::RDWR));
    ok!(rustix::fs::access(&f, rustix::fs::Access::READ_OK));
    fails!(
        open_as(&f, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, 0),
        EXIST
    );
    let file = ok!(open(&f, OFlags::RDWR));
    ok!(rustix::io::write(&file, b""));
    let after = times(&f)?;
    same!((after.1, after.2), (before.1, before.2));
    Ok(())
}

fn status_change(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let before = times(&f)?;
    nap();
    ok!(chmod(&f, Mode::from_raw_mode(0o600)));
    let after = times(&f)?;
    same!(after.1, before.1);
    want!(after.2 > before.2);
    nap();
    ok!(chown(&f, Some(0), Some(0)));
    let owned = times(&f)?;
    want!(owned.2 > after.2);
    nap();
    set(&f, at(5, 0), at(6, 0))?;
    want!(times(&f)?.2 > owned.2);
    Ok(())
}

fn directory_times(p: &Place) -> Outcome {
    let (d, e) = (p.dir("d")?, p.dir("e")?);
    let mut next = later_each_time(&d)?;
    nap();
    ok!(fs::write(d.join("f"), b""));
    next("create")?;
    ok!(link(d.join("f"), d.join("l")));
    next("link")?;
    ok!(rename(d.join("l"), e.join("l")));
    next("rename away")?;
    ok!(rename(e.join("l"), d.join("m")));
    next("rename to")?;
    ok!(unlink(d.join("m")));
    next("unlink")?;
    ok!(symlink("x", d.join("s")));
    next("symlink")?;
    ok!(fs::create_dir(d.join("sub")));
    next("mkdir")?;
    ok!(fs::remove_dir(d.join("sub")));
    next("rmdir")?;
    let before = times(&d)?;
    ok!(fs::write(d.join("f"), b"data"));
    same!(times(&d)?.1, before.1);
    Ok(())
}

fn link_times(p: &Place) -> Outcome {
    let (f, l) = (p.file("f", b"data")?, p.at("l"));
    let before = times(&f)?;
    nap();
    ok!(link(&f, &l));
    let linked = times(&f)?;
    same!(linked.1, before.1);
    want!(linked.2 > before.2);
    nap();
    ok!(unlink(&l));
    want!(times(&f)?.2 > linked.2);
    Ok(())
}

fn monotonous(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    let mut last = times(&f)?.1;
    for n in 0..10u8 {
        ok!(fs::write(&f, [n]));
        let now = times(&f)?.1;
        want!(now >= last);
        last = now;
    }
    Ok(())
}

fn extended(p: &Place) -> Outcome {
    let mut buffer = [0; 64];
    for path in [p.file("f", b"")?, p.dir("d")?] {
        ok!(setxattr(&path, "user.a", b"one", XattrFlags::empty()));
        same!(ok!(getxattr(&path, "user.a", &mut buffer)), 3);
        same!(buffer[..3], *b"one");
        fails!(setxattr(&path, "user.a", b"x", XattrFlags::CREATE), EXIST);
        fails!(setxattr(&path, "user.b", b"x", XattrFlags::REPLACE), NODATA);
        ok!(setxattr(&path, "user.a", b"two!", XattrFlags::REPLACE));
        same!(ok!(listxattr(&path, &mut buffer)), 7);
        same!(buffer[..7], *b"user.a\0");
        fails!(getxattr(&path, "user.a", &mut buffer[..2]), RANGE);
        ok!(removexattr(&path, "user.a"));
        fails!(getxattr(&path, "user.a", &mut buffer), NODATA);
        fails!(removexattr(&path, "user.a"), NODATA);
    }
    Ok(())
}

fn extended_missing(p: &Place) -> Outcome {
    // Without extended attributes there are none, and programs know that by these errors.
    let (f, mut buffer) = (p.file("f", b"")?, [0; 64]);
    fails!(getxattr(&f, "user.none", &mut buffer), NODATA | OPNOTSUPP);
    match listxattr(&f, &mut buffer) {
        Err(rustix::io::Errno::OPNOTSUPP) => {}
        listed => same!(ok!(listed), 0),
    }
    Ok(())
}

fn file_system(p: &Place) -> Outcome {
    let told = ok!(statvfs(p.path()));
    want!(told.f_bsize >= 512 && told.f_blocks > 0 && told.f_bfree <= told.f_blocks);
    want!(told.f_bavail > 0 && told.f_bavail <= told.f_bfree);
    same!(told.f_namemax, 255);
    let file = ok!(open(&p.file("f", b"")?, OFlags::RDONLY));
    same!(ok!(rustix::fs::fstatvfs(&file)).f_blocks, told.f_blocks);
    Ok(())
}

fn kinds(p: &Place) -> Outcome {
    let f = p.file("f", &[1; 10_000])?;
    let about = ok!(fs::metadata(&f));
    want!(about.is_file() && about.len() == 10_000);
    let told = stat(&f)?;
    want!(told.st_blocks * 512 >= 10_000 && told.st_blksize >= 512);
    want!(ok!(fs::metadata(p.dir("d")?)).is_dir());
    same!(told.st_dev, stat(p.path())?.st_dev);
    want!(told.st_ino != stat(p.path())?.st_ino);
    Ok(())
}
