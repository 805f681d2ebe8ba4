//! Large packets: the TCP/IP stack works with an MTU far above that of the guest's network, so that a connection's data passes in few large
//! pieces. It believes that the guest takes such, because the largest segment that the guest names when a connection begins is
//! raised. What comes out for the guest is a TCP packet that the card takes whole or cuts, or something else of IPv4, which is
//! cut here.

use std::collections::HashMap;

use ether::checksum::{ones_sum, put};

/// The stack's MTU. Segments keep clear of what a guest may have in flight, so that two fit.
pub(crate) const MTU: u16 = 32 * 1024 + HEADERS as u16;
/// The headers of IPv4 and TCP without options, of which the stack sends none with data.
pub(crate) const HEADERS: usize = 40;
/// The segment size that is named for the guest.
const MSS: u16 = MTU - HEADERS as u16;
/// What a guest takes that names no size (RFC 9293, section 3.7.1).
const DEFAULT_MSS: u16 = 536;

/// Smallest segment size that is believed.
const MIN_MSS: u16 = 64;
/// Connections with a size of their own.
const MOST_SMALLER: usize = 1024;

const ETHERNET: usize = 14;
const TCP: u8 = 6;

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Length of the IPv4 header of a frame, and the packet's total length; `None` if it is no complete IPv4 packet.
fn ipv4(frame: &[u8]) -> Option<(usize, usize)> {
    let ip = frame.get(ETHERNET..).filter(|ip| frame[12..14] == [8, 0] && ip.len() >= 20)?;
    let (header, total) = (usize::from(ip[0] & 0xf) * 4, usize::from(word(ip, 2)));
    (ip[0] >> 4 == 4 && header >= 20 && header <= total && total <= ip.len()).then_some((header, total))
}

/// Whether a frame is TCP over IPv4.
pub(crate) fn is_tcp(frame: &[u8]) -> bool {
    ipv4(frame).is_some() && frame[ETHERNET + 9] == TCP
}

/// Addresses and ports of a connection: the guest's, then those of its peer.
type Ends = [[u8; 6]; 2];

/// Source and destination of a TCP packet of IPv4.
fn ends(frame: &[u8]) -> Option<Ends> {
    let (header, total) = ipv4(frame)?;
    let ports = frame.get(ETHERNET + header..ETHERNET + header + 4).filter(|_| header + 4 <= total)?;
    let end = |address: usize, port: usize| {
        let (address, port) = (&frame[ETHERNET + address..], &ports[port..]);
        [address[0], address[1], address[2], address[3], port[0], port[1]]
    };
    Some([end(12, 0), end(16, 2)])
}

/// The segment sizes that the guest has named.
pub(crate) struct Sizes {
    /// What frames of the network have room for.
    usual: u16,
    /// Connections for which it named less.
    smaller: HashMap<Ends, u16>,
    /// The smallest of those that are no longer known one by one.
    least: u16,
}

impl Sizes {
    /// For a network whose packets have `mtu` bytes.
    pub(crate) fn new(mtu: u16) -> Self {
        let usual = mtu.saturating_sub(HEADERS as u16).max(MIN_MSS);
        Self { usual, smaller: HashMap::new(), least: usual }
    }

    /// Looks at a frame of the guest, and raises the size in one that begins a connection.
    pub(crate) fn note(&mut self, frame: &mut [u8]) {
        let Some(named) = raise_mss(frame) else { return };
        let Some(ends) = ends(frame) else { return };
        let named = named.max(MIN_MSS);
        if named >= self.usual {
            self.smaller.remove(&ends);
            return;
        }
        if self.smaller.len() >= MOST_SMALLER {
            self.least = self.smaller.drain().map(|(_, size)| size).fold(self.least, u16::min);
        }
        self.smaller.insert(ends, named);
    }

    /// The size for a packet to the guest.
    pub(crate) fn of(&self, packet: &[u8]) -> u16 {
        let named = ends(packet).and_then(|[from, to]| self.smaller.get(&[to, from]).copied());
        named.unwrap_or(self.least).min(self.usual)
    }
}

/// Raises the largest segment that the guest names in a frame that begins a connection. Gives the size that it takes; `None` for all
/// other frames.
fn raise_mss(frame: &mut [u8]) -> Option<u16> {
    const SYN: u8 = 2;
    let (header, total) = ipv4(frame)?;
    let ip = &frame[ETHERNET..ETHERNET + total];
    if ip[9] != TCP || word(ip, 6) & 0x3fff != 0 || total < header + 20 {
        return None;
    }
    let tcp = ETHERNET + header;
    let segment = &mut frame[tcp..ETHERNET + total];
    let data = usize::from(segment[12] >> 4) * 4;
    if segment[13] & SYN == 0 || data < 20 || data > segment.len() {
        return None;
    }
    let mut at = 20;
    while at < data {
        match segment[at] {
            0 => break,
            1 => at += 1,
            kind => {
                let len = usize::from(*segment.get(at + 1)?);
                if kind == 2 && len == 4 && at + 4 <= data {
                    let named = word(segment, at + 2);
                    put(segment, at + 2, MSS);
                    // RFC 1624. At an odd offset the field's bytes are swapped in the sum.
                    let swap = |value: u16| if at % 2 == 0 { value } else { value.swap_bytes() };
                    let change =
                        u32::from(!word(segment, 16)) + u32::from(!swap(named)) + u32::from(swap(MSS));
                    let change = (change & 0xffff) + (change >> 16);
                    let change = (change & 0xffff) + (change >> 16);
                    put(segment, 16, !(change as u16));
                    return Some(named);
                }
                if len < 2 {
                    break;
                }
                at += len;
            }
        }
    }
    // The stack takes the default, too.
    Some(DEFAULT_MSS)
}

/// Cuts an IPv4 packet into fragments that fit `mtu` (RFC 791, section 3.2). `None` if it is none, or says that it must not be.
pub(crate) fn fragments(frame: &[u8], mtu: usize) -> Option<Vec<Vec<u8>>> {
    const MUST_NOT: u16 = 0x4000;
    const MORE: u16 = 0x2000;
    let (header, total) = ipv4(frame)?;
    let flags = word(frame, ETHERNET + 6);
    // Options would have to be sorted; the stack sends none.
    if flags & MUST_NOT != 0 || header != 20 || mtu < 68 {
        return None;
    }
    let data = &frame[ETHERNET + header..ETHERNET + total];
    let size = (mtu - header) & !7;
    let count = data.len().div_ceil(size);
    let cut = data.chunks(size).enumerate().map(|(i, part)| {
        let mut piece = frame[..ETHERNET + header].to_vec();
        piece.extend_from_slice(part);
        let more = if i + 1 < count { MORE } else { flags & MORE };
        put(&mut piece, ETHERNET + 2, (header + part.len()) as u16);
        put(&mut piece, ETHERNET + 6, (flags & 0x1fff).wrapping_add((i * size / 8) as u16) | more);
        put(&mut piece, ETHERNET + 10, 0);
        let sum = ones_sum(&piece[ETHERNET..ETHERNET + header]);
        put(&mut piece, ETHERNET + 10, !sum);
        piece
    });
    Some(cut.collect())
}

#[cfg(test)]
mod tests {
    use ether::checksum::sum;

    use super::*;

    /// A segment with these flags and options, its checksum right.
    fn segment(flags: u8, options: &[u8]) -> Vec<u8> {
        let mut tcp = vec![0x12, 0x34, 0, 80, 1, 2, 3, 4, 0, 0, 0, 0];
        tcp.extend([((20 + options.len()) / 4 * 16) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(options);
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + tcp.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
        let check = !sum(&tcp, sum(&frame[26..34], 6 + tcp.len() as u32));
        tcp[16..18].copy_from_slice(&(check as u16).to_be_bytes());
        frame.extend(tcp);
        frame
    }

    fn is_right(frame: &[u8]) -> bool {
        let tcp = &frame[34..];
        sum(tcp, sum(&frame[26..34], 6 + tcp.len() as u32)) == 0xffff
    }

    #[test]
    fn the_named_segment_is_raised_with_a_right_checksum() {
        let options: [&[u8]; 3] = [
            &[2, 4, 0x05, 0xb4],
            &[1, 1, 1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 0x05, 0xb4, 0, 0],
            // At an odd offset.
            &[1, 2, 4, 0x05, 0xb4, 0, 0, 0],
        ];
        for option in options {
            for flags in [2, 0x12] {
                let mut frame = segment(flags, option);
                assert!(is_right(&frame));
                assert_eq!(raise_mss(&mut frame), Some(1460), "{option:?}");
                assert!(is_right(&frame), "{option:?}");
                assert_eq!(raise_mss(&mut frame), Some(MSS), "{option:?}");
            }
        }
    }

    #[test]
    fn other_frames_stay_as_they_are() {
        let mut no_option = segment(2, &[]);
        assert_eq!(raise_mss(&mut no_option), Some(DEFAULT_MSS));
        for mut frame in [
            segment(0x10, &[2, 4, 5, 0xb4]),
            segment(2, &[2, 4, 5, 0xb4])[..50].to_vec(),
            vec![],
            vec![0; 14],
        ] {
            let before = frame.clone();
            assert_eq!(raise_mss(&mut frame), None);
            assert_eq!(frame, before);
        }
        // Options that make no sense end the search.
        for option in [[3, 0, 0, 0], [2, 3, 0, 0], [5, 200, 0, 0], [1, 1, 1, 2]] {
            let mut frame = segment(2, &option);
            raise_mss(&mut frame);
            assert!(is_right(&frame), "{option:?}");
        }
    }

    #[test]
    fn each_connection_has_the_size_that_was_named_for_it() {
        let mut sizes = Sizes::new(1500);
        let syn = |port: u16, named: u16| {
            let mut frame = segment(2, &[&[2, 4][..], &named.to_be_bytes()].concat());
            frame[34..36].copy_from_slice(&port.to_be_bytes());
            frame
        };
        let answer = |port: u16| {
            let mut frame = syn(80, 0);
            frame[26..34].copy_from_slice(&[10, 0, 2, 2, 10, 0, 2, 15]);
            frame[36..38].copy_from_slice(&port.to_be_bytes());
            frame
        };
        sizes.note(&mut syn(1, 1460));
        sizes.note(&mut syn(2, 536));
        sizes.note(&mut syn(3, 1));
        sizes.note(&mut syn(4, 9000));
        assert_eq!([1, 2, 3, 4, 5].map(|port| sizes.of(&answer(port))), [1460, 536, MIN_MSS, 1460, 1460]);
        sizes.note(&mut syn(2, 1460));
        assert_eq!(sizes.of(&answer(2)), 1460);
        // Too many to keep: from then on, those that are not known get the least.
        for port in 100..100 + MOST_SMALLER as u16 {
            sizes.note(&mut syn(port, 1000));
        }
        assert_eq!((sizes.of(&answer(3)), sizes.of(&answer(1))), (MIN_MSS, MIN_MSS));
        assert_eq!(sizes.of(&answer(100 + MOST_SMALLER as u16 - 1)), 1000);
        assert_eq!(sizes.of(&[]), MIN_MSS);
    }

    #[test]
    fn fragments_fit_and_carry_everything() {
        let data: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + data.len() as u16).to_be_bytes());
        frame.extend([0, 7, 0, 0, 64, 17, 0, 0, 10, 0, 2, 2, 10, 0, 2, 15]);
        frame.extend(&data);
        let pieces = fragments(&frame, 1500).unwrap();
        assert_eq!(pieces.len(), 4);
        let mut got = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.len() <= 14 + 1500);
            assert_eq!(sum(&piece[14..34], 0), 0xffff);
            let offset = word(piece, 20);
            assert_eq!((usize::from(offset & 0x1fff) * 8, offset & 0x2000 != 0), (got.len(), i < 3));
            got.extend_from_slice(&piece[34..]);
        }
        assert_eq!(got, data);
        frame[20] = 0x40;
        assert!(fragments(&frame, 1500).is_none());
        assert!(fragments(&frame[..30], 1500).is_none());
    }
}
