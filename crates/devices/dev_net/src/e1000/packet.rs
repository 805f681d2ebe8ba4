//! What the card does to packets: checksums, segmentation, VLAN tags, the frame check sequence.

use super::spec::{Context, popts};
use ether::checksum::{ones_sum, put, sum};

/// Segments smaller than this are refused, which bounds the frames that one packet becomes. IPv4's smallest datagram size, 68
/// bytes, less its headers, is about half of it.
const MIN_MSS: usize = 64;

/// Inserts the checksum of `start..=end` (0: to the end of the frame) at `at`. Whatever does not fit the frame changes nothing.
pub(super) fn insert_checksum(frame: &mut [u8], start: usize, at: usize, end: usize, udp: bool) {
    let end = if end == 0 { frame.len() } else { (end + 1).min(frame.len()) };
    if start >= end || at + 2 > frame.len() {
        return;
    }
    let value = !ones_sum(&frame[start..end]);
    put(frame, at, if udp && value == 0 { 0xffff } else { value });
}

/// Applies the checksum offloads that a packet's first data descriptor asks for.
pub(super) fn offload(frame: &mut [u8], context: &Context, options: u8) {
    if options & popts::IXSM != 0 {
        if let Some(field) = frame.get_mut(context.ip_offset()..context.ip_offset() + 2) {
            field.fill(0);
        }
        insert_checksum(frame, context.ip_start(), context.ip_offset(), context.ip_end(), false);
    }
    if options & popts::TXSM != 0 {
        let (start, at, end) = (context.tu_start(), context.tu_offset(), context.tu_end());
        insert_checksum(frame, start, at, end, !context.is_tcp());
    }
}

/// Cuts a packet into frames with at most `mss` bytes of data (section 3.5 of the manual): its header before each, with lengths, IP identification, sequence
/// number, flags and checksums put right. `None` if the context makes no sense for the packet.
pub(super) fn segment(packet: &[u8], context: &Context, options: u8, mss: usize) -> Option<Vec<Vec<u8>>> {
    let header_len = context.header_len();
    if mss < MIN_MSS || header_len == 0 || packet.len() < header_len {
        return None;
    }
    let (header, payload) = packet.split_at(header_len);
    let (ip, tu) = (context.ip_start(), context.tu_start());
    // The fields that change lie in the header.
    let transport = if context.is_tcp() { 14 } else { 6 };
    if ip + 6 > header_len || tu + transport > header_len || context.tu_offset() + 2 > header_len {
        return None;
    }
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let count = payload.len().div_ceil(mss).max(1);
    let mut frames = Vec::with_capacity(count);
    for i in 0..count {
        let part = &payload[i * mss..payload.len().min((i + 1) * mss)];
        let mut frame = Vec::with_capacity(header_len + part.len());
        frame.extend_from_slice(header);
        frame.extend_from_slice(part);
        let len = frame.len();
        if context.is_ipv4() {
            put(&mut frame, ip + 2, (len - ip) as u16);
            put(&mut frame, ip + 4, word(ip + 4).wrapping_add(i as u16));
        } else {
            put(&mut frame, ip + 4, (len - ip).saturating_sub(40) as u16);
        }
        if context.is_tcp() {
            let sequence = u32::from(word(tu + 4)) << 16 | u32::from(word(tu + 6));
            let sequence = sequence.wrapping_add((i * mss) as u32);
            put(&mut frame, tu + 4, (sequence >> 16) as u16);
            put(&mut frame, tu + 6, sequence as u16);
            if i + 1 < count {
                // FIN and PSH belong to the last one.
                frame[tu + 13] &= !0x09;
            }
        } else {
            put(&mut frame, tu + 4, (len - tu) as u16);
        }
        if options & popts::TXSM != 0 {
            // The driver's partial pseudo-header sum lacks the length.
            let at = context.tu_offset();
            let partial = sum(&((len - tu) as u32).to_be_bytes(), word(at).into());
            put(&mut frame, at, partial as u16);
        }
        offload(&mut frame, context, options);
        frames.push(frame);
    }
    Some(frames)
}

/// Puts a VLAN tag behind the addresses.
pub(super) fn insert_tag(frame: &mut Vec<u8>, ether_type: u16, tag: u16) {
    if frame.len() >= 12 {
        let [a, b] = ether_type.to_be_bytes();
        let [c, d] = tag.to_be_bytes();
        frame.splice(12..12, [a, b, c, d]);
    }
}

/// The tag of a frame with VLAN type `ether_type`.
pub(super) fn tag(frame: &[u8], ether_type: u16) -> Option<u16> {
    let bytes = frame.get(12..16)?;
    (bytes[..2] == ether_type.to_be_bytes()).then(|| u16::from_be_bytes([bytes[2], bytes[3]]))
}

/// What checking a received frame's checksums gives: whether IPv4's header sum is right, and TCP's or UDP's; `None` where there is none.
pub(super) fn verify(frame: &[u8]) -> (Option<bool>, Option<bool>) {
    let Some(ip) = frame.get(14..).filter(|_| frame[12..14] == [8, 0]) else { return (None, None) };
    let header_len = usize::from(ip.first().copied().unwrap_or(0) & 0xf) * 4;
    if header_len < 20 || ip.len() < header_len || ip[0] >> 4 != 4 {
        return (None, None);
    }
    let header = Some(ones_sum(&ip[..header_len]) == 0xffff);
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
    let protocol = ip[9];
    let Some(body) = ip.get(header_len..total) else { return (header, None) };
    let long_enough = match protocol {
        6 => body.len() >= 20,
        // A UDP checksum of zero is none.
        17 => body.len() >= 8 && body[6..8] != [0, 0],
        _ => false,
    };
    if fragment || !long_enough {
        return (header, None);
    }
    let pseudo = sum(&ip[12..20], u32::from(protocol) + body.len() as u32);
    (header, Some(sum(body, pseudo) == 0xffff))
}
