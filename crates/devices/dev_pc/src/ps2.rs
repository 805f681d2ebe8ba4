//! The devices on the keyboard controller's two ports.

pub mod keyboard;
pub mod mouse;

use std::collections::VecDeque;

/// Writes a queue of bytes into a saved state.
fn save_queue(queue: &VecDeque<u8>, out: &mut ssm::Writer) {
    let (head, tail) = queue.as_slices();
    out.put_blob(&[head, tail].concat());
}

/// Takes back a queue of at most `limit` bytes.
fn load_queue(input: &mut ssm::Reader<'_>, limit: usize) -> Result<VecDeque<u8>, ssm::Error> {
    Ok(input.take_blob(limit)?.iter().copied().collect())
}

/// Takes back a command that awaits its argument.
fn load_command(input: &mut ssm::Reader<'_>) -> Result<Option<u8>, ssm::Error> {
    let some = input.take_bool()?;
    let command = input.take_u8()?;
    Ok(some.then_some(command))
}

/// Writes a command that awaits its argument.
fn save_command(command: Option<u8>, out: &mut ssm::Writer) {
    out.put_bool(command.is_some());
    out.put_u8(command.unwrap_or(0));
}
