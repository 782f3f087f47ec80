//! Processes and the things that they reach, as a graph: the things that two processes reach are what
//! connects them.

use super::descriptors::Object;
use super::{Authority, Measured};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a thing is, as far as rules and pictures care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sort {
    /// A file, block device or character device.
    File,
    /// Shared memory.
    Memory,
    /// An eventfd.
    Doorbell,
    /// A pair of sockets, or one without a peer.
    Socket,
    /// A pipe.
    Pipe,
    /// Something that one process has to itself.
    Own,
}

/// That a process reaches a thing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reach {
    /// The process.
    pub process: String,
    /// `r`, `w` or `rw`: everything that its descriptors and mappings of the thing permit together.
    pub access: String,
    /// Numbers of its descriptors; empty when it only maps the thing.
    pub descriptors: Vec<i32>,
    /// Whether it maps the thing.
    pub mapped: bool,
}

/// A thing that processes reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thing {
    /// What it is, in words.
    pub label: String,
    /// What it is, for rules.
    pub sort: Sort,
    /// Whether every process has it, as it is nothing: `/dev/null`.
    pub is_common: bool,
    /// Who reaches it.
    pub reached_by: Vec<Reach>,
}

impl Thing {
    /// Whether a gate and its device may share it.
    #[must_use]
    pub const fn is_channel(&self) -> bool {
        matches!(self.sort, Sort::Memory | Sort::Doorbell)
    }

    /// Whether it is a file or device.
    #[must_use]
    pub const fn is_file(&self) -> bool {
        matches!(self.sort, Sort::File)
    }

    /// Whether it is a device's window.
    #[must_use]
    pub fn is_window(&self) -> bool {
        self.label.starts_with("bulkhead-window")
    }

    /// The processes that reach it.
    #[must_use]
    pub fn processes(&self) -> Vec<&str> {
        let names = self.reached_by.iter();
        names.map(|reach| reach.process.as_str()).collect()
    }
}

/// The graph of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Graph {
    /// The processes.
    pub processes: Vec<String>,
    /// The things.
    pub things: Vec<Thing>,
}

/// What makes two descriptors reach the same thing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    File(u64, u64),
    Device(u64, u64),
    Memory(u64),
    Doorbell(u64),
    Sockets(u64, u64),
    Pipe(u64),
    Own(String, i32),
}

impl Graph {
    /// The graph of what was measured.
    #[must_use]
    pub fn of(authority: &Authority) -> Self {
        let mut things: BTreeMap<Identity, Thing> = BTreeMap::new();
        for process in &authority.processes {
            add_descriptors(process, &mut things);
        }
        for process in &authority.processes {
            add_mappings(process, &mut things);
        }
        Self {
            processes: authority.processes.iter().map(|p| p.name.clone()).collect(),
            things: things.into_values().collect(),
        }
    }

    /// Things that the same processes reach, in bundles, by those processes.
    #[must_use]
    pub fn bundles(&self) -> BTreeMap<Vec<&str>, Vec<&Thing>> {
        let mut bundles: BTreeMap<Vec<&str>, Vec<&Thing>> = BTreeMap::new();
        for thing in self.things.iter().filter(|thing| !thing.is_common) {
            bundles.entry(thing.processes()).or_default().push(thing);
        }
        bundles
    }

    /// The graph in the language of Graphviz.
    #[must_use]
    pub fn dot(&self) -> String {
        let mut text =
            "graph authority {\n  rankdir=LR;\n  node [fontname=\"sans-serif\"];\n".to_owned();
        // Writing to a string cannot fail.
        for process in &self.processes {
            let name = quoted(process);
            let _infallible = writeln!(text, "  {name} [shape=box, style=bold];");
        }
        for (number, thing) in self.things.iter().filter(|t| !t.is_common).enumerate() {
            let shape = match thing.sort {
                Sort::File => "note",
                Sort::Memory => "cylinder",
                Sort::Doorbell => "point",
                Sort::Socket | Sort::Pipe => "cds",
                Sort::Own => "ellipse",
            };
            let label = quoted(&thing.label);
            let _infallible = writeln!(text, "  t{number} [shape={shape}, label={label}];");
            for reach in &thing.reached_by {
                let (process, access) = (quoted(&reach.process), quoted(&reach.access));
                let _infallible = writeln!(text, "  {process} -- t{number} [label={access}];");
            }
        }
        text.push_str("}\n");
        text
    }
}

/// A string of the DOT language.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn add_descriptors(process: &Measured, things: &mut BTreeMap<Identity, Thing>) {
    for descriptor in process.descriptors.iter().flatten() {
        let (identity, label, sort) = identify(process, descriptor.number, &descriptor.of);
        let thing = things.entry(identity).or_insert_with(|| Thing {
            is_common: label == "/dev/null",
            label,
            sort,
            reached_by: Vec::new(),
        });
        let reach = reach(thing, &process.name);
        reach.descriptors.push(descriptor.number);
        widen(reach, descriptor.access);
    }
}

fn add_mappings(process: &Measured, things: &mut BTreeMap<Identity, Thing>) {
    for mapping in process.memory.iter().flat_map(|memory| &memory.mappings) {
        let Some(name) = mapping
            .of
            .strip_prefix("/memfd:")
            .filter(|_| mapping.shared)
        else {
            continue;
        };
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        let identity = Identity::Memory(mapping.inode);
        let thing = things.entry(identity).or_insert_with(|| Thing {
            label: memory_label(name, mapping.bytes),
            sort: Sort::Memory,
            is_common: false,
            reached_by: Vec::new(),
        });
        let reach = reach(thing, &process.name);
        reach.mapped = true;
        widen(reach, if mapping.is_writable() { "rw" } else { "r" });
    }
}

fn memory_label(name: &str, bytes: u64) -> String {
    format!("{name}, {} KiB", bytes >> 10)
}

/// What the process has of the thing so far.
fn reach<'a>(thing: &'a mut Thing, process: &str) -> &'a mut Reach {
    let known = thing.reached_by.iter().position(|r| r.process == process);
    let place = known.unwrap_or_else(|| {
        thing.reached_by.push(Reach {
            process: process.to_owned(),
            access: String::new(),
            descriptors: Vec::new(),
            mapped: false,
        });
        thing.reached_by.len() - 1
    });
    &mut thing.reached_by[place]
}

fn widen(reach: &mut Reach, access: &str) {
    let both = ['r', 'w'].into_iter();
    let all = both.filter(|&c| access.contains(c) || reach.access.contains(c));
    reach.access = all.collect();
}

fn identify(process: &Measured, number: i32, of: &Object) -> (Identity, String, Sort) {
    let own = |label: String| {
        let identity = Identity::Own(process.name.clone(), number);
        (identity, label, Sort::Own)
    };
    match of {
        Object::File {
            path,
            device,
            inode,
            block,
        } => {
            let identity = match block {
                true => Identity::Device(*device, 1),
                false => Identity::File(*device, *inode),
            };
            (identity, path.clone(), Sort::File)
        }
        Object::Folder {
            path,
            device,
            inode,
        } => (Identity::File(*device, *inode), path.clone(), Sort::File),
        Object::CharDevice { path, device } => {
            let number = device.0 << 32 | device.1;
            (Identity::Device(number, 0), path.clone(), Sort::File)
        }
        Object::Memfd {
            name, inode, bytes, ..
        } => {
            let label = memory_label(name, *bytes);
            (Identity::Memory(*inode), label, Sort::Memory)
        }
        Object::Eventfd { id } => {
            let label = format!("doorbell {id}");
            (Identity::Doorbell(*id), label, Sort::Doorbell)
        }
        Object::Pipe { inode } => {
            let label = format!("pipe {inode}");
            (Identity::Pipe(*inode), label, Sort::Pipe)
        }
        Object::Socket {
            inode,
            kind,
            listening,
            peer,
        } => {
            let (low, high) = match peer {
                Some(peer) => (*inode.min(peer), *inode.max(peer)),
                None => (*inode, 0),
            };
            let how = if *listening { "listening " } else { "" };
            let label = format!("{how}{kind} socket {low}");
            (Identity::Sockets(low, high), label, Sort::Socket)
        }
        Object::Epoll { .. } => own("epoll".to_owned()),
        Object::IoUring { files, .. } => own(format!("io_uring on {}", files.join(", "))),
        Object::KvmVm => own("the virtual machine of KVM".to_owned()),
        Object::KvmVcpu { index } => own(format!("vCPU {index} of KVM")),
        Object::Other { name } => own(name.clone()),
    }
}
