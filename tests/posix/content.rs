//! Data: where they are, what is between them, and what happens at the end.

use crate::place::{Check, Failure, Outcome, Place, fails, ok, open, open_as, same, stat, want};
use rustix::fs::{
    FallocateFlags, OFlags, SeekFrom, fallocate, fcntl_getfl, fcntl_setfl, ftruncate, seek,
};
use rustix::io::{pread, pwrite, read, write};
use std::fs;
use std::os::fd::OwnedFd;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("positions_are_independent", positions),
    ("written_at_a_place", written_at),
    ("unaligned_pieces_come_back", pieces),
    ("a_write_past_the_end_leaves_zeroes", past_the_end),
    ("shortened_and_lengthened", shortened),
    ("what_was_cut_off_does_not_come_back", cut_off),
    ("truncate_refuses_what_it_cannot", truncate_refuses),
    ("appended_at_the_end", appended),
    ("two_append_and_nothing_is_lost", two_append),
    ("appending_begins_and_ends_while_open", append_switched),
    ("an_offset_means_nothing_to_an_appender", append_offset),
    ("files_of_terabytes", huge),
    ("holes_are_found", holes),
    ("a_hole_is_punched", punched),
    ("a_range_is_zeroed", zeroed),
    ("room_is_allocated", allocated),
    ("room_is_allocated_past_the_end", allocated_past),
    ("copied_between_files", copied),
    ("sent_between_files", sent),
    ("what_one_writes_the_other_reads", other_reads),
    ("unsynchronised_data_are_there_after_close", after_close),
    ("past_the_caches", direct),
];

fn new(p: &Place, flags: OFlags) -> Result<OwnedFd, Failure> {
    Ok(ok!(open_as(
        &p.at("f"),
        OFlags::RDWR | OFlags::CREATE | flags,
        0o644
    )))
}

/// Bytes that tell their place.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|n| u8::try_from((n / 7 + n * 31) % 251).unwrap_or(0))
        .collect()
}

fn all(file: &OwnedFd, bytes: usize) -> Result<Vec<u8>, Failure> {
    let mut buffer = vec![0; bytes];
    let n = ok!(pread(file, &mut buffer, 0));
    buffer.truncate(n);
    Ok(buffer)
}

fn positions(p: &Place) -> Outcome {
    let a = new(p, OFlags::empty())?;
    let b = ok!(open(&p.at("f"), OFlags::RDWR));
    ok!(write(&a, b"0123456789"));
    let mut two = [0; 2];
    ok!(read(&b, &mut two));
    same!(two, *b"01");
    let dup = ok!(rustix::io::dup(&b));
    ok!(read(&dup, &mut two));
    same!(two, *b"23");
    ok!(write(&b, b"xx"));
    same!(ok!(seek(&a, SeekFrom::Current(0))), 10);
    same!(ok!(seek(&b, SeekFrom::Current(0))), 6);
    same!(ok!(seek(&b, SeekFrom::End(-1))), 9);
    fails!(seek(&b, SeekFrom::End(-11)), INVAL);
    same!(ok!(seek(&b, SeekFrom::End(5))), 15);
    same!(ok!(read(&b, &mut two)), 0);
    same!(all(&a, 100)?, b"0123xx6789");
    Ok(())
}

fn written_at(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, b"0123456789"));
    ok!(pwrite(&file, b"xy", 3));
    same!(ok!(seek(&file, SeekFrom::Current(0))), 10);
    same!(all(&file, 100)?, b"012xy56789");
    same!(ok!(pread(&file, &mut [0; 4], 8)), 2);
    same!(ok!(pread(&file, &mut [0; 4], 10)), 0);
    same!(ok!(pwrite(&file, b"", 50)), 0);
    same!(stat(&p.at("f"))?.st_size, 10);
    Ok(())
}

fn pieces(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    let data = pattern(300_007);
    let (mut at, mut size) = (0, 1);
    while at < data.len() {
        let end = data.len().min(at + size);
        same!(ok!(write(&file, &data[at..end])), end - at);
        (at, size) = (end, size * 3 + 1);
    }
    want!(ok!(fs::read(p.at("f"))) == data);
    let mut back = vec![0; data.len()];
    let mut at = 0;
    while at < data.len() {
        let end = data.len().min(at + 40_961);
        at += ok!(pread(&file, &mut back[at..end], at as u64));
    }
    want!(back == data);
    Ok(())
}

fn past_the_end(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(pwrite(&file, b"a", 0));
    ok!(pwrite(&file, b"b", 10_000));
    let content = all(&file, 20_000)?;
    same!(content.len(), 10_001);
    want!(content[1..10_000].iter().all(|&b| b == 0));
    same!((content[0], content[10_000]), (b'a', b'b'));
    Ok(())
}

fn shortened(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, b"0123456789"));
    ok!(ftruncate(&file, 4));
    same!(all(&file, 100)?, b"0123");
    ok!(ftruncate(&file, 6));
    same!(all(&file, 100)?, b"0123\0\0");
    let path = ok!(fs::OpenOptions::new().write(true).open(p.at("f")));
    ok!(path.set_len(2));
    same!(all(&file, 100)?, b"01");
    ok!(nix::unistd::truncate(&p.at("f"), 3));
    same!(all(&file, 100)?, b"01\0");
    // The place stays where it was.
    ok!(write(&file, b"x"));
    same!(stat(&p.at("f"))?.st_size, 11);
    Ok(())
}

fn cut_off(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, &pattern(20_000)));
    ok!(ftruncate(&file, 5_000));
    ok!(ftruncate(&file, 20_000));
    let content = all(&file, 20_000)?;
    want!(content[..5_000] == pattern(20_000)[..5_000]);
    want!(content[5_000..].iter().all(|&b| b == 0));
    Ok(())
}

fn truncate_refuses(p: &Place) -> Outcome {
    let truncate = |name: &str, size| {
        nix::unistd::truncate(&p.at(name), size)
            .map_err(|e| rustix::io::Errno::from_raw_os_error(e as i32))
    };
    fails!(truncate("none", 0), NOENT);
    p.dir("d")?;
    fails!(truncate("d", 0), ISDIR);
    p.file("f", b"x")?;
    fails!(truncate("f", -1), INVAL);
    Ok(())
}

fn appended(p: &Place) -> Outcome {
    let (a, file) = (new(p, OFlags::APPEND)?, p.at("f"));
    ok!(write(&a, b"1"));
    ok!(seek(&a, SeekFrom::Start(0)));
    ok!(write(&a, b"2"));
    same!(ok!(seek(&a, SeekFrom::Current(0))), 2);
    ok!(nix::unistd::truncate(&file, 1));
    ok!(write(&a, b"3"));
    same!(ok!(fs::read(&file)), b"13");
    Ok(())
}

fn two_append(p: &Place) -> Outcome {
    let (a, b) = (new(p, OFlags::APPEND)?, new(p, OFlags::APPEND)?);
    let (mut first, mut second) = (0, 0);
    std::thread::scope(|threads| {
        let append = |file, byte: u8| {
            let line = [byte; 100];
            (0..20).filter(|_| write(file, &line) == Ok(100)).count()
        };
        let (a, b) = (&a, &b);
        let other = threads.spawn(move || append(a, b'a'));
        second = append(b, b'b');
        first = other.join().unwrap_or(0);
    });
    same!((first, second), (20, 20));
    let content = ok!(fs::read(p.at("f")));
    same!(content.len(), 4_000);
    for line in content.chunks(100) {
        want!(line.iter().all(|byte| *byte == line[0]));
    }
    let of_a = content.iter().filter(|byte| **byte == b'a').count();
    same!(of_a, 2_000);
    Ok(())
}

fn append_switched(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, b"0123456789"));
    let flags = ok!(fcntl_getfl(&file));
    ok!(fcntl_setfl(&file, flags | OFlags::APPEND));
    ok!(seek(&file, SeekFrom::Start(0)));
    ok!(write(&file, b"a"));
    same!(all(&file, 100)?, b"0123456789a");
    ok!(fcntl_setfl(&file, flags));
    ok!(pwrite(&file, b"b", 1));
    same!(all(&file, 100)?, b"0b23456789a");
    // The other way round.
    let file = ok!(open(&p.at("f"), OFlags::RDWR | OFlags::APPEND));
    ok!(fcntl_setfl(&file, OFlags::empty()));
    ok!(pwrite(&file, b"c", 2));
    same!(all(&file, 100)?, b"0bc3456789a");
    ok!(seek(&file, SeekFrom::Start(3)));
    ok!(write(&file, b"d"));
    same!(all(&file, 100)?, b"0bcd456789a");
    Ok(())
}

fn append_offset(p: &Place) -> Outcome {
    let file = new(p, OFlags::APPEND)?;
    ok!(write(&file, b"01"));
    // Linux appends, whatever POSIX says of pwrite.
    ok!(pwrite(&file, b"2", 0));
    same!(all(&file, 100)?, b"012");
    Ok(())
}

fn huge(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    let end = 1u64 << 41;
    match ftruncate(&file, end) {
        Err(rustix::io::Errno::FBIG) => return Err(Failure::Skipped("too large here".to_owned())),
        done => ok!(done),
    }
    ok!(pwrite(&file, b"end", end - 3));
    ok!(pwrite(&file, b"mid", (1 << 32) - 1));
    let mut three = [0; 3];
    ok!(pread(&file, &mut three, (1 << 32) - 1));
    same!(three, *b"mid");
    let about = stat(&p.at("f"))?;
    same!(about.st_size.cast_unsigned(), end);
    want!(about.st_blocks < 1 << 20);
    Ok(())
}

/// A file with data in its first and its last of 32 pieces of 32 KiB.
fn sparse(p: &Place) -> Result<OwnedFd, Failure> {
    let file = new(p, OFlags::empty())?;
    ok!(pwrite(&file, &pattern(32 << 10), 0));
    ok!(pwrite(&file, &pattern(32 << 10), 31 << 15));
    ok!(rustix::fs::fsync(&file));
    Ok(file)
}

fn holes(p: &Place) -> Outcome {
    let file = sparse(p)?;
    same!(ok!(seek(&file, SeekFrom::Data(0))), 0);
    let hole = ok!(seek(&file, SeekFrom::Hole(0)));
    want!((32 << 10..31 << 15).contains(&hole));
    let data = ok!(seek(&file, SeekFrom::Data(hole)));
    want!(data > hole && data <= 31 << 15);
    same!(ok!(seek(&file, SeekFrom::Hole(31 << 15))), 1 << 20);
    fails!(seek(&file, SeekFrom::Data(1 << 20)), NXIO);
    want!(stat(&p.at("f"))?.st_blocks <= 512);
    Ok(())
}

fn punched(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    let data = pattern(256 << 10);
    ok!(write(&file, &data));
    ok!(rustix::fs::fsync(&file));
    let before = stat(&p.at("f"))?.st_blocks;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    ok!(fallocate(&file, flags, 64 << 10, 128 << 10));
    let content = all(&file, 256 << 10)?;
    want!(content[..64 << 10] == data[..64 << 10]);
    want!(content[64 << 10..192 << 10].iter().all(|&b| b == 0));
    want!(content[192 << 10..] == data[192 << 10..]);
    want!(stat(&p.at("f"))?.st_blocks < before);
    fails!(
        fallocate(&file, FallocateFlags::PUNCH_HOLE, 0, 1),
        OPNOTSUPP | INVAL
    );
    Ok(())
}

fn zeroed(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, &pattern(64 << 10)));
    match fallocate(&file, FallocateFlags::ZERO_RANGE, 1_000, 50_000) {
        // tmpfs cannot.
        Err(rustix::io::Errno::OPNOTSUPP) => {
            return Err(Failure::Skipped("no zeroed ranges here".to_owned()));
        }
        done => ok!(done),
    }
    let content = all(&file, 64 << 10)?;
    want!(content[..1_000] == pattern(64 << 10)[..1_000]);
    want!(content[1_000..51_000].iter().all(|&b| b == 0));
    want!(content[51_000..] == pattern(64 << 10)[51_000..]);
    Ok(())
}

fn allocated(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, b"data"));
    ok!(fallocate(&file, FallocateFlags::empty(), 0, 100_000));
    let about = stat(&p.at("f"))?;
    same!(about.st_size, 100_000);
    want!(about.st_blocks * 512 >= 100_000);
    same!(all(&file, 4)?, b"data");
    fails!(fallocate(&file, FallocateFlags::empty(), 0, 0), INVAL);
    let reader = ok!(open(&p.at("f"), OFlags::RDONLY));
    fails!(fallocate(&reader, FallocateFlags::empty(), 0, 1), BADF);
    Ok(())
}

fn allocated_past(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    ok!(write(&file, b"data"));
    ok!(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 100_000));
    let about = stat(&p.at("f"))?;
    same!(about.st_size, 4);
    want!(about.st_blocks * 512 >= 100_000);
    Ok(())
}

fn copied(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    let data = pattern(100_000);
    ok!(write(&file, &data));
    let to = ok!(open_as(&p.at("to"), OFlags::RDWR | OFlags::CREATE, 0o600));
    let (mut from_at, mut to_at) = (10, 5);
    while from_at < 90_000 {
        let left = usize::try_from(90_000 - from_at).unwrap_or(0);
        let n = ok!(rustix::fs::copy_file_range(
            &file,
            Some(&mut from_at),
            &to,
            Some(&mut to_at),
            left
        ));
        want!(n > 0);
    }
    let content = all(&to, 100_000)?;
    same!(content.len(), 89_995);
    want!(content[5..] == data[10..90_000]);
    Ok(())
}

fn sent(p: &Place) -> Outcome {
    let file = new(p, OFlags::empty())?;
    let data = pattern(100_000);
    ok!(write(&file, &data));
    let to = ok!(open_as(&p.at("to"), OFlags::RDWR | OFlags::CREATE, 0o600));
    let mut at = 0;
    while at < 100_000 {
        let n = ok!(rustix::fs::sendfile(&to, &file, Some(&mut at), 100_000));
        want!(n > 0);
    }
    want!(all(&to, 200_000)? == data);
    Ok(())
}

fn other_reads(p: &Place) -> Outcome {
    let a = new(p, OFlags::empty())?;
    let b = ok!(open(&p.at("f"), OFlags::RDONLY));
    for n in 0..6u8 {
        ok!(pwrite(&a, &[n; 3000], u64::from(n) * 1000));
        let mut buffer = [0; 3000];
        same!(ok!(pread(&b, &mut buffer, u64::from(n) * 1000)), 3000);
        want!(buffer == [n; 3000]);
        same!(
            ok!(rustix::fs::fstat(&b)).st_size,
            i64::from(n) * 1000 + 3000
        );
    }
    Ok(())
}

fn after_close(p: &Place) -> Outcome {
    for n in 0..4u8 {
        ok!(fs::write(p.at("f"), [n; 5000]));
        want!(ok!(fs::read(p.at("f"))) == [n; 5000]);
    }
    Ok(())
}

fn direct(p: &Place) -> Outcome {
    let f = p.file("f", &pattern(64 << 10))?;
    let file = match open(&f, OFlags::RDWR | OFlags::DIRECT) {
        Err(rustix::io::Errno::INVAL) => {
            return Err(Failure::Skipped("none past the cache".to_owned()));
        }
        done => ok!(done),
    };
    let mut room = vec![0; 12 << 10];
    let at = room.as_ptr().align_offset(4096);
    let buffer = &mut room[at..at + 4096];
    same!(ok!(pread(&file, &mut *buffer, 8192)), 4096);
    want!(*buffer == pattern(64 << 10)[8192..12288]);
    buffer.fill(7);
    same!(ok!(pwrite(&file, &*buffer, 4096)), 4096);
    want!(ok!(fs::read(&f))[4096..8192].iter().all(|&b| b == 7));
    Ok(())
}
