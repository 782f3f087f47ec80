//! Files that are open and have no name any more.

use crate::place::{Check, Failure, Outcome, Place, fails, ok, open, open_as, same, stat, want};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, fchmod, fstat, ftruncate, futimens, linkat,
    mkdir, rename, rmdir, unlink,
};
use rustix::io::{pread, pwrite};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("data_are_read_and_written", data),
    ("it_has_no_links", no_links),
    ("it_is_shortened", shortened),
    ("permissions_are_set", permissions),
    ("times_are_set", times),
    ("the_owner_is_given_what_he_is", owner),
    ("another_of_that_name_is_another", another),
    ("a_file_that_was_replaced", replaced),
    ("a_name_of_two_is_gone", one_of_two),
    ("a_directory_that_is_removed", directory),
    ("many_at_once", many),
    ("made_without_a_name", temporary),
];

fn unnamed(p: &Place) -> Result<OwnedFd, Failure> {
    let f = p.file("f", b"data")?;
    let file = ok!(open(&f, OFlags::RDWR));
    ok!(unlink(&f));
    Ok(file)
}

fn data(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    let mut four = [0; 4];
    ok!(pread(&file, &mut four, 0));
    same!(four, *b"data");
    ok!(pwrite(&file, &[7; 100_000], 4));
    let mut back = vec![0; 100_000];
    same!(ok!(pread(&file, &mut back, 4)), 100_000);
    want!(back.iter().all(|&b| b == 7));
    same!(ok!(fstat(&file)).st_size, 100_004);
    ok!(rustix::fs::fsync(&file));
    Ok(())
}

fn no_links(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    same!(ok!(fstat(&file)).st_nlink, 0);
    fails!(rustix::fs::lstat(p.at("f")), NOENT);
    Ok(())
}

fn shortened(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    ok!(ftruncate(&file, 2));
    same!(ok!(fstat(&file)).st_size, 2);
    ok!(rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::empty(),
        0,
        5000
    ));
    same!(ok!(fstat(&file)).st_size, 5000);
    Ok(())
}

fn permissions(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    ok!(fchmod(&file, Mode::from_raw_mode(0o604)));
    same!(ok!(fstat(&file)).st_mode & 0o7777, 0o604);
    Ok(())
}

fn times(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    let at = |tv_sec| Timespec { tv_sec, tv_nsec: 0 };
    let both = Timestamps {
        last_access: at(5),
        last_modification: at(6),
    };
    ok!(futimens(&file, &both));
    let about = ok!(fstat(&file));
    same!((about.st_atime, about.st_mtime), (5, 6));
    Ok(())
}

fn owner(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    ok!(std::os::unix::fs::fchown(&file, Some(0), Some(0)));
    same!(ok!(fstat(&file)).st_uid, 0);
    Ok(())
}

fn another(p: &Place) -> Outcome {
    let file = unnamed(p)?;
    for n in 0..3u8 {
        let f = p.file("f", &[n; 3])?;
        want!(stat(&f)?.st_ino != ok!(fstat(&file)).st_ino);
        same!(ok!(fs::read(&f)), [n; 3]);
        ok!(fchmod(&file, Mode::from_raw_mode(0o600)));
        same!(stat(&f)?.st_mode & 0o777, 0o644);
        ok!(unlink(&f));
    }
    let mut four = [0; 4];
    ok!(pread(&file, &mut four, 0));
    same!(four, *b"data");
    Ok(())
}

fn replaced(p: &Place) -> Outcome {
    let (f, g) = (p.file("f", b"old")?, p.file("g", b"new")?);
    let old = ok!(open(&f, OFlags::RDWR));
    ok!(rename(&g, &f));
    same!(ok!(fstat(&old)).st_nlink, 0);
    ok!(fchmod(&old, Mode::from_raw_mode(0o600)));
    ok!(pwrite(&old, b"OLD", 0));
    same!(ok!(fs::read(&f)), b"new");
    same!(stat(&f)?.st_mode & 0o777, 0o644);
    Ok(())
}

fn one_of_two(p: &Place) -> Outcome {
    let (f, l) = (p.file("f", b"data")?, p.at("l"));
    let file = ok!(open(&f, OFlags::RDWR));
    ok!(linkat(CWD, &f, CWD, &l, AtFlags::empty()));
    ok!(unlink(&f));
    same!(ok!(fstat(&file)).st_nlink, 1);
    ok!(fchmod(&file, Mode::from_raw_mode(0o600)));
    ok!(pwrite(&file, b"DATA", 0));
    same!(ok!(fs::read(&l)), b"DATA");
    same!(stat(&l)?.st_mode & 0o777, 0o600);
    Ok(())
}

fn directory(p: &Place) -> Outcome {
    let d = p.dir("d")?;
    let held = ok!(open(&d, OFlags::RDONLY | OFlags::DIRECTORY));
    ok!(rmdir(&d));
    ok!(fstat(&held));
    fails!(
        rustix::fs::openat(&held, "x", OFlags::RDONLY, Mode::empty()),
        NOENT
    );
    ok!(mkdir(&d, Mode::RWXU));
    want!(stat(&d)?.st_ino != ok!(fstat(&held)).st_ino);
    Ok(())
}

fn many(p: &Place) -> Outcome {
    let mut all = Vec::new();
    for n in 0..20u8 {
        let file = ok!(open_as(
            &p.at("t"),
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
            0o600
        ));
        ok!(pwrite(&file, &[n], 0));
        ok!(unlink(p.at("t")));
        all.push(file);
    }
    for (n, file) in (0u8..).zip(&all) {
        let mut byte = [0];
        ok!(pread(file, &mut byte, 0));
        same!(byte, [n]);
    }
    Ok(())
}

fn temporary(p: &Place) -> Outcome {
    let file = ok!(open_as(p.path(), OFlags::RDWR | OFlags::TMPFILE, 0o600));
    ok!(pwrite(&file, b"data", 0));
    same!(ok!(fstat(&file)).st_nlink, 0);
    let own = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    ok!(linkat(
        CWD,
        &own,
        CWD,
        p.at("named"),
        AtFlags::SYMLINK_FOLLOW
    ));
    same!(ok!(fs::read(p.at("named"))), b"data");
    Ok(())
}
