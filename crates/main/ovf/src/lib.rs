//! OVF, the Open Virtualization Format (DMTF DSP0243): machines packed for transport.
//!
//! * [`Package`] is what a user names: an `.ovf` file with its images beside it, or all of it in one `.ova` (a tar archive). It
//!   checks the manifest and only ever reads members that lie inside the package.
//! * [`Envelope`] is what the descriptor says, for OVF 0.9 (as VMware and Citrix wrote it), 1.0, 1.1 and 2.0; [`Envelope::parse`] reads it.
//! * [`write()`] makes a descriptor from machines' settings; [`Archive`] packs files.
//!
//! VirtualBox's own descriptors hold the whole machine once more as `vbox:Machine`, in the form of a settings file; it wins over
//! what the portable part says.
//!
//! Everything here is untrusted input: sizes are limited before anything is allocated, and names that are no plain relative
//! paths are refused.

#![forbid(unsafe_code)]

mod cim;
mod envelope;
mod error;
mod machine;
mod manifest;
mod package;
mod reader;
mod writer;

pub use cim::{cim_of, os_type_of};
pub use envelope::{
    Adapter, Controller, ControllerKind, Disk, DiskFormat, Drive, Envelope, FileRef, VirtualSystem,
};
pub use error::Error;
pub use manifest::{Algorithm, Digest, Manifest};
pub use package::{Archive, Package, member_name};
pub use writer::{OvfVersion, Product, System, SystemDisk, write};
