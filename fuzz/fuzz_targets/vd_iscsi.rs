//! A target of iSCSI: whatever it answers to a login and to commands, the initiator neither panics nor hangs nor takes memory that the
//! commands do not justify.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vd::exercise_iscsi(bytes));
