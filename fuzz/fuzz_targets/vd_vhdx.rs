//! VHDX images: whatever the bytes, opening, reading, writing, discarding, flushing and mending neither panics nor takes memory that
//! the file's size does not justify.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::image(vd::Format::Vhdx, bytes));
