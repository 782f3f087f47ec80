//! `share`: works in a shared folder and leaves there what a host program can check. `share-load` does it for
//! a given time, with a file that stays open all the while; what happens to the device's process
//! meanwhile must not show. `share-look` only reads, and `share-refused` tries to write to a folder that is read
//! only.

use bulkhead_guest::pattern::{self, SECTOR};
use bulkhead_guest::prng::Prng;
use bulkhead_guest::record::Escaped;

use crate::machine::Machine;
use crate::report::{Failure, expect, say};
use crate::sys::time::Deadline;
use crate::virtio::fs::{DATA_MAX, EEXIST, ENOENT, EPERM, EROFS, Folder, ROOT, Refusal, op};

/// Bytes of each file.
const FILE_BYTES: usize = 3 * DATA_MAX / 2;

fn open(machine: &Machine) -> Result<Folder, Failure> {
    let timeout_ms = super::timeout_ms(machine)?;
    let folder = Folder::open(machine, machine.number("disk", 0)?, timeout_ms)?;
    let len = folder.tag.iter().position(|b| *b == 0).unwrap_or(36);
    say!("share tag={}", Escaped(&folder.tag[..len]));
    Ok(folder)
}

/// A file's name: the seed of its pattern in hexadecimal.
pub(super) fn name_of(seed: u64) -> [u8; 16] {
    let mut name = [b'0'; 16];
    for (place, nibble) in name.iter_mut().rev().zip(0..) {
        let digit = (seed >> (4 * nibble) & 15) as usize;
        *place = b"0123456789abcdef"[digit];
    }
    name
}

fn refused<T>(what: &'static str, got: Result<T, Refusal>, errno: i32) -> Result<(), Failure> {
    match got {
        Err(Refusal::Errno(told)) => expect(what, told as u64, errno as u64),
        Err(Refusal::Failure(failure)) => Err(failure),
        Ok(_) => expect(what, 0, errno as u64),
    }
}

/// Writes a file in pieces of changing size and gives the sum of what was written.
fn write_file(
    folder: &mut Folder,
    (node, handle): (u64, u64),
    seed: u64,
    prng: &mut Prng,
) -> Result<(), Failure> {
    let mut at = 0;
    while at < FILE_BYTES {
        let most = ((FILE_BYTES - at) / SECTOR).min(DATA_MAX / SECTOR) as u64;
        let len = prng.within(1, most) as usize * SECTOR;
        pattern::fill(seed, (at / SECTOR) as u64, &mut folder.data()[..len]);
        let done = folder.write(node, handle, at as u64, len);
        expect(
            "written",
            done.map_err(|e| e.failure("write"))? as u64,
            len as u64,
        )?;
        at += len;
    }
    Ok(())
}

fn verify_file(
    folder: &mut Folder,
    (node, handle): (u64, u64),
    seed: u64,
    prng: &mut Prng,
) -> Result<(), Failure> {
    let mut at = 0;
    while at < FILE_BYTES {
        let most = ((FILE_BYTES - at) / SECTOR).min(DATA_MAX / SECTOR) as u64;
        let len = prng.within(1, most) as usize * SECTOR;
        let got = folder.read(op::READ, node, handle, at as u64, len);
        expect(
            "read",
            got.map_err(|e| e.failure("read"))? as u64,
            len as u64,
        )?;
        let data = &folder.data()[..len];
        if let Some(byte) = pattern::first_wrong_byte(seed, (at / SECTOR) as u64, data) {
            return Err(Failure::Wrong {
                what: "data_at",
                got: (at + byte) as u64,
                expected: u64::MAX,
            });
        }
        at += len;
    }
    Ok(())
}

/// Everything once, then the folder is as it was but for `kept`, which holds the pattern of `seed`.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let names = machine.number("names", 200)?;
    let mut prng = Prng::new(seed);
    let mut folder = open(machine)?;
    let fault = |what| move |e: Refusal| e.failure(what);
    let before = folder.list(ROOT).map_err(fault("list"))?;
    let directory = folder
        .make_directory(ROOT, b"work")
        .map_err(fault("mkdir"))?;
    refused("mkdir_again", folder.make_directory(ROOT, b"work"), EEXIST)?;
    refused(
        "lookup_nothing",
        folder.lookup(directory, b"nothing"),
        ENOENT,
    )?;
    refused("lookup_above", folder.lookup(ROOT, b".."), 22)?;
    let made = folder.create(directory, b"new").map_err(fault("create"))?;
    refused("create_again", folder.create(directory, b"new"), EEXIST)?;
    write_file(&mut folder, made, seed, &mut prng)?;
    folder.sync(made.0, made.1, false).map_err(fault("fsync"))?;
    verify_file(&mut folder, made, seed, &mut prng)?;
    attributes(&mut folder, directory, made)?;
    let rename = folder.rename((directory, b"new"), (ROOT, b"kept"));
    rename.map_err(fault("rename"))?;
    refused("lookup_old", folder.lookup(directory, b"new"), ENOENT)?;
    // It is the same file, under its old handle.
    verify_file(&mut folder, made, seed, &mut prng)?;
    let found = folder.lookup(ROOT, b"kept").map_err(fault("lookup"))?;
    expect("same_node", found, made.0)?;
    expect("size", folder.told_size(), FILE_BYTES as u64)?;
    let release = folder.release(op::RELEASE, made.0, made.1);
    release.map_err(fault("release"))?;
    folder.forget(made.0, 2).map_err(fault("forget"))?;
    for n in 0..names {
        let made = folder
            .create(directory, &name_of(n))
            .map_err(fault("many"))?;
        let release = folder.release(op::RELEASE, made.0, made.1);
        release.map_err(fault("release"))?;
    }
    let many = folder.list(directory).map_err(fault("list"))?;
    expect("listed", many.0, names)?;
    for n in 0..names {
        let removed = folder.remove(op::UNLINK, directory, &name_of(n));
        removed.map_err(fault("unlink"))?;
    }
    folder
        .remove(op::RMDIR, ROOT, b"work")
        .map_err(fault("rmdir"))?;
    let after = folder.list(ROOT).map_err(fault("list"))?;
    expect("left", after.0, before.0 + 1)?;
    say!("share.end bytes={FILE_BYTES} seed={seed} names={}", many.1);
    Ok(())
}

/// What a file is besides its data. Everything but its mode and time is undone.
fn attributes(folder: &mut Folder, directory: u64, made: (u64, u64)) -> Result<(), Failure> {
    const SET_MODE: u32 = 1;
    const SET_OWNER: u32 = 2 | 4;
    const SET_SIZE: u32 = 8;
    const SET_MTIME: u32 = 32;
    const MTIME: u64 = 1_000_000_000;
    let fault = |what| move |e: Refusal| e.failure(what);
    let (node, handle) = made;
    let (size, _, _, links, owner) = folder.attributes(node).map_err(fault("getattr"))?;
    expect("file_size", size, FILE_BYTES as u64)?;
    expect("links", links.into(), 1)?;
    folder
        .sync(node, handle, true)
        .map_err(fault("fdatasync"))?;
    let longer = size + 4096;
    folder
        .allocate(node, handle, longer)
        .map_err(fault("fallocate"))?;
    let told = folder.attributes(node).map_err(fault("getattr"))?.0;
    expect("longer", told, longer)?;
    let which = SET_MODE | SET_OWNER | SET_SIZE | SET_MTIME;
    let set = folder.set(node, which, (size, MTIME, 0o640, owner));
    set.map_err(fault("setattr"))?;
    let (told, mtime, mode, ..) = folder.attributes(node).map_err(fault("getattr"))?;
    expect("size_set", told, size)?;
    expect("mtime_set", mtime, MTIME)?;
    expect("mode_set", mode.into(), 0o100_640)?;
    let other = (owner.0 ^ 1, owner.1);
    refused("chown", folder.set(node, 2, (0, 0, 0, other)), EPERM)?;
    let again = folder.name_again(node, directory, b"again");
    again.map_err(fault("link"))?;
    let links = folder.attributes(node).map_err(fault("getattr"))?.3;
    expect("links", links.into(), 2)?;
    let removed = folder.remove(op::UNLINK, directory, b"again");
    removed.map_err(fault("unlink"))?;
    // Its name is the one that is left.
    let found = folder.lookup(directory, b"new").map_err(fault("lookup"))?;
    expect("same_node", found, node)?;
    folder.forget(node, 2).map_err(fault("forget"))?;
    let target = b"/etc/passwd";
    let link = folder
        .link_to(directory, b"link", target)
        .map_err(fault("symlink"))?;
    let len = folder
        .ask(op::READLINK, link, &[], 0, 256)
        .map_err(fault("readlink"))?;
    expect("target_len", len as u64, target.len() as u64)?;
    for (at, byte) in target.iter().enumerate() {
        expect("target", folder.word::<u8>(at).into(), u64::from(*byte))?;
    }
    // It is the guest that follows links, in a tree of its own.
    refused("open_link", folder.open_node(op::OPEN, link, 0), EPERM)?;
    let removed = folder.remove(op::UNLINK, directory, b"link");
    removed.map_err(fault("unlink"))?;
    folder
        .ask(op::STATFS, ROOT, &[], 0, 80)
        .map_err(fault("statfs"))?;
    let blocks: u64 = folder.word(0);
    expect("has_blocks", u64::from(blocks > 0), 1)
}

/// Rounds of making, writing, verifying, renaming and removing until the time is over. No round may show an
/// error, whatever was killed meanwhile.
pub fn load(machine: &Machine) -> Result<(), Failure> {
    let first_seed = machine.number("seed", 1)?;
    let seconds = machine.number("seconds", 5)?;
    let mut prng = Prng::new(first_seed);
    let mut folder = open(machine)?;
    let fault = |what| move |e: Refusal| e.failure(what);
    let held = folder.create(ROOT, b"held").map_err(fault("create"))?;
    write_file(&mut folder, held, first_seed, &mut prng)?;
    let directory = folder
        .make_directory(ROOT, b"work")
        .map_err(fault("mkdir"))?;
    say!("share-load.begin seconds={seconds}");
    let end = Deadline::after_ms(seconds.saturating_mul(1000));
    let mut rounds = 0;
    while rounds == 0 || !end.passed() {
        let seed = first_seed + rounds + 1;
        let name = name_of(seed);
        let made = folder.create(directory, &name).map_err(fault("create"))?;
        // Written anew in the middle: what is done again must not undo what came after it.
        write_file(&mut folder, made, !seed, &mut prng)?;
        write_file(&mut folder, made, seed, &mut prng)?;
        folder.sync(made.0, made.1, false).map_err(fault("fsync"))?;
        verify_file(&mut folder, made, seed, &mut prng)?;
        for n in 0..8 {
            let short = [b'a' + n];
            let inner = folder
                .make_directory(directory, &short)
                .map_err(fault("mkdir"))?;
            let to = folder.rename((directory, &name), (inner, b"in"));
            to.map_err(fault("rename_in"))?;
            let back = folder.rename((inner, b"in"), (directory, &name));
            back.map_err(fault("rename_out"))?;
            let removed = folder.remove(op::RMDIR, directory, &short);
            removed.map_err(fault("rmdir"))?;
            folder.forget(inner, 1).map_err(fault("forget"))?;
        }
        let listed = folder.list(directory).map_err(fault("list"))?;
        expect("listed", listed.0, 1)?;
        let release = folder.release(op::RELEASE, made.0, made.1);
        release.map_err(fault("release"))?;
        let kept = folder.rename((directory, &name), (ROOT, b"kept"));
        kept.map_err(fault("rename"))?;
        folder.forget(made.0, 1).map_err(fault("forget"))?;
        // Open since before the first round.
        verify_file(&mut folder, held, first_seed, &mut prng)?;
        rounds += 1;
    }
    let seed = first_seed + rounds;
    say!("share-load.end rounds={rounds} bytes={FILE_BYTES} seed={seed} held={first_seed}");
    Ok(())
}

/// Reads `kept`, which holds the pattern of `seed`.
pub fn look(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let mut prng = Prng::new(seed);
    let mut folder = open(machine)?;
    let fault = |what| move |e: Refusal| e.failure(what);
    let end = Deadline::after_ms(super::timeout_ms(machine)?);
    // Another machine may be about to put it there.
    let node = loop {
        match folder.lookup(ROOT, b"kept") {
            Err(Refusal::Errno(ENOENT)) if !end.passed() => {}
            found => break found.map_err(fault("lookup"))?,
        }
    };
    let handle = folder.open_node(op::OPEN, node, 0).map_err(fault("open"))?;
    verify_file(&mut folder, (node, handle), seed, &mut prng)?;
    say!("share-look.end seed={seed}");
    Ok(())
}

/// Reads what is there, and is refused every change.
pub fn refusals(machine: &Machine) -> Result<(), Failure> {
    look(machine)?;
    crate::virtio::mmio::reset_all(machine);
    let mut folder = open(machine)?;
    let node = folder
        .lookup(ROOT, b"kept")
        .map_err(|e| e.failure("lookup"))?;
    refused("create", folder.create(ROOT, b"new"), EROFS)?;
    refused("mkdir", folder.make_directory(ROOT, b"new"), EROFS)?;
    refused("unlink", folder.remove(op::UNLINK, ROOT, b"kept"), EROFS)?;
    refused(
        "rename",
        folder.rename((ROOT, b"kept"), (ROOT, b"new")),
        EROFS,
    )?;
    refused("open", folder.open_node(op::OPEN, node, 1), EROFS)?;
    refused("truncate", folder.open_node(op::OPEN, node, 0o1000), EROFS)?;
    say!("share-refused.end");
    Ok(())
}
