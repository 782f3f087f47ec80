//! What host and guest agent have in common, and the agent itself.
//!
//! The agent is a program inside a guest that does for its host what only somebody inside can do: run commands,
//! copy files, freeze file systems. `docs/agent.md` describes the protocol. [`wire`], [`copy`] and [`tree`] are used
//! by both ends, and each end takes the other for hostile: the host since its guest may have been taken over, the
//! agent since it writes as root where somebody else says.
//!
//! The agent keeps nothing between connections but which file systems are frozen, so it can be killed and
//! started again at any moment.

pub mod copy;
pub mod serve;
pub mod tree;
pub mod wire;
