//! VD, virtual disks: the image files behind hard disks, CDs and floppies.
//!
//! * [`Image`] is an opened image: positioned reads and writes of virtual bytes, flush, discard.
//! * A *layout* (one module per format) only says where virtual ranges lie in the file; moving the bytes is `image`'s.
//! * [`probe`] tells a file's format by its content. It is for files a user names for the first time: an image whose
//!   format is on record is opened as that and never probed, because a guest can write any header into a raw disk.
//! * [`Queue`] runs requests on threads, for controllers.
//!
//! **Formats.** Raw (disks, ISO images, floppies, block devices), VDI, VHD (both dynamic, fixed, differencing), VMDK (one sparse
//! file, flat, split, raw disk, differencing; stream-optimized for reading, written by [`write_stream_optimized`]), QCOW2 (with backing
//! files), VHDX (dynamic, fixed, differencing), Parallels; for reading QCOW, QED and DMG. A disk of an iSCSI target stands where a raw
//! image would ([`Source`], [`Target`]).
//!
//! **Durability.** [`Image::flush`] returns when every write that had returned before is on stable storage together
//! with the metadata that finds it. Metadata goes to the file only after the data it refers to is stable, so a power
//! cut at any moment leaves an image that opens and holds everything flushed.

mod bitmaps;
mod copy;
mod create;
mod crypt;
mod dmg;
mod error;
mod fat;
mod file;
mod format;
mod image;
mod iscsi;
mod maintain;
#[cfg(test)]
mod power_cut;

mod parallels;
mod qcow;
mod qed;
mod queue;
mod raw;
mod recrypt;
mod ring;
mod two_level;
mod units;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

pub use copy::{Progress, clone, clone_encrypted, copy, write_stream_optimized};
pub use create::{CreateOptions, can_create, create, create_child, create_raw_disk};
pub use crypt::{Algorithm, Dek, KeyStore, KeyStoreError};
pub use error::Error;
pub use fat::format_fat;
pub use format::{Format, Ids, Variant, probe};
pub use image::{Image, MediumInfo, OpenMode, Source, delete, files, info, open_chain};
pub use iscsi::{SettingsError, Target};
pub use maintain::{compact, merge_down, merge_up, rename, repair, resize, set_ids};
pub use queue::{Done, Op, Queue};
pub use recrypt::Recrypted;

/// Opens, reads, writes and mends an image of untrusted content in memory, for fuzzing: `len` bytes long, zeros but for `pieces`.
#[doc(hidden)]
pub fn exercise(format: Format, len: u64, pieces: &[(u64, &[u8])]) {
    image::exercise(format, len, pieces);
}

/// Has an iSCSI target of untrusted answers work in memory, for fuzzing. The first byte says how `input` is taken.
#[doc(hidden)]
pub fn exercise_iscsi(input: &[u8]) {
    iscsi::exercise(input);
}
