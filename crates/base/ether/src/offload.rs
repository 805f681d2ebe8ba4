//! What senders leave to cards: checksums and segmentation (as virtio 1.0 has it, section 5.1.6.2).

use crate::checksum::{ones_sum, put, sum};

/// Segments smaller than this, the smallest that Linux sends, are refused, which bounds the frames that one packet becomes.
const MIN_MSS: usize = 48;
/// Datagrams that are put together at most (Linux: `UDP_MAX_SEGMENTS`).
const MOST_DATAGRAMS: usize = 128;
/// VLAN tags that a frame may have.
const MOST_TAGS: usize = 2;

/// Longest IPv4 packet.
const MAX_IP: usize = 0xffff;
/// Bytes before the packet in a frame without a VLAN tag.
const ETHERNET: usize = 14;

/// Fills in the checksum at `start + offset` of all from `start` on; the field holds the pseudo header's sum. False if that does
/// not fit the frame.
pub fn checksum(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let at = start.saturating_add(offset);
    if at.saturating_add(2) > frame.len() {
        return false;
    }
    let value = !ones_sum(&frame[start..]);
    // Zero means "none" for UDP; TCP takes either.
    put(frame, at, if value == 0 { 0xffff } else { value });
    true
}

/// Where TCP begins in a frame of IPv4 without a VLAN tag; `None` in others.
pub fn tcp_start(packet: &[u8]) -> Option<usize> {
    let header = usize::from(packet.get(ETHERNET)? & 0xf) * 4;
    let tcp = packet[12..14] == [8, 0] && packet[ETHERNET] >> 4 == 4 && header >= 20;
    (tcp && *packet.get(ETHERNET + 9)? == 6).then_some(ETHERNET + header)
}

/// Cuts a TCP packet of IPv4 into the frames that it would be on a wire, with at most `mss` bytes of data each. `None` if it is no such
/// packet.
pub fn frames(packet: &[u8], mss: u16) -> Option<Vec<Vec<u8>>> {
    segment(packet, tcp_start(packet)?, mss.into())
}

/// Whether a frame can go to a network that takes packets whole: TCP, and not longer than IPv4 allows.
pub fn is_whole(frame: &[u8]) -> bool {
    tcp_start(frame).is_some() && frame.len() <= ETHERNET + MAX_IP
}

/// The packet as one frame with lengths and checksums of its own, for networks that take packets whole. `None` if it can only be cut.
pub fn whole(packet: &[u8], start: usize) -> Option<Vec<u8>> {
    if tcp_start(packet) != Some(start) || !is_whole(packet) {
        return None;
    }
    segment(packet, start, packet.len().max(MIN_MSS))?.pop()
}

/// Cuts a TCP packet into frames with at most `mss` bytes of data each: `start` is where TCP begins. `None` if it is no such packet.
pub fn segment(packet: &[u8], start: usize, mss: usize) -> Option<Vec<Vec<u8>>> {
    let header_len = usize::from(packet.get(start.checked_add(12)?)? >> 4) * 4;
    if mss < MIN_MSS || header_len < 20 {
        return None;
    }
    let sequence = u32::from_be_bytes(*packet.get(start + 4..)?.first_chunk()?);
    cut(packet, start, header_len, mss, (6, 16), |tcp, i, last| {
        let at = sequence.wrapping_add((i * mss) as u32);
        put(tcp, 4, (at >> 16) as u16);
        put(tcp, 6, at as u16);
        if !last {
            // FIN and PSH belong to the last one.
            tcp[13] &= !0x09;
        }
        if i > 0 {
            // CWR to the first.
            tcp[13] &= !0x80;
        }
    })
}

/// Cuts what a sender has put together from many UDP datagrams, with one header, into datagrams of `size` bytes of data each, of which
/// the last may have less: `start` is where UDP begins. `None` if it is no such packet.
pub fn datagrams(packet: &[u8], start: usize, size: usize) -> Option<Vec<Vec<u8>>> {
    const HEADER: usize = 8;
    let data = packet.len().checked_sub(start.checked_add(HEADER)?)?;
    if size == 0 || data.div_ceil(size) > MOST_DATAGRAMS {
        return None;
    }
    cut(packet, start, HEADER, size, (17, 6), |udp, _, _| put(udp, 4, udp.len() as u16))
}

/// Cuts a packet whose inner header, of `header_len` bytes, begins at `start`. `change` puts that header right, with the data behind it,
/// in the frame of a number, which may be the last; then the checksum is made, for a `protocol` that has it at `field`.
fn cut(
    packet: &[u8],
    start: usize,
    header_len: usize,
    size: usize,
    (protocol, field): (u8, usize),
    change: impl Fn(&mut [u8], usize, bool),
) -> Option<Vec<Vec<u8>>> {
    let ether_type = |at: usize| packet.get(at..at + 2).map(|t| u16::from_be_bytes([t[0], t[1]]));
    let mut ip = ETHERNET;
    while ip < ETHERNET + MOST_TAGS * 4 && matches!(ether_type(ip - 2)?, 0x8100 | 0x88a8) {
        ip += 4;
    }
    let v6 = match ether_type(ip - 2)? {
        0x0800 => false,
        0x86dd => true,
        _ => return None,
    };
    let ip_len = if v6 { 40 } else { usize::from(packet.get(ip)? & 0xf) * 4 };
    if start < ip + ip_len.max(20) {
        return None;
    }
    let (header, payload) = packet.split_at_checked(start + header_len)?;
    let addresses = if v6 { header.get(ip + 8..ip + 40)? } else { header.get(ip + 12..ip + 20)? };
    let identification = u16::from_be_bytes([header[ip + 4], header[ip + 5]]);
    let count = payload.len().div_ceil(size).max(1);
    let mut frames = Vec::with_capacity(count);
    for i in 0..count {
        let part = &payload[i * size..payload.len().min((i + 1) * size)];
        let mut frame = Vec::with_capacity(header.len() + part.len());
        frame.extend_from_slice(header);
        frame.extend_from_slice(part);
        let len = frame.len();
        if v6 {
            put(&mut frame, ip + 4, (len - ip - 40) as u16);
        } else {
            put(&mut frame, ip + 2, (len - ip) as u16);
            put(&mut frame, ip + 4, identification.wrapping_add(i as u16));
            put(&mut frame, ip + 10, 0);
            let value = !ones_sum(&frame[ip..ip + ip_len]);
            put(&mut frame, ip + 10, value);
        }
        change(&mut frame[start..], i, i + 1 == count);
        let pseudo = sum(addresses, sum(&((len - start) as u32).to_be_bytes(), protocol.into()));
        put(&mut frame, start + field, pseudo as u16);
        checksum(&mut frame, start, field);
        frames.push(frame);
    }
    Some(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(payload: usize) -> Vec<u8> {
        let mut p = vec![0; 14 + 20 + 20];
        p[12..14].copy_from_slice(&[8, 0]);
        p[14] = 0x45;
        p[14 + 9] = 6;
        p[14 + 12..14 + 20].copy_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2]);
        p[34 + 4..34 + 8].copy_from_slice(&0xffff_fff0u32.to_be_bytes());
        p[34 + 12] = 5 << 4;
        p[34 + 13] = 0x99;
        p.extend((0..payload).map(|i| i as u8));
        p
    }

    #[test]
    fn segments_carry_all_data_with_right_sums_and_numbers() {
        let whole = packet(250);
        let frames = segment(&whole, 34, 100).unwrap();
        assert_eq!(frames.iter().map(|f| f.len() - 54).collect::<Vec<_>>(), [100, 100, 50]);
        let data: Vec<u8> = frames.iter().flat_map(|f| f[54..].to_vec()).collect();
        assert_eq!(data, whole[54..]);
        for (i, f) in frames.iter().enumerate() {
            assert_eq!(ones_sum(&f[14..34]), 0xffff, "IP header {i}");
            let pseudo = sum(&f[26..34], 6 + (f.len() - 34) as u32);
            assert_eq!(sum(&f[34..], pseudo), 0xffff, "TCP {i}");
            let sequence = u32::from_be_bytes(f[38..42].try_into().unwrap());
            assert_eq!(sequence, 0xffff_fff0u32.wrapping_add(100 * i as u32));
        }
        assert_eq!(frames.iter().map(|f| f[47]).collect::<Vec<_>>(), [0x90, 0x10, 0x19]);
    }

    /// A UDP packet with `data` bytes, behind VLAN tags.
    fn udp_packet(data: usize, v6: bool, tags: &[u16]) -> (Vec<u8>, usize) {
        let mut p = vec![2; 12];
        tags.iter().for_each(|tag| p.extend([tag.to_be_bytes(), [0, 5]].concat()));
        match v6 {
            false => {
                p.extend([8, 0, 0x45, 0, 0, 0, 0xff, 0xff, 0, 0, 64, 17, 0, 0]);
                p.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            }
            true => {
                p.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 17, 64]);
                p.extend((0..32).map(|i| i as u8));
            }
        }
        let start = p.len();
        p.extend([0, 53, 0, 54, 0, 0, 0, 0]);
        p.extend((0..data).map(|i| (i / 7) as u8));
        (p, start)
    }

    #[test]
    fn datagrams_carry_all_data_with_right_lengths_and_sums() {
        for (v6, tags) in [(false, &[][..]), (true, &[]), (false, &[0x8100]), (true, &[0x88a8, 0x8100])] {
            let (whole, start) = udp_packet(1000, v6, tags);
            let frames = datagrams(&whole, start, 300).unwrap();
            assert_eq!(frames.iter().map(|f| f.len() - start - 8).collect::<Vec<_>>(), [300, 300, 300, 100]);
            let data: Vec<u8> = frames.iter().flat_map(|f| f[start + 8..].to_vec()).collect();
            assert_eq!(data, whole[start + 8..]);
            for (i, f) in frames.iter().enumerate() {
                let (ip, udp) = (14 + 4 * tags.len(), &f[start..]);
                assert_eq!(usize::from(u16::from_be_bytes([udp[4], udp[5]])), udp.len());
                let addresses = if v6 { &f[ip + 8..ip + 40] } else { &f[ip + 12..ip + 20] };
                assert_eq!(sum(udp, sum(addresses, 17 + udp.len() as u32)), 0xffff, "UDP {i}");
                if !v6 {
                    assert_eq!(ones_sum(&f[ip..start]), 0xffff, "IP header {i}");
                    let identification = u16::from_be_bytes([f[ip + 4], f[ip + 5]]);
                    assert_eq!(identification, 0xffffu16.wrapping_add(i as u16));
                }
            }
        }
    }

    #[test]
    fn what_are_no_datagrams_is_refused() {
        let (whole, start) = udp_packet(1000, false, &[]);
        assert!(datagrams(&whole, start, 0).is_none() && datagrams(&whole, start, 7).is_none());
        assert!(datagrams(&whole, start - 10, 300).is_none() && datagrams(&whole, usize::MAX, 300).is_none());
        assert!(datagrams(&whole[..start + 4], start, 300).is_none());
        assert!(datagrams(&udp_packet(1000, false, &[0x8100; 3]).0, start + 12, 300).is_none());
        assert_eq!(datagrams(&whole[..start + 8], start, 300).unwrap().len(), 1);
    }

    #[test]
    fn a_packet_can_stay_whole() {
        let one = whole(&packet(30_000), 34).unwrap();
        assert_eq!(one.len(), packet(30_000).len());
        assert_eq!(u16::from_be_bytes([one[16], one[17]]), 30_040);
        assert_eq!(ones_sum(&one[14..34]), 0xffff);
        let pseudo = sum(&one[26..34], 6 + (one.len() - 34) as u32);
        assert_eq!(sum(&one[34..], pseudo), 0xffff);
        assert_eq!(frames(&one, 1460).unwrap().len(), 21);
        assert!(whole(&packet(0x1_0000), 34).is_none());
        assert!(whole(&packet(30_000), 38).is_none());
        assert!(frames(&packet(100)[..40], 1460).is_none() && frames(&[], 1460).is_none());
    }

    #[test]
    fn what_is_no_tcp_packet_is_refused() {
        assert!(segment(&packet(100), 34, 1).is_none());
        assert!(segment(&packet(100), 20, 100).is_none());
        assert!(segment(&packet(100), 5000, 100).is_none());
        assert!(segment(&packet(100)[..50], 34, 100).is_none());
        assert!(!checksum(&mut [0; 10], 8, 1));
        assert!(!checksum(&mut [0; 10], usize::MAX, 1));
    }
}
