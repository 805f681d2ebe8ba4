//! Descriptors that the client which starts the service happens to have open.
#![allow(unsafe_code)] // Closing a descriptor by its number is the caller's promise that no one owns it.

/// Closes everything but the standard streams. A script that holds a lock by a descriptor would otherwise share it with the
/// service, and with it for as long as any VM runs. For the first line of `main`, before anything is opened.
pub(crate) fn close_inherited() {
    // SAFETY: nothing in this process has opened a descriptor yet, so that none of those closed has an owner here.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}
