//! The nodes that the guest knows: for each its number, where it was last seen (parent and name) and
//! which file it is. Nothing here touches the file system.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use nix::errno::Errno;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// The folder itself (FUSE_ROOT_ID).
pub(crate) const ROOT: u64 = 1;
/// Nodes that a guest may know at a time; it is told ENFILE past that.
pub(crate) const NODES_MAX: usize = 1 << 18;
/// Numbers that a predecessor may have given out end here: counting on cannot overflow.
pub(crate) const NUMBERS_END: u64 = 1 << 62;
/// Bytes that their names may have together: what is kept for a successor has room for so much.
const NAMES_BYTES_MAX: usize = 16 << 20;
/// Bytes of a path below the folder (PATH_MAX).
const PATH_BYTES_MAX: usize = 4095;

/// Which file: its device and inode number on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

#[derive(Debug)]
struct Node {
    parent: u64,
    name: OsString,
    identity: Identity,
    /// How often the guest was told of it and has not forgotten that.
    lookups: u64,
    /// Nodes whose parent it is; it stays as long as they need it for their paths.
    children: usize,
}

/// All nodes of one folder.
#[derive(Debug)]
pub(crate) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_identity: HashMap<Identity, u64>,
    root: Identity,
    next: u64,
    names_bytes: usize,
}

/// A node, to be kept for a successor.
#[derive(Debug)]
pub(crate) struct NodeView<'a> {
    pub(crate) id: u64,
    pub(crate) parent: u64,
    pub(crate) name: &'a OsStr,
    pub(crate) identity: Identity,
    pub(crate) lookups: u64,
    /// Whether its identity leads to it.
    pub(crate) known: bool,
}

impl Nodes {
    pub(crate) fn new(root: Identity) -> Self {
        let (nodes, by_identity) = (HashMap::new(), HashMap::new());
        Self {
            nodes,
            by_identity,
            root,
            next: ROOT + 1,
            names_bytes: 0,
        }
    }

    /// Number of nodes without the root.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Which file the node is, or ESTALE.
    pub(crate) fn identity(&self, id: u64) -> Result<Identity, Errno> {
        if id == ROOT {
            return Ok(self.root);
        }
        self.nodes.get(&id).map(|n| n.identity).ok_or(Errno::ESTALE)
    }

    /// The path of the node below the folder; empty for the root.
    pub(crate) fn path(&self, mut id: u64) -> Result<PathBuf, Errno> {
        let mut names: Vec<&OsStr> = Vec::new();
        let mut bytes = 0;
        while id != ROOT {
            let node = self.nodes.get(&id).ok_or(Errno::ESTALE)?;
            bytes += node.name.len() + 1;
            if bytes > PATH_BYTES_MAX {
                return Err(Errno::ENAMETOOLONG);
            }
            names.push(&node.name);
            id = node.parent;
        }
        Ok(names.into_iter().rev().collect())
    }

    /// Parent and name of the node; the root has none (EBUSY).
    pub(crate) fn place(&self, id: u64) -> Result<(u64, &OsStr), Errno> {
        if id == ROOT {
            return Err(Errno::EBUSY);
        }
        let node = self.nodes.get(&id).ok_or(Errno::ESTALE)?;
        Ok((node.parent, &node.name))
    }

    /// The guest is told of `identity` at `name` in `parent`: its number, new or old.
    pub(crate) fn told(
        &mut self,
        parent: u64,
        name: &OsStr,
        identity: Identity,
    ) -> Result<u64, Errno> {
        if identity == self.root {
            return Err(Errno::ELOOP);
        }
        if let Some(&id) = self.by_identity.get(&identity) {
            self.moved(identity, parent, name);
            if let Some(node) = self.nodes.get_mut(&id) {
                node.lookups = node.lookups.saturating_add(1);
            }
            return Ok(id);
        }
        if self.nodes.len() >= NODES_MAX || self.names_bytes + name.len() > NAMES_BYTES_MAX {
            return Err(Errno::ENFILE);
        }
        let id = self.next;
        self.next += 1;
        self.names_bytes += name.len();
        let name = name.to_owned();
        self.nodes.insert(
            id,
            Node {
                parent,
                name,
                identity,
                lookups: 1,
                children: 0,
            },
        );
        self.by_identity.insert(identity, id);
        self.adopt(parent);
        Ok(id)
    }

    /// What `identity` is, if the guest knows it, is at `name` in `parent` now.
    pub(crate) fn moved(&mut self, identity: Identity, parent: u64, name: &OsStr) {
        let Some(&id) = self.by_identity.get(&identity) else {
            return;
        };
        // A place below itself is none: the host moved folders while this was looked up.
        let mut above = parent;
        while let Some(node) = self.nodes.get(&above) {
            if above == id {
                return;
            }
            above = node.parent;
        }
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let old = std::mem::replace(&mut node.parent, parent);
        self.names_bytes = self.names_bytes.saturating_sub(node.name.len()) + name.len();
        node.name = name.to_owned();
        if old != parent {
            self.adopt(parent);
            self.orphan(old);
        }
    }

    /// The name is gone: if it was where this file was last seen, another file may have its inode
    /// number soon, so the number no longer leads to this node.
    pub(crate) fn removed(&mut self, parent: u64, name: &OsStr, identity: Identity) {
        let Some(&id) = self.by_identity.get(&identity) else {
            return;
        };
        if self
            .nodes
            .get(&id)
            .is_some_and(|n| n.parent == parent && n.name == name)
        {
            self.by_identity.remove(&identity);
        }
    }

    /// The guest forgets `count` times that it was told of the node.
    pub(crate) fn forget(&mut self, id: u64, count: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(count);
            self.drop_unused(id);
        }
    }

    /// The number that the next new node gets.
    pub(crate) const fn next(&self) -> u64 {
        self.next
    }

    /// Shows every node, each after its parent.
    pub(crate) fn each(&self, mut show: impl FnMut(NodeView<'_>)) {
        let mut shown = HashSet::new();
        let mut above = Vec::new();
        for &id in self.nodes.keys() {
            let mut at = id;
            while at != ROOT && !shown.contains(&at) {
                let Some(node) = self.nodes.get(&at) else {
                    break;
                };
                above.push((at, node));
                at = node.parent;
            }
            while let Some((id, node)) = above.pop() {
                shown.insert(id);
                show(NodeView {
                    id,
                    parent: node.parent,
                    name: &node.name,
                    identity: node.identity,
                    lookups: node.lookups,
                    known: self.by_identity.get(&node.identity) == Some(&id),
                });
            }
        }
    }

    /// Puts a node that a predecessor has told the guest of. None when that cannot be: parents come first, so
    /// that no path goes round in a circle.
    pub(crate) fn restore(
        &mut self,
        id: u64,
        parent: u64,
        name: &OsStr,
        identity: Identity,
        lookups: u64,
        known: bool,
    ) -> Option<()> {
        let has_parent = parent == ROOT || self.nodes.contains_key(&parent);
        let fits = self.nodes.len() < NODES_MAX && self.names_bytes + name.len() <= NAMES_BYTES_MAX;
        let is_new = id > ROOT && id < NUMBERS_END && !self.nodes.contains_key(&id);
        if !(has_parent && fits && is_new) || identity == self.root {
            return None;
        }
        if known && self.by_identity.insert(identity, id).is_some() {
            return None;
        }
        self.names_bytes += name.len();
        self.next = self.next.max(id + 1);
        let node = Node {
            parent,
            name: name.to_owned(),
            identity,
            lookups,
            children: 0,
        };
        self.nodes.insert(id, node);
        self.adopt(parent);
        Some(())
    }

    /// Sets the number that the next new node gets, after all were put.
    pub(crate) fn restore_next(&mut self, next: u64) -> Option<()> {
        if !(self.next..NUMBERS_END).contains(&next) {
            return None;
        }
        self.next = next;
        Some(())
    }

    fn adopt(&mut self, parent: u64) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children += 1;
        }
    }

    fn orphan(&mut self, parent: u64) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
            self.drop_unused(parent);
        }
    }

    fn drop_unused(&mut self, mut id: u64) {
        while self
            .nodes
            .get(&id)
            .is_some_and(|n| n.lookups == 0 && n.children == 0)
        {
            let Some(node) = self.nodes.remove(&id) else {
                return;
            };
            self.names_bytes = self.names_bytes.saturating_sub(node.name.len());
            if self.by_identity.get(&node.identity) == Some(&id) {
                self.by_identity.remove(&node.identity);
            }
            id = node.parent;
            if let Some(parent) = self.nodes.get_mut(&id) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]
    use super::*;
    use proptest::prelude::*;

    fn file(ino: u64) -> Identity {
        Identity { dev: 1, ino }
    }

    #[test]
    fn parent_is_kept_as_long_as_a_child_needs_its_path() {
        let mut nodes = Nodes::new(file(0));
        let a = nodes.told(ROOT, OsStr::new("a"), file(1)).unwrap();
        let b = nodes.told(a, OsStr::new("b"), file(2)).unwrap();
        nodes.forget(a, 1);
        assert_eq!(nodes.path(b).unwrap(), PathBuf::from("a/b"));
        nodes.forget(b, 1);
        assert_eq!(nodes.len(), 0);
        assert_eq!(nodes.path(b), Err(Errno::ESTALE));
    }

    proptest! {
        #[test]
        fn every_path_ends_and_everything_forgotten_is_gone(
            steps in prop::collection::vec((0u8..4, 0u64..12, 1u64..12), 0..120),
        ) {
            let mut nodes = Nodes::new(file(0));
            let mut known = vec![ROOT];
            for (what, at, ino) in steps {
                let at = known[usize::try_from(at).unwrap() % known.len()];
                let name = OsString::from(ino.to_string());
                match what {
                    0 => if nodes.identity(at).is_ok() {
                        known.push(nodes.told(at, &name, file(ino)).unwrap());
                    },
                    1 => if nodes.identity(at).is_ok() { nodes.moved(file(ino), at, &name) },
                    2 => nodes.removed(at, &name, file(ino)),
                    _ => nodes.forget(at, 1),
                }
                for &id in &known {
                    let _ = nodes.path(id);
                }
            }
            for id in known {
                nodes.forget(id, u64::MAX);
            }
            prop_assert_eq!(nodes.len(), 0);
            prop_assert!(nodes.by_identity.is_empty());
        }
    }
}
