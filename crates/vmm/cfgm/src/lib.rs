//! CFGM, the configuration manager: the tree of values with which users override what the VM is built with.
//!
//! The values come from a machine's extra data: the key `VBoxInternal/Devices/pcbios/0/Config/DmiSystemVendor` is the value
//! `DmiSystemVendor` of the node `Devices/pcbios/0/Config` (manual, "Extra data"). Components query their node by typed calls; what
//! nobody asked for in a node that a component did ask is a mistake of the user's and is told with the nearest name that would
//! have been understood. As in VirtualBox a value is an integer if it reads as one (decimal, 0x hexadecimal, 0 octal), unless it begins
//! with `string:`; `bytes:` introduces base64, which no component takes here.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// The prefix of extra-data keys that belong here.
pub const PREFIX: &str = "VBoxInternal/";

/// Names less alike than this are not proposed.
const ALIKE: f64 = 0.6;

/// What is wrong with an override.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the extra-data key {PREFIX}{path} has the value \"{value}\", which is not {wanted}")]
    WrongType { path: String, value: String, wanted: &'static str },
    #[error("the extra-data key {PREFIX}{path} is not known{}", nearest.as_ref().map_or(String::new(), |n| format!("; the nearest is {PREFIX}{n}")))]
    Unknown { path: String, nearest: Option<String> },
}

/// The overrides of one machine.
#[derive(Debug, Default)]
pub struct Tree {
    values: BTreeMap<String, String>,
    asked: RefCell<BTreeSet<String>>,
}

/// A node of the tree. A node without values is there all the same.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    tree: &'a Tree,
    path: &'a str,
}

impl Tree {
    /// Takes the keys under [`PREFIX`] out of a machine's extra data. Empty values count as not set.
    pub fn from_extra_data<'a>(data: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let values = data
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?.to_owned(), value.clone())))
            .collect();
        Self { values, asked: RefCell::default() }
    }

    /// The node at `path`, such as `Devices/pcbios/0/Config`.
    pub fn node<'a>(&'a self, path: &'a str) -> Node<'a> {
        Node { tree: self, path }
    }

    /// Splits what nobody has asked for into mistakes (in nodes that were asked for other values) and keys of nodes that no
    /// component knows, which VirtualBox ignores too.
    pub fn unused(&self) -> (Vec<Error>, Vec<String>) {
        let asked = self.asked.borrow();
        let nodes: BTreeSet<&str> = asked.iter().filter_map(|path| Some(path.rsplit_once('/')?.0)).collect();
        let (mut mistakes, mut ignored) = (Vec::new(), Vec::new());
        for path in self.values.keys().filter(|path| !asked.contains(*path)) {
            if path.rsplit_once('/').is_some_and(|(node, _)| nodes.contains(node)) {
                let nearest = asked
                    .iter()
                    .map(|known| (strsim::normalized_levenshtein(known, path), known))
                    .filter(|(likeness, _)| *likeness >= ALIKE)
                    .max_by(|a, b| a.0.total_cmp(&b.0))
                    .map(|(_, known)| known.clone());
                mistakes.push(Error::Unknown { path: path.clone(), nearest });
            } else {
                ignored.push(format!("{PREFIX}{path}"));
            }
        }
        (mistakes, ignored)
    }
}

impl<'a> Node<'a> {
    fn raw(&self, name: &str) -> Option<(String, &'a str)> {
        let path = format!("{}/{name}", self.path);
        let value = self.tree.values.get(&path).map(String::as_str);
        self.tree.asked.borrow_mut().insert(path.clone());
        Some((path, value?))
    }

    /// A text.
    pub fn string(&self, name: &str) -> Option<&'a str> {
        self.raw(name).map(|(_, value)| value.strip_prefix("string:").unwrap_or(value))
    }

    /// An unsigned integer.
    pub fn integer(&self, name: &str) -> Result<Option<u64>, Error> {
        let Some((path, value)) = self.raw(name) else { return Ok(None) };
        let parsed = match value.as_bytes() {
            [b'0', b'x' | b'X', ..] => u64::from_str_radix(&value[2..], 16),
            [b'0', _, ..] => u64::from_str_radix(&value[1..], 8),
            _ => value.parse(),
        };
        let wrong = || Error::WrongType { path, value: value.to_owned(), wanted: "an integer" };
        parsed.map(Some).map_err(|_| wrong())
    }

    /// A flag: an integer, zero for false.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, Error> {
        Ok(self.integer(name)?.map(|value| value != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(pairs: &[(&str, &str)]) -> Tree {
        let data: BTreeMap<String, String> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Tree::from_extra_data(&data)
    }

    #[test]
    fn values_are_found_by_node_and_name() {
        let t = tree(&[("VBoxInternal/EM/TripleFaultReset", "1"), ("GUI/Fullscreen", "on")]);
        assert_eq!(t.node("EM").flag("TripleFaultReset"), Ok(Some(true)));
        assert_eq!(t.node("EM").flag("Other"), Ok(None));
        assert_eq!(t.unused(), (vec![], vec![]));
    }

    #[test]
    fn integers_have_three_notations_and_texts_a_prefix() {
        let t = tree(&[
            ("VBoxInternal/A/h", "0x10"),
            ("VBoxInternal/A/o", "010"),
            ("VBoxInternal/A/s", "string:7"),
        ]);
        let a = t.node("A");
        assert_eq!((a.integer("h"), a.integer("o"), a.string("s")), (Ok(Some(16)), Ok(Some(8)), Some("7")));
        assert!(matches!(a.integer("s"), Err(Error::WrongType { .. })));
    }

    #[test]
    fn a_misspelt_key_is_told_with_the_nearest_one_and_a_foreign_node_is_ignored() {
        let t = tree(&[("VBoxInternal/EM/TripelFaultReset", "1"), ("VBoxInternal/Devices/foo/0/x", "1")]);
        let _ = t.node("EM").flag("TripleFaultReset");
        let (mistakes, ignored) = t.unused();
        let text = mistakes[0].to_string();
        assert!(text.ends_with("the nearest is VBoxInternal/EM/TripleFaultReset"), "{text}");
        assert_eq!(ignored, ["VBoxInternal/Devices/foo/0/x"]);
    }
}
