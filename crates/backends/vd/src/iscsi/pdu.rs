//! PDUs: a header of 48 bytes, additional headers, and data padded to words (RFC 7143, chapter 11). All numbers are big-endian.

use super::Fault;

/// The basic header segment, up to its length field as RFC 7143 11.2.1 has it:
///
/// | bytes | |
/// |---|---|
/// | 0 | bit 6: immediate; bits 5..0: opcode |
/// | 1 | bit 7: final; the rest as the opcode has it |
/// | 4 | words of additional headers |
/// | 5..8 | bytes of data |
/// | 8..16 | logical unit, or the opcode's own |
/// | 16..20 | initiator task tag |
pub(super) const HEADER: usize = 48;
/// Tag of what belongs to no task.
pub(super) const NO_TAG: u32 = u32::MAX;
pub(super) const FINAL: u8 = 0x80;
pub(super) const IMMEDIATE: u8 = 0x40;

/// Opcodes of the initiator.
pub(super) mod request {
    pub(crate) const NOP_OUT: u8 = 0x00;
    pub(crate) const COMMAND: u8 = 0x01;
    pub(crate) const LOGIN: u8 = 0x03;
    pub(crate) const DATA_OUT: u8 = 0x05;
    pub(crate) const LOGOUT: u8 = 0x06;
}

/// Opcodes of the target.
pub(super) mod response {
    pub(crate) const NOP_IN: u8 = 0x20;
    pub(crate) const RESPONSE: u8 = 0x21;
    pub(crate) const LOGIN: u8 = 0x23;
    pub(crate) const DATA_IN: u8 = 0x25;
    pub(crate) const LOGOUT: u8 = 0x26;
    pub(crate) const R2T: u8 = 0x31;
    pub(crate) const ASYNC: u8 = 0x32;
    pub(crate) const REJECT: u8 = 0x3f;
}

/// A header, with the fields that PDUs have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header(pub(super) [u8; HEADER]);

impl Header {
    pub(super) fn new(opcode: u8, flags: u8) -> Self {
        let mut bytes = [0; HEADER];
        (bytes[0], bytes[1]) = (opcode, flags);
        Self(bytes)
    }

    pub(super) fn opcode(&self) -> u8 {
        self.0[0] & 0x3f
    }

    pub(super) fn flags(&self) -> u8 {
        self.0[1]
    }

    /// The word at byte `AT`; none lies outside the header.
    pub(super) fn word<const AT: usize>(&self) -> u32 {
        const { assert!(AT + 4 <= HEADER) };
        u32::from_be_bytes([self.0[AT], self.0[AT + 1], self.0[AT + 2], self.0[AT + 3]])
    }

    pub(super) fn set_word<const AT: usize>(mut self, value: u32) -> Self {
        const { assert!(AT + 4 <= HEADER) };
        self.0[AT..AT + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn set_lun(mut self, lun: u64) -> Self {
        self.0[8..16].copy_from_slice(&lun.to_be_bytes());
        self
    }

    /// Initiator task tag.
    pub(super) fn tag(&self) -> u32 {
        self.word::<16>()
    }

    pub(super) fn set_tag(self, tag: u32) -> Self {
        self.set_word::<16>(tag)
    }

    /// Bytes of data behind the headers.
    fn data_len(&self) -> usize {
        (self.word::<4>() & 0x00ff_ffff) as usize
    }
}

/// Appends a PDU. Data are shorter than 16 MiB.
pub(super) fn put(out: &mut Vec<u8>, header: Header, data: &[u8]) {
    let mut header = header.set_word::<4>(data.len() as u32 & 0x00ff_ffff);
    header.0[4] = 0;
    out.extend_from_slice(&header.0);
    out.extend_from_slice(data);
    out.resize(out.len() + data.len().wrapping_neg() % 4, 0);
}

/// A PDU that has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pdu<'a> {
    pub(super) header: Header,
    pub(super) data: &'a [u8],
}

/// The PDU at the start of `bytes`, and how many bytes it takes; `None` if it is not all there. One with more than `limit` bytes of data
/// is refused as soon as its header is there.
pub(super) fn take(bytes: &[u8], limit: usize) -> Result<Option<(Pdu<'_>, usize)>, Fault> {
    let Some(head) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let header = Header(*head);
    let len = header.data_len();
    if len > limit {
        return Err(Fault::protocol(format!("it sends {len} bytes at a time where {limit} were agreed on")));
    }
    let start = HEADER + usize::from(header.0[4]) * 4;
    let whole = start + len.next_multiple_of(4);
    match bytes.get(start..start + len) {
        Some(data) if bytes.len() >= whole => Ok(Some((Pdu { header, data }, whole))),
        _ => Ok(None),
    }
}

/// Whether sequence number `a` comes before `b` (serial number arithmetic, RFC 1982).
pub(super) fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pdus_come_back_whole_and_not_before() {
        let mut bytes = Vec::new();
        put(&mut bytes, Header::new(request::NOP_OUT, FINAL).set_tag(7), b"12345");
        assert_eq!(bytes.len(), HEADER + 8);
        bytes.push(0xee);
        for short in 0..HEADER + 8 {
            assert!(take(&bytes[..short], 5).unwrap().is_none(), "{short}");
        }
        let (pdu, whole) = take(&bytes, 5).unwrap().unwrap();
        assert_eq!((pdu.header.tag(), pdu.data, whole), (7, &b"12345"[..], HEADER + 8));
        // Additional headers are stepped over.
        bytes[4] = 1;
        let (pdu, whole) = take(&bytes[..], 5).unwrap().map_or((None, 0), |(pdu, whole)| (Some(pdu), whole));
        assert!(pdu.is_none() && whole == 0);
        bytes.extend([0; 3]);
        assert_eq!(take(&bytes, 5).unwrap().unwrap().1, HEADER + 12);
        assert!(take(&bytes[..HEADER], 4).is_err());
    }

    #[test]
    fn sequence_numbers_wrap() {
        assert!(before(1, 2) && !before(2, 1) && !before(2, 2));
        assert!(before(u32::MAX, 0) && !before(0, u32::MAX));
    }
}
