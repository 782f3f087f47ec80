//! `bench-fs`: operations of one kind in a shared folder, one request at a time, completions polled from
//! ring 3.
//!
//! `op=meta` makes a file, looks its name up, asks for its attributes and removes it, again and again. `op=read`
//! and `op=write` go through one file from its start to its end, and begin anew. Its content has been written
//! before the measurement, so that neither finds holes, and is verified after it.

use bulkhead_guest::pattern::{self, SECTOR};

use super::share::name_of;
use crate::machine::Machine;
use crate::report::{Failure, expect, say};
use crate::sys::time;
use crate::virtio::fs::{DATA_MAX, Folder, ROOT, Refusal, op};

/// The operations of a round of `op=meta` that are counted. That the file is closed and forgotten belongs to the
/// round, as a kernel would do both, but Linux waits for neither.
const COUNTED: u64 = 4;
/// Rounds before the first that is measured.
const WARM_ROUNDS: u64 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Meta,
    Read,
    Write,
}

/// What a measurement did.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    operations: u64,
    bytes: u64,
    cycles: u64,
}

/// An open file of whole requests.
#[derive(Debug, Clone, Copy)]
struct File {
    node: u64,
    handle: u64,
    bs: usize,
    pieces: u64,
}

/// Measures one run.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let name = machine.args().text("op").unwrap_or("meta");
    let chosen = match name {
        "meta" => Op::Meta,
        "read" => Op::Read,
        "write" => Op::Write,
        _ => return Err(Failure::Parameter("op")),
    };
    let bs = machine.number("bs", DATA_MAX as u64)? as usize;
    if bs == 0 || bs > DATA_MAX || !bs.is_multiple_of(SECTOR) {
        return Err(Failure::Parameter("bs"));
    }
    let pieces = machine.number("size", 64 << 20)? / bs as u64;
    if pieces == 0 {
        return Err(Failure::Parameter("size"));
    }
    let seed = machine.number("seed", 1)?;
    // Measured now if CPUID does not tell: nothing may come between the last request and its record.
    let khz = time::khz();
    let cycles = machine.number("seconds", 1)?.saturating_mul(1000 * khz);
    let timeout_ms = super::timeout_ms(machine)?;
    let mut folder = Folder::open(machine, machine.number("disk", 0)?, timeout_ms)?;
    let begin = || say!("bench-fs.begin op={name} bs={bs} pieces={pieces}");
    let done = match chosen {
        Op::Meta => {
            for number in 0..WARM_ROUNDS {
                round(&mut folder, number)?;
            }
            begin();
            meta(&mut folder, cycles)?
        }
        Op::Read | Op::Write => {
            let file = make(&mut folder, seed, bs, pieces)?;
            begin();
            let done = transfer(&mut folder, file, chosen, cycles)?;
            finish(&mut folder, file, seed, done)?;
            done
        }
    };
    say!(
        "bench-fs.done op={name} operations={} bytes={} cycles={} tsc_khz={khz}",
        done.operations,
        done.bytes,
        done.cycles
    );
    Ok(())
}

/// Told at once, for a host that takes the time by it.
fn end(start: u64, operations: u64, bytes: u64) -> Done {
    let cycles = time::cycles() - start;
    say!("bench-fs.end operations={operations} bytes={bytes}");
    Done {
        operations,
        bytes,
        cycles,
    }
}

fn fault(what: &'static str) -> impl Fn(Refusal) -> Failure {
    move |refusal| refusal.failure(what)
}

/// One file from its creation to its end.
fn round(folder: &mut Folder, number: u64) -> Result<(), Failure> {
    let name = name_of(number);
    let (node, handle) = folder.create(ROOT, &name).map_err(fault("create"))?;
    let found = folder.lookup(ROOT, &name).map_err(fault("lookup"))?;
    expect("same_node", found, node)?;
    let about = folder.attributes(node).map_err(fault("getattr"))?;
    expect("links", about.3.into(), 1)?;
    folder
        .release(op::RELEASE, node, handle)
        .map_err(fault("release"))?;
    folder
        .remove(op::UNLINK, ROOT, &name)
        .map_err(fault("unlink"))?;
    folder.forget(node, 2).map_err(fault("forget"))
}

fn meta(folder: &mut Folder, cycles: u64) -> Result<Done, Failure> {
    let start = time::cycles();
    let mut rounds = 0;
    while rounds == 0 || time::cycles() - start < cycles {
        round(folder, WARM_ROUNDS + rounds)?;
        rounds += 1;
    }
    Ok(end(start, rounds * COUNTED, 0))
}

/// Makes the file, of pieces that all hold the same.
fn make(folder: &mut Folder, seed: u64, bs: usize, pieces: u64) -> Result<File, Failure> {
    let (node, handle) = folder.create(ROOT, b"file").map_err(fault("create"))?;
    let file = File {
        node,
        handle,
        bs,
        pieces,
    };
    pattern::fill(seed, 0, &mut folder.data()[..bs]);
    for piece in 0..pieces {
        one(folder, file, Op::Write, piece)?;
    }
    Ok(file)
}

/// One request. What is written is what the buffer holds.
fn one(folder: &mut Folder, file: File, chosen: Op, piece: u64) -> Result<(), Failure> {
    let (node, handle, bs) = (file.node, file.handle, file.bs);
    let offset = piece * bs as u64;
    let moved = if chosen == Op::Write {
        folder.write(node, handle, offset, bs)
    } else {
        folder.read(op::READ, node, handle, offset, bs)
    };
    let moved = moved.map_err(fault("transfer"))?;
    expect("transferred", moved as u64, bs as u64)
}

fn transfer(folder: &mut Folder, file: File, chosen: Op, cycles: u64) -> Result<Done, Failure> {
    let start = time::cycles();
    let mut done = 0;
    while done == 0 || time::cycles() - start < cycles {
        one(folder, file, chosen, done % file.pieces)?;
        done += 1;
    }
    Ok(end(start, done, done * file.bs as u64))
}

/// What the last request left in the buffer, and the whole file, are what was written. Then it is removed.
fn finish(folder: &mut Folder, file: File, seed: u64, done: Done) -> Result<(), Failure> {
    let bs = file.bs as u64;
    verify(folder, file, seed, (done.operations - 1) % file.pieces * bs)?;
    for piece in 0..file.pieces {
        one(folder, file, Op::Read, piece)?;
        verify(folder, file, seed, piece * bs)?;
    }
    folder
        .release(op::RELEASE, file.node, file.handle)
        .map_err(fault("release"))?;
    folder
        .remove(op::UNLINK, ROOT, b"file")
        .map_err(fault("unlink"))?;
    folder.forget(file.node, 1).map_err(fault("forget"))
}

/// The buffer holds what was written, from the file's place `at` on.
fn verify(folder: &mut Folder, file: File, seed: u64, at: u64) -> Result<(), Failure> {
    match pattern::first_wrong_byte(seed, 0, &folder.data()[..file.bs]) {
        None => Ok(()),
        Some(byte) => Err(Failure::Wrong {
            what: "data_at",
            got: at + byte as u64,
            expected: u64::MAX,
        }),
    }
}
