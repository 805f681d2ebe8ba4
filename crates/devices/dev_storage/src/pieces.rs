//! Long requests go to a medium in pieces.

use pdm::connector::BlockOp;

/// Bytes of a piece.
pub(crate) const PIECE: usize = 1 << 20;

/// The first piece of a range that is to hold zeros, and how many bytes it has.
pub(crate) fn zero_piece(offset: u64, len: u64) -> (BlockOp, u64) {
    let now = len.min(PIECE as u64);
    (BlockOp::Write { offset, buffer: vec![0; now as usize] }, now)
}
