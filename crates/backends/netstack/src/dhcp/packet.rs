//! The frames around DHCP's messages: Ethernet, ARP, IPv4, UDP and pings, as far as one address with one UDP port needs them.

use std::net::Ipv4Addr;

use crate::mac::Mac;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const UDP: u8 = 17;
const ICMP: u8 = 1;

/// The Internet checksum of `bytes`, on top of `start`.
fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(start, |sum, pair| match pair {
        [a, b] => sum + u32::from(u16::from_be_bytes([*a, *b])),
        [a] => sum + (u32::from(*a) << 8),
        _ => sum,
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(640);
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend(kind.to_be_bytes());
    frame
}

fn ipv4(frame: &mut Vec<u8>, protocol: u8, from: Ipv4Addr, to: Ipv4Addr, payload: usize) {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&u16::try_from(20 + payload).unwrap_or(u16::MAX).to_be_bytes());
    header[8] = 64;
    header[9] = protocol;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum = checksum(0, &header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
}

/// What a frame is to the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming<'a> {
    /// The answer to a question that the server's address answers by itself.
    Answer(Vec<u8>),
    /// A UDP payload for port 67, with the sender's hardware address.
    Dhcp(&'a [u8]),
    Other,
}

/// Sorts a frame. `mac` and `address` are the server's.
pub(super) fn incoming<'a>(frame: &'a [u8], mac: Mac, address: Ipv4Addr) -> Incoming<'a> {
    sort(frame, mac, address).unwrap_or(Incoming::Other)
}

fn sort<'a>(frame: &'a [u8], mac: Mac, address: Ipv4Addr) -> Option<Incoming<'a>> {
    let (head, rest) = frame.split_at_checked(ETHERNET)?;
    let sender = Mac::source(head)?;
    match u16::from_be_bytes([*head.get(12)?, *head.get(13)?]) {
        ARP => arp(rest, mac, address, sender).map(Incoming::Answer),
        IPV4 => {
            let length = usize::from(rest.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]));
            let packet = rest.get(..total)?;
            let (header, payload) = packet.split_at_checked(length)?;
            // Version 4, no fragment, and a header that adds up.
            let fragment = u16::from_be_bytes([*header.get(6)?, *header.get(7)?]) & 0x3fff;
            if header.len() < 20 || header.first()? >> 4 != 4 || fragment != 0 || checksum(0, header) != 0 {
                return None;
            }
            let from = Ipv4Addr::from(*header.get(12..)?.first_chunk::<4>()?);
            let to = Ipv4Addr::from(*header.get(16..)?.first_chunk::<4>()?);
            match *header.get(9)? {
                ICMP if to == address => ping(payload, mac, address, sender, from).map(Incoming::Answer),
                UDP if to == address || to.is_broadcast() => {
                    let port = u16::from_be_bytes([*payload.get(2)?, *payload.get(3)?]);
                    let length = usize::from(u16::from_be_bytes([*payload.get(4)?, *payload.get(5)?]));
                    (port == 67).then_some(Incoming::Dhcp(payload.get(8..length)?))
                }
                _ => None,
            }
        }
        _ => None,
    }
}

fn arp(packet: &[u8], mac: Mac, address: Ipv4Addr, sender: Mac) -> Option<Vec<u8>> {
    let packet = packet.get(..28)?;
    // A request, for IPv4 over Ethernet.
    if packet.get(..8)? != [0, 1, 8, 0, 6, 4, 0, 1] || packet.get(24..28)? != address.octets() {
        return None;
    }
    let mut frame = ethernet(sender, mac, ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(mac.0);
    frame.extend(address.octets());
    frame.extend(packet.get(8..18)?);
    frame.resize(60, 0);
    Some(frame)
}

fn ping(message: &[u8], mac: Mac, address: Ipv4Addr, sender: Mac, from: Ipv4Addr) -> Option<Vec<u8>> {
    if message.get(..2)? != [8, 0] || message.len() < 8 || checksum(0, message) != 0 {
        return None;
    }
    let mut frame = ethernet(sender, mac, IPV4);
    ipv4(&mut frame, ICMP, address, from, message.len());
    let mut answer = message.to_vec();
    answer.get_mut(..4)?.fill(0);
    let sum = checksum(0, &answer);
    answer.get_mut(2..4)?.copy_from_slice(&sum.to_be_bytes());
    frame.extend(answer);
    frame.resize(frame.len().max(60), 0);
    Some(frame)
}

/// A DHCP message on its way to a client.
pub(super) fn dhcp(from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr), message: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(to.0, from.0, IPV4);
    ipv4(&mut frame, UDP, from.1, to.1, 8 + message.len());
    let length = u16::try_from(8 + message.len()).unwrap_or(u16::MAX);
    let mut udp = Vec::with_capacity(8 + message.len());
    udp.extend([0, 67, 0, 68]);
    udp.extend(length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(message);
    let pseudo = from
        .1
        .octets()
        .chunks(2)
        .chain(to.1.octets().chunks(2))
        .fold(0, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = checksum(pseudo + u32::from(UDP) + u32::from(length), &udp);
    // Zero would mean that there is none.
    udp[6..8].copy_from_slice(&(if sum == 0 { 0xffff } else { sum }).to_be_bytes());
    frame.extend(udp);
    frame
}
