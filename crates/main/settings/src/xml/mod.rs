//! XML as settings files need it: a document tree that gives back every byte it was read from, a writer that
//! looks like VirtualBox's, and a merge that changes only what differs.

mod archive;
mod dom;
mod merge;

pub(crate) use archive::{Archive, Hex, Outcome, Value};
pub use dom::{Attribute, Document, Element, MAX_DEPTH, MAX_SIZE, Node};
pub(crate) use merge::merge;
