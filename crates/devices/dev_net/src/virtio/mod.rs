//! The paravirtual network card (virtio-net). Source: OASIS Virtual I/O Device (VIRTIO) Version 1.2, section 5.1.
//!
//! Queues 0 and 1 carry frames to and from the guest, queue 2 control commands. Offered are checksums and TCP segmentation both ways,
//! merged receive buffers, link status and address filters. TCP packets stay whole where the network takes or gives them so.
//!
//! **Left out.** One pair of queues; no VLAN filter.
//!
//! **Back-pressure** is as with other cards: a frame that finds no buffer waits in the back end until the guest gives one;
//! transmission stops while the back end's queue is full.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use dev_virtio_core::{Chain, Transport, VirtioDevice, VirtioPci, Wiring, feature};
use ether::checksum::{put, sum};
use ether::offload;
use parking_lot::Mutex;
use pdm::connector::{NetDriver, NetPort};
use ssm::{Error, Reader, Writer};

/// PCI identity, that of transitional cards.
pub const VENDOR: u16 = dev_virtio_core::VENDOR;
pub const DEVICE: u16 = 0x1000;

/// Feature bits.
mod bit {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
}

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;

/// Header bits.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Longest packet that the driver may hand over, with its header.
const MAX_PACKET: usize = 0x1_0000 + 256;
/// Longest frame that is taken from the network.
const MAX_FRAME: usize = 14 + 0xffff;
/// What the headers of Ethernet, IPv4 and TCP have at most, with their options.
const MAX_HEADERS: usize = 14 + 60 + 60;
/// Most buffers that one packet takes.
const MAX_MERGED: usize = 128;
/// Shortest frame on the wire, without its check sequence.
const MIN_FRAME: usize = 14;
/// Packets that one notification moves; the others wait for the back end's next call.
const TX_BATCH: usize = 256;
/// Addresses that the driver may want to hear; more are taken for "all".
const MAX_ADDRESSES: usize = 64;
/// Frames that one packet becomes at most, with room to spare, for saved states.
const MAX_PENDING: u32 = 2048;

/// Which frames the guest wants.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    promiscuous: bool,
    all_multicast: bool,
    unicast: Vec<[u8; 6]>,
    multicast: Vec<[u8; 6]>,
}

impl Filter {
    /// Until the driver says otherwise.
    fn open() -> Self {
        Self { promiscuous: true, all_multicast: false, unicast: Vec::new(), multicast: Vec::new() }
    }

    fn wants(&self, mac: [u8; 6], dst: [u8; 6]) -> bool {
        if self.promiscuous || dst == mac || dst == [0xff; 6] {
            return true;
        }
        match dst[0] & 1 {
            0 => self.unicast.contains(&dst),
            _ => self.all_multicast || self.multicast.contains(&dst),
        }
    }
}

/// The card behind its transport.
pub struct VirtioNet {
    /// The address that the card has from the settings.
    own: [u8; 6],
    driver: Option<Arc<dyn NetDriver>>,
    /// A frame was refused for want of buffers.
    starved: bool,
    // What the guest can see.
    mac: [u8; 6],
    link: bool,
    filter: Filter,
    /// Frames that the back end has not taken yet.
    pending: VecDeque<Vec<u8>>,
}

/// A card in a machine.
pub type Card = VirtioPci<VirtioNet>;

struct CardPort(Weak<Mutex<Card>>);

impl NetPort for CardPort {
    fn receive(&self, frame: &[u8]) -> bool {
        self.0.upgrade().is_none_or(|card| {
            let card = &mut *card.lock();
            card.device.receive(frame, None, &mut card.transport)
        })
    }

    fn takes_packets(&self) -> bool {
        self.0.upgrade().is_some_and(|card| {
            let card = card.lock();
            card.transport.is_active() && card.transport.has(bit::GUEST_TSO4)
        })
    }

    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        self.0.upgrade().is_none_or(|card| {
            let card = &mut *card.lock();
            // The driver may have changed its mind meanwhile: the packet is lost then.
            !card.transport.has(bit::GUEST_TSO4)
                || card.device.receive(packet, Some(mss), &mut card.transport)
        })
    }

    fn ready(&self) {
        if let Some(card) = self.0.upgrade() {
            let card = &mut *card.lock();
            card.device.transmit(&mut card.transport);
        }
    }

    fn set_link(&self, up: bool) {
        if let Some(card) = self.0.upgrade() {
            let card = &mut *card.lock();
            if std::mem::replace(&mut card.device.link, up) != up {
                card.transport.config_changed();
                card.device.resume();
            }
        }
    }
}

impl VirtioNet {
    /// Builds a card with the address `mac`. `cable`: it is plugged in.
    pub fn create(mac: [u8; 6], cable: bool, wiring: Wiring) -> Arc<Mutex<Card>> {
        let card = Self {
            own: mac,
            driver: None,
            starved: false,
            mac,
            link: cable,
            filter: Filter::open(),
            pending: VecDeque::new(),
        };
        VirtioPci::new(card, wiring)
    }

    /// The card as the network sees it.
    pub fn port(card: &Arc<Mutex<Card>>) -> Arc<dyn NetPort> {
        Arc::new(CardPort(Arc::downgrade(card)))
    }

    /// Plugs the card into a network, or out of it. Gives the former one back, to be dropped without the card's lock: its end may
    /// wait for a thread that delivers a frame.
    pub fn connect(card: &Mutex<Card>, driver: Option<Arc<dyn NetDriver>>) -> Option<Arc<dyn NetDriver>> {
        let card = &mut *card.lock();
        let before = std::mem::replace(&mut card.device.driver, driver);
        card.device.transmit(&mut card.transport);
        before
    }

    /// Bytes of the header before each packet.
    fn header_len(transport: &Transport) -> usize {
        match transport.has(bit::MRG_RXBUF) || transport.has(feature::VERSION_1) {
            true => 12,
            false => 10,
        }
    }

    /// Lets the back end offer a frame again that was refused.
    fn resume(&mut self) {
        if std::mem::take(&mut self.starved)
            && let Some(driver) = &self.driver
        {
            driver.resume();
        }
    }

    /// Takes a frame for the guest, or with `mss` a TCP packet of several; false if it has no buffers.
    fn receive(&mut self, frame: &[u8], mss: Option<u16>, transport: &mut Transport) -> bool {
        let Some(dst) = frame.first_chunk::<6>().copied() else { return true };
        if !transport.is_active()
            || !self.link
            || frame.len() > MAX_FRAME
            || !self.filter.wants(self.mac, dst)
        {
            return true;
        }
        let header_len = Self::header_len(transport);
        let merge = transport.has(bit::MRG_RXBUF);
        // The back ends deliver nothing that lacks a right checksum.
        let flags = if transport.has(bit::GUEST_CSUM) { DATA_VALID } else { 0 };
        let Some((queue, memory)) = transport.queue(RX) else { return true };
        if !queue.is_usable() {
            return true;
        }
        let segments = match mss {
            None => None,
            Some(mss) => match offload::tcp_start(frame).filter(|tcp| tcp + 20 <= frame.len()) {
                Some(tcp) => Some((tcp, mss)),
                None => return true,
            },
        };
        let needed = header_len + frame.len();
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < needed {
            let Some(chain) = queue.pop(memory) else {
                queue.want_notifications(memory, true);
                // The guest may have given one meanwhile; then it will not tell.
                if queue.has_chain(memory) {
                    continue;
                }
                // Not enough: all of them wait for more.
                chains.iter().for_each(|_| queue.undo_pop());
                self.starved = !queue.is_broken();
                transport.publish(RX);
                return !self.starved;
            };
            room += chain.writable_len();
            chains.push(chain);
            if room < needed && (!merge || chains.len() == MAX_MERGED) {
                // The one buffer is too small, or all of them are: the frame is lost.
                for chain in &chains {
                    queue.push(memory, chain.head, 0);
                }
                transport.publish(RX);
                return true;
            }
        }
        // The headers, which change, and what follows, which is copied once.
        let (start, rest) = frame.split_at(frame.len().min(MAX_HEADERS));
        let mut head = [0; 12 + MAX_HEADERS];
        let head = &mut head[..header_len + start.len()];
        head[0] = flags;
        if header_len == 12 {
            head[10..12].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        }
        head[header_len..].copy_from_slice(start);
        if let Some((tcp, mss)) = segments {
            describe(head, header_len, (frame.len(), tcp), mss);
        }
        let mut at = 0;
        for chain in &chains {
            let mut written = 0;
            if at < head.len() {
                written = chain.scatter(memory, 0, &head[at..]);
            }
            if at + written >= head.len() {
                written += chain.scatter(memory, written, &rest[at + written - head.len()..]);
            }
            queue.push(memory, chain.head, written as u32);
            at += written;
        }
        transport.publish(RX);
        true
    }

    /// Hands waiting frames to the back end; false if it has no room.
    fn flush(&mut self) -> bool {
        while let Some(frame) = self.pending.pop_front() {
            if self.link
                && let Some(driver) = &self.driver
                && let Err(frame) = driver.send(frame)
            {
                self.pending.push_front(frame);
                return false;
            }
        }
        true
    }

    /// Sends what the guest has made available.
    fn transmit(&mut self, transport: &mut Transport) {
        if !transport.is_active() {
            return;
        }
        let header_len = Self::header_len(transport);
        let mut count = 0;
        while self.flush() {
            let Some((queue, memory)) = transport.queue(TX) else { return };
            let Some(chain) = queue.pop(memory) else {
                queue.want_notifications(memory, true);
                if queue.has_chain(memory) {
                    continue;
                }
                break;
            };
            let mut packet = Vec::with_capacity(chain.readable_len().min(MAX_PACKET));
            let whole = chain.gather(memory, 0, MAX_PACKET, &mut packet);
            queue.push(memory, chain.head, 0);
            if whole && packet.len() >= header_len + MIN_FRAME {
                self.send(&packet, header_len);
            }
            count += 1;
            if count % TX_BATCH == 0 {
                transport.publish(TX);
            }
        }
        transport.publish(TX);
    }

    /// Queues the frames of one packet.
    fn send(&mut self, packet: &[u8], header_len: usize) {
        let word = |at: usize| usize::from(u16::from_le_bytes([packet[at], packet[at + 1]]));
        let (flags, gso) = (packet[0], packet[1] & !GSO_ECN);
        let (mss, start, offset) = (word(4), word(6), word(8));
        let frame = &packet[header_len..];
        match gso {
            GSO_TCP4 | GSO_TCP6 => {
                let takes = self.driver.as_ref().is_some_and(|driver| driver.takes_packets());
                match takes.then(|| offload::whole(frame, start)).flatten() {
                    Some(frame) => self.pending.push_back(frame),
                    None => self.pending.extend(offload::segment(frame, start, mss).unwrap_or_default()),
                }
            }
            0 => {
                let mut frame = frame.to_vec();
                if flags & NEEDS_CSUM == 0 || offload::checksum(&mut frame, start, offset) {
                    self.pending.push_back(frame);
                }
            }
            // Nothing else was offered.
            _ => {}
        }
    }

    /// A control command; whether it was carried out.
    fn command(&mut self, data: &[u8]) -> bool {
        match data {
            [0, 0, on] => self.filter.promiscuous = *on != 0,
            [0, 1, on] => self.filter.all_multicast = *on != 0,
            [1, 0, tables @ ..] => {
                let Some((unicast, rest)) = addresses(tables) else { return false };
                let Some((multicast, _)) = addresses(rest) else { return false };
                // Too many to keep: all of them, and filtering is the guest's.
                self.filter.promiscuous |= unicast.len() > MAX_ADDRESSES;
                self.filter.all_multicast |= multicast.len() > MAX_ADDRESSES;
                let keep = |all: Vec<[u8; 6]>| all.into_iter().take(MAX_ADDRESSES).collect();
                (self.filter.unicast, self.filter.multicast) = (keep(unicast), keep(multicast));
            }
            [1, 1, mac @ ..] => match mac.try_into() {
                Ok(mac) => self.mac = mac,
                Err(_) => return false,
            },
            _ => return false,
        }
        true
    }

    fn control(&mut self, transport: &mut Transport) {
        loop {
            let Some((queue, memory)) = transport.queue(CONTROL) else { return };
            let Some(chain) = queue.pop(memory) else {
                queue.want_notifications(memory, true);
                if queue.has_chain(memory) {
                    continue;
                }
                break;
            };
            let mut data = Vec::new();
            let done = chain.gather(memory, 0, MAX_PACKET, &mut data) && self.command(&data);
            let written = chain.scatter(memory, 0, &[u8::from(!done)]);
            if let Some((queue, memory)) = transport.queue(CONTROL) {
                queue.push(memory, chain.head, written as u32);
            }
        }
        transport.publish(CONTROL);
    }
}

/// Describes a packet of `len` bytes in which TCP begins at `tcp` to the driver: its segments' size, and that its checksum is to be
/// filled in, for which the field gets the sum of the pseudo header. `head` is the header of `header_len` bytes and the packet's start.
fn describe(head: &mut [u8], header_len: usize, (len, tcp): (usize, usize), mss: u16) {
    const CHECKSUM: usize = 16;
    let (header, packet) = head.split_at_mut(header_len);
    let data = tcp + usize::from(packet[tcp + 12] >> 4) * 4;
    let pseudo = sum(&packet[26..34], 6 + (len - tcp) as u32);
    put(packet, tcp + CHECKSUM, pseudo as u16);
    header[0] = NEEDS_CSUM;
    header[1] = GSO_TCP4;
    for (at, value) in [(2, data), (4, mss.into()), (6, tcp), (8, CHECKSUM)] {
        header[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
}

/// A table of addresses, and what is behind it.
fn addresses(data: &[u8]) -> Option<(Vec<[u8; 6]>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let len = (u32::from_le_bytes(*count) as usize).checked_mul(6)?;
    let (table, rest) = rest.split_at_checked(len)?;
    let (all, _) = table.as_chunks::<6>();
    Some((all.to_vec(), rest))
}

impl VirtioDevice for VirtioNet {
    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn id(&self) -> u16 {
        1
    }

    fn class(&self) -> [u8; 3] {
        [0x02, 0x00, 0x00]
    }

    fn features(&self) -> u64 {
        bit::CSUM
            | bit::GUEST_CSUM
            | bit::MAC
            | bit::GUEST_TSO4
            | bit::HOST_TSO4
            | bit::HOST_TSO6
            | bit::HOST_ECN
            | bit::MRG_RXBUF
            | bit::STATUS
            | bit::CTRL_VQ
            | bit::CTRL_RX
            | bit::CTRL_MAC_ADDR
    }

    fn queues(&self) -> &'static [u16] {
        &[256, 256, 64]
    }

    /// Address and link status.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.extend_from_slice(&u16::from(self.link).to_le_bytes());
        config
    }

    /// Legacy drivers set the address here.
    fn config_written(&mut self, offset: usize, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(slot) = self.mac.get_mut(offset + i) {
                *slot = *byte;
            }
        }
    }

    fn activate(&mut self, transport: &mut Transport) {
        if !transport.has(bit::CTRL_RX) {
            self.filter = Filter::open();
        } else {
            self.filter.promiscuous = false;
        }
        self.transmit(transport);
        self.resume();
    }

    fn notified(&mut self, queue: usize, transport: &mut Transport) {
        match queue {
            RX => self.resume(),
            TX => self.transmit(transport),
            _ => self.control(transport),
        }
    }

    fn reset(&mut self, _transport: &mut Transport) {
        self.mac = self.own;
        self.filter = Filter::open();
        self.pending.clear();
        // What waits for buffers finds no driver, and goes.
        self.resume();
    }

    fn save(&self, out: &mut Writer) {
        let Self { own, driver: _, starved: _, mac, link, filter, pending } = self;
        let Filter { promiscuous, all_multicast, unicast, multicast } = filter;
        out.put_bytes(own);
        out.put_bytes(mac);
        [*link, *promiscuous, *all_multicast].into_iter().for_each(|v| out.put_bool(v));
        for table in [unicast, multicast] {
            out.put_u8(table.len() as u8);
            table.iter().for_each(|mac| out.put_bytes(mac));
        }
        out.put_u32(pending.len() as u32);
        pending.iter().for_each(|frame| out.put_blob(frame));
    }

    fn load(&mut self, input: &mut Reader<'_>) -> Result<(), Error> {
        let (mut own, mut mac) = ([0; 6], [0; 6]);
        input.take_into(&mut own)?;
        input.take_into(&mut mac)?;
        if own != self.own {
            return Err(input.invalid("the network card has another MAC address"));
        }
        let link = input.take_bool()?;
        let (promiscuous, all_multicast) = (input.take_bool()?, input.take_bool()?);
        let mut tables = [Vec::new(), Vec::new()];
        for table in &mut tables {
            let count = usize::from(input.take_u8()?);
            if count > MAX_ADDRESSES {
                return Err(input.invalid(format!("a table has {count} addresses")));
            }
            for _ in 0..count {
                let mut address = [0; 6];
                input.take_into(&mut address)?;
                table.push(address);
            }
        }
        let count = input.take_u32()?;
        if count > MAX_PENDING {
            return Err(input.invalid(format!("{count} frames wait to be sent")));
        }
        let mut pending = VecDeque::new();
        for _ in 0..count {
            pending.push_back(input.take_blob(MAX_PACKET)?.to_vec());
        }
        let [unicast, multicast] = tables;
        (self.mac, self.link, self.pending) = (mac, link, pending);
        self.filter = Filter { promiscuous, all_multicast, unicast, multicast };
        Ok(())
    }
}
