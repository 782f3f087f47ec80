//! Who may do what, as other users and with other groups than root's.

use crate::place::{
    ALICE, BOB, Check, Failure, Outcome, Place, fails, ok, open, open_as, same, stat, want,
};
use nix::unistd::{Gid, Uid, setegid, seteuid, setgroups};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, chmod, link, mkdir, rename, rmdir,
    unlink, utimensat,
};
use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("others_have_the_rights_of_others", others),
    ("groups_have_the_rights_of_groups", groups),
    ("directories_are_searched_with_the_right_to", search),
    ("directories_are_listed_with_the_right_to", listed),
    ("names_are_made_and_removed_with_the_right_to", names),
    ("sticky_directories_keep_what_is_anothers", sticky),
    ("sticky_directories_let_go_what_is_ones_own", sticky_own),
    ("only_the_owner_changes_permissions", owner_only),
    ("only_root_gives_away", gives_away),
    ("times_are_set_by_owners_and_now_by_writers", times),
    ("what_is_open_stays_open", stays_open),
    ("a_new_file_is_its_makers", makers),
    ("an_owner_is_held_by_his_own_rights", own_rights),
    ("root_opens_what_nobody_may", root_opens),
    ("root_truncates_what_nobody_may", root_truncates),
    ("root_searches_what_nobody_may", root_searches),
];

/// Does `what` as a user whose group has the same number, and with further groups.
pub(crate) fn as_user(user: u32, groups: &[u32], what: impl FnOnce() -> Outcome) -> Outcome {
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    ok!(setgroups(&groups));
    ok!(setegid(Gid::from_raw(user)));
    ok!(seteuid(Uid::from_raw(user)));
    let done = what();
    let back = seteuid(Uid::from_raw(0))
        .and_then(|()| setegid(Gid::from_raw(0)))
        .and_then(|()| setgroups(&[]));
    ok!(back);
    done
}

fn may(path: &Path, flags: OFlags) -> bool {
    open(path, flags).is_ok()
}

fn modes(path: &Path, mode: u32) -> Outcome {
    ok!(chmod(path, Mode::from_raw_mode(mode)));
    Ok(())
}

fn others(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    for (mode, reads, writes) in [
        (0o600, false, false),
        (0o604, true, false),
        (0o602, false, true),
        (0o606, true, true),
        (0o070, false, false),
    ] {
        modes(&f, mode)?;
        as_user(ALICE, &[], || {
            same!(may(&f, OFlags::RDONLY), reads);
            same!(may(&f, OFlags::WRONLY), writes);
            same!(may(&f, OFlags::RDWR), reads && writes);
            Ok(())
        })?;
    }
    Ok(())
}

fn groups(p: &Place) -> Outcome {
    // Files are of root's group.
    let f = p.file("f", b"data")?;
    for (mode, reads, writes) in [
        (0o640, true, false),
        (0o620, false, true),
        (0o606, false, false),
    ] {
        modes(&f, mode)?;
        as_user(ALICE, &[BOB, 0], || {
            same!(may(&f, OFlags::RDONLY), reads);
            same!(may(&f, OFlags::WRONLY), writes);
            Ok(())
        })?;
    }
    modes(&f, 0o640)?;
    as_user(ALICE, &[BOB], || {
        want!(!may(&f, OFlags::RDONLY));
        Ok(())
    })
}

fn search(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b""));
    modes(&d, 0o744)?;
    as_user(ALICE, &[], || {
        fails!(open(&d.join("f"), OFlags::RDONLY), ACCESS);
        fails!(rustix::fs::lstat(d.join("f")), ACCESS);
        Ok(())
    })?;
    modes(&d, 0o711)?;
    as_user(ALICE, &[], || {
        ok!(open(&d.join("f"), OFlags::RDONLY));
        Ok(())
    })
}

fn listed(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b""));
    modes(&d, 0o711)?;
    as_user(ALICE, &[], || {
        want!(fs::read_dir(&d).is_err());
        Ok(())
    })?;
    modes(&d, 0o755)?;
    as_user(ALICE, &[], || {
        same!(ok!(fs::read_dir(&d)).count(), 1);
        Ok(())
    })
}

fn names(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b""));
    as_user(ALICE, &[], || {
        fails!(
            open_as(&d.join("x"), OFlags::WRONLY | OFlags::CREATE, 0o600),
            ACCESS
        );
        fails!(mkdir(d.join("x"), Mode::RWXU), ACCESS);
        fails!(unlink(d.join("f")), ACCESS);
        fails!(rename(d.join("f"), d.join("g")), ACCESS);
        fails!(link(d.join("f"), d.join("g")), ACCESS | PERM);
        Ok(())
    })?;
    modes(&d, 0o777)?;
    as_user(ALICE, &[], || {
        ok!(open_as(
            &d.join("x"),
            OFlags::WRONLY | OFlags::CREATE,
            0o600
        ));
        ok!(rename(d.join("x"), d.join("y")));
        ok!(unlink(d.join("y")));
        ok!(mkdir(d.join("e"), Mode::RWXU));
        ok!(rmdir(d.join("e")));
        // The directory's right is what counts.
        ok!(unlink(d.join("f")));
        Ok(())
    })
}

fn sticky(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b""));
    modes(&d.join("f"), 0o666)?;
    modes(&d, 0o1777)?;
    as_user(ALICE, &[], || {
        fails!(unlink(d.join("f")), PERM | ACCESS);
        fails!(rename(d.join("f"), d.join("g")), PERM | ACCESS);
        Ok(())
    })
}

fn sticky_own(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    modes(&d, 0o1777)?;
    as_user(ALICE, &[], || {
        ok!(fs::write(d.join("f"), b""));
        ok!(rename(d.join("f"), d.join("g")));
        Ok(())
    })?;
    as_user(BOB, &[], || {
        fails!(unlink(d.join("g")), PERM | ACCESS);
        Ok(())
    })?;
    as_user(ALICE, &[], || {
        ok!(unlink(d.join("g")));
        Ok(())
    })
}

fn owner_only(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    modes(&f, 0o666)?;
    as_user(ALICE, &[0], || {
        fails!(chmod(&f, Mode::from_raw_mode(0o777)), PERM);
        Ok(())
    })?;
    same!(stat(&f)?.st_mode & 0o7777, 0o666);
    Ok(())
}

fn gives_away(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    as_user(ALICE, &[], || {
        want!(chown(&f, Some(ALICE), None).is_err());
        want!(chown(&f, None, Some(ALICE)).is_err());
        Ok(())
    })?;
    same!(stat(&f)?.st_uid, 0);
    Ok(())
}

fn times(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    let both = |tv_sec, tv_nsec| Timestamps {
        last_access: Timespec { tv_sec, tv_nsec },
        last_modification: Timespec { tv_sec, tv_nsec },
    };
    modes(&f, 0o606)?;
    as_user(ALICE, &[], || {
        ok!(utimensat(CWD, &f, &both(0, UTIME_NOW), AtFlags::empty()));
        fails!(utimensat(CWD, &f, &both(5, 0), AtFlags::empty()), PERM);
        Ok(())
    })?;
    modes(&f, 0o604)?;
    as_user(ALICE, &[], || {
        fails!(
            utimensat(CWD, &f, &both(0, UTIME_NOW), AtFlags::empty()),
            ACCESS
        );
        Ok(())
    })
}

fn stays_open(p: &Place) -> Outcome {
    let f = p.file("f", b"data")?;
    let file = ok!(open(&f, OFlags::RDWR));
    modes(&f, 0)?;
    as_user(ALICE, &[], || {
        ok!(rustix::io::pwrite(&file, b"DATA", 0));
        let mut four = [0; 4];
        ok!(rustix::io::pread(&file, &mut four, 0));
        same!(four, *b"DATA");
        fails!(open(&f, OFlags::RDONLY), ACCESS);
        Ok(())
    })
}

fn makers(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    modes(&d, 0o777)?;
    as_user(ALICE, &[], || {
        ok!(fs::write(d.join("f"), b""));
        ok!(mkdir(d.join("e"), Mode::RWXU));
        Ok(())
    })?;
    for name in ["f", "e"] {
        let about = stat(&d.join(name))?;
        same!((about.st_uid, about.st_gid), (ALICE, ALICE));
    }
    Ok(())
}

fn own_rights(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    modes(&d, 0o777)?;
    as_user(ALICE, &[], || {
        let f = d.join("f");
        ok!(open_as(&f, OFlags::WRONLY | OFlags::CREATE, 0o077));
        fails!(open(&f, OFlags::RDONLY), ACCESS);
        ok!(chmod(&f, Mode::from_raw_mode(0o400)));
        ok!(open(&f, OFlags::RDONLY));
        fails!(open(&f, OFlags::WRONLY), ACCESS);
        Ok(())
    })
}

fn no_rights(p: &Place) -> Result<std::path::PathBuf, Failure> {
    let f = p.file("f", b"data")?;
    modes(&f, 0)?;
    Ok(f)
}

fn root_opens(p: &Place) -> Outcome {
    let f = no_rights(p)?;
    ok!(open(&f, OFlags::RDWR));
    modes(&f, 0o400)?;
    ok!(open(&f, OFlags::WRONLY));
    Ok(())
}

fn root_truncates(p: &Place) -> Outcome {
    let f = no_rights(p)?;
    ok!(nix::unistd::truncate(&f, 1));
    same!(stat(&f)?.st_size, 1);
    Ok(())
}

fn root_searches(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    ok!(fs::write(d.join("f"), b""));
    modes(&d, 0)?;
    let search = || {
        ok!(open(&d.join("f"), OFlags::RDONLY));
        same!(ok!(fs::read_dir(&d)).count(), 1);
        ok!(unlink(d.join("f")));
        Ok(())
    };
    let found = search();
    // Where root may not, nobody could remove the directory.
    modes(&d, 0o755)?;
    found
}
