//! Hyper-V's synthetic debugger: how the kernel of a Windows guest reaches a kernel debugger on the host or beyond (VirtualBox manual,
//! 9.25, "Paravirtualized debugging").
//!
//! A guest hands over data by registers, or by calls ([`call`], Hypervisor Top Level Functional Specification 6.0b, appendix A). By registers it
//! is what the debugger's protocol calls for. By calls it is whole Ethernet frames, of which the debugger gets the payload of UDP alone; the
//! guest asks for an address (DHCP) and for its neighbour's (ARP) before, and is answered here. The registers are in no specification: their
//! numbers and bits are those of VirtualBox and QEMU.

use std::fmt;
use std::sync::Arc;

use cpum::cpuid::Entry;
use pgm::Pgm;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpPacket,
    DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Address,
    Ipv4Packet, Ipv4Repr, UdpPacket,
};
use ssm::{Error, Reader, Writer};
use vbox_types::GuestPhys;

use crate::{HYPERVISOR, leaf, signature};

/// The way to a debugger: datagrams to and from it.
pub trait Debugger: Send + Sync {
    /// Sends one datagram, without waiting; whether the host took it.
    fn send(&self, payload: &[u8]) -> bool;
    /// Takes the oldest datagram that has come.
    fn receive(&self) -> Option<Vec<u8>>;
    /// Whether [`Debugger::receive`] has something to give.
    fn has_data(&self) -> bool;
}

/// How guests are to reach the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugInterface {
    /// Whether guests find Microsoft's virtualization service, without which some do not look for a debugger.
    pub service: bool,
    /// Whether guests are asked to use calls, not registers.
    pub calls: bool,
}

/// Leaf 0x40000003 EBX: a guest may debug itself.
pub(crate) const PRIVILEGE: u32 = 1 << 11;
/// Leaf 0x40000003 EDX: the calls and the registers are there.
pub(crate) const FEATURES: u32 = 1 << 1 | 1 << 11;
/// Beyond these leaves there are none where the service shows.
pub(crate) const LAST_LEAF: u32 = HYPERVISOR + 0x82;

/// The leaves of the virtualization service.
pub(crate) fn service_leaves() -> [Entry; 3] {
    /// Kernel debugging is allowed.
    const DEBUGGING: u32 = 1 << 1;
    [
        signature(HYPERVISOR + 0x80, LAST_LEAF, b"Microsoft VS"),
        leaf(HYPERVISOR + 0x81, u32::from_le_bytes(*b"VS#1"), 0, 0, 0),
        leaf(LAST_LEAF, DEBUGGING, 0, 0, 0),
    ]
}

mod msr {
    pub(super) const SYNIC_CONTROL: u32 = 0x4000_0080;
    pub(super) const SYNIC_VERSION: u32 = 0x4000_0081;
    pub(super) const EVENT_PAGE: u32 = 0x4000_0082;
    pub(super) const MESSAGE_PAGE: u32 = 0x4000_0083;
    pub(super) const END_OF_MESSAGE: u32 = 0x4000_0084;
    pub(super) const SOURCE_0: u32 = 0x4000_0090;
    pub(super) const SOURCE_15: u32 = 0x4000_009f;
    pub(super) const CONTROL: u32 = 0x4000_00f1;
    pub(super) const STATUS: u32 = 0x4000_00f2;
    pub(super) const SEND_BUFFER: u32 = 0x4000_00f3;
    pub(super) const RECEIVE_BUFFER: u32 = 0x4000_00f4;
    pub(super) const PENDING_BUFFER: u32 = 0x4000_00f5;
    pub(super) const OPTIONS: u32 = 0x4000_00ff;
}

/// Call codes.
pub(crate) mod call {
    pub(crate) const POST_MESSAGE: u16 = 0x5c;
    pub(crate) const POST_DATA: u16 = 0x69;
    pub(crate) const RETRIEVE_DATA: u16 = 0x6a;
    pub(crate) const RESET_SESSION: u16 = 0x6b;
}

/// Results of calls.
mod result {
    pub(super) const SUCCESS: u64 = 0;
    pub(super) const INVALID_ALIGNMENT: u64 = 4;
    pub(super) const INVALID_PARAMETER: u64 = 5;
    pub(super) const NOT_ACKNOWLEDGED: u64 = 0x14;
    pub(super) const NO_DATA: u64 = 0x1b;
    pub(super) const INSUFFICIENT_BUFFER: u64 = 0x33;
}

/// CONTROL: send what is in the send buffer, its size in bits 16 to 31.
const SEND: u64 = 1;
/// CONTROL: put what has come into the receive buffer.
const RECEIVE: u64 = 2;
/// STATUS: it was sent.
const SENT: u64 = 1;
/// STATUS: it is in the receive buffer, its size in bits 16 to 31.
const RECEIVED: u64 = 4;
/// OPTIONS: use calls.
const USE_CALLS: u64 = 4;
/// Bytes of a buffer: one page.
const PAGE: usize = 0x1000;
/// Bytes that one call takes or gives.
const MOST: usize = PAGE - 8;
/// A synthetic interrupt source that is masked, as all are after a reset.
const MASKED: u64 = 1 << 16;

/// Where a call's parameters are.
#[derive(Clone, Copy)]
pub(crate) struct Parameters {
    /// The input is in registers, and this is it.
    pub(crate) fast: bool,
    pub(crate) input: u64,
    pub(crate) output: u64,
}

/// A vCPU's registers of the synthetic interrupt controller. Nothing interrupts: a guest writes them on its way to the debugger.
#[derive(Clone, Debug)]
struct Synic {
    control: u64,
    events: u64,
    messages: u64,
    sources: [u64; 16],
}

impl Default for Synic {
    fn default() -> Self {
        Self { control: 0, events: 0, messages: 0, sources: [MASKED; 16] }
    }
}

/// The guest's side of the connection.
pub(crate) struct State {
    interface: DebugInterface,
    debugger: Arc<dyn Debugger>,
    status: u64,
    send_buffer: u64,
    receive_buffer: u64,
    pending_buffer: u64,
    synic: Vec<Synic>,
    frames: Frames,
    /// It is in VBox.log that the guest uses the connection.
    told: bool,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("interface", &self.interface).finish_non_exhaustive()
    }
}

impl State {
    pub(crate) fn new(vcpus: usize, interface: DebugInterface, debugger: Arc<dyn Debugger>) -> Self {
        Self {
            interface,
            debugger,
            status: 0,
            send_buffer: 0,
            receive_buffer: 0,
            pending_buffer: 0,
            synic: vec![Synic::default(); vcpus],
            frames: Frames::default(),
            told: false,
        }
    }

    /// As after a reset of the machine.
    pub(crate) fn fresh(&self) -> Self {
        Self::new(self.synic.len(), self.interface, self.debugger.clone())
    }

    pub(crate) fn read_msr(&self, vcpu: usize, number: u32) -> Option<u64> {
        Some(match number {
            msr::STATUS => self.status,
            msr::SEND_BUFFER => self.send_buffer,
            msr::RECEIVE_BUFFER => self.receive_buffer,
            msr::PENDING_BUFFER => self.pending_buffer,
            msr::OPTIONS if self.interface.calls => USE_CALLS,
            msr::OPTIONS => 0,
            _ if !self.interface.service => return None,
            msr::SYNIC_VERSION => 1,
            msr::END_OF_MESSAGE => 0,
            _ => *self.synic.get(vcpu)?.register(number)?,
        })
    }

    /// `None` if there is no such register, or it does not take the value.
    pub(crate) fn write_msr(&mut self, pgm: &Pgm, vcpu: usize, number: u32, value: u64) -> Option<()> {
        match number {
            msr::CONTROL => return self.control(pgm, value),
            msr::SEND_BUFFER => self.send_buffer = value,
            msr::RECEIVE_BUFFER => self.receive_buffer = value,
            msr::PENDING_BUFFER => {
                self.pending_buffer = value;
                self.tell_pending(pgm);
            }
            _ if !self.interface.service => return None,
            msr::END_OF_MESSAGE => {}
            _ => *self.synic.get_mut(vcpu)?.register_mut(number)? = value,
        }
        Some(())
    }

    fn control(&mut self, pgm: &Pgm, value: u64) -> Option<()> {
        let size = (value >> 16 & 0xffff) as usize;
        match value & (SEND | RECEIVE) {
            0 => {}
            SEND => {
                self.note("registers");
                let data = (1..=PAGE).contains(&size).then(|| read(pgm, self.send_buffer, size)).flatten();
                let sent = data.is_some_and(|data| self.debugger.send(&data));
                self.status = if sent { SENT } else { 0 };
            }
            RECEIVE => {
                self.note("registers");
                self.status = 0;
                if pgm.memory_at(GuestPhys(self.receive_buffer)).is_some()
                    && let Some(mut data) = self.receive(pgm)
                {
                    data.truncate(PAGE);
                    pgm.write(GuestPhys(self.receive_buffer), &data);
                    self.status = (data.len() as u64) << 16 | RECEIVED;
                }
            }
            _ => return None,
        }
        Some(())
    }

    /// The result of a call; `None` if it is none of the debugger's.
    pub(crate) fn call(&mut self, pgm: &Pgm, vcpu: usize, code: u16, at: Parameters) -> Option<u64> {
        Some(match code {
            call::POST_DATA => self.post(pgm, at).unwrap_or_else(|error| error),
            call::RETRIEVE_DATA => self.retrieve(pgm, at).unwrap_or_else(|error| error),
            call::RESET_SESSION => match flags(pgm, at) {
                Ok(0) => result::INVALID_PARAMETER,
                // Nothing is kept here that could be dropped.
                Ok(_) => result::SUCCESS,
                Err(error) => error,
            },
            call::POST_MESSAGE if self.interface.service => {
                self.refuse_message(pgm, vcpu, at).unwrap_or_else(|error| error)
            }
            _ => return None,
        })
    }

    /// HvPostDebugData. In: size, options, data. Out: bytes that were not taken.
    fn post(&mut self, pgm: &Pgm, at: Parameters) -> Result<u64, u64> {
        self.note("calls");
        let [size, _] = words(pgm, at.input)?;
        check(pgm, at.output)?;
        let size = size as usize;
        if size > MOST {
            return Err(result::INVALID_PARAMETER);
        }
        let data = read(pgm, at.input.wrapping_add(8), size).ok_or(result::INVALID_PARAMETER)?;
        let taken = match self.frames.hear(&data) {
            Some(payload) => self.debugger.send(payload),
            None => true,
        };
        let left = if taken { 0 } else { size as u32 };
        pgm.write(GuestPhys(at.output), &u64::from(left).to_le_bytes());
        Ok(if taken { result::SUCCESS } else { result::INSUFFICIENT_BUFFER })
    }

    /// HvRetrieveDebugData. In: size, options, how long to wait. Out: size, what is missing, data. It is never waited for: guests ask again.
    fn retrieve(&mut self, pgm: &Pgm, at: Parameters) -> Result<u64, u64> {
        /// Options: whether there is anything, but not yet what.
        const TEST: u32 = 2;
        self.note("calls");
        let [size, options] = words(pgm, at.input)?;
        check(pgm, at.output)?;
        let room = size as usize;
        if room > MOST {
            return Err(result::INVALID_PARAMETER);
        }
        let frame = if room == 0 || options & TEST != 0 {
            None
        } else if let Some(answer) = self.frames.answer() {
            Some(answer)
        } else if self.frames.is_heard {
            self.receive(pgm).map(|payload| self.frames.wrap(&payload))
        } else {
            None
        };
        // What the guest has no room for is lost, as on a wire.
        let frame = frame.filter(|frame| frame.len() <= room).unwrap_or_default();
        let mut out = Vec::with_capacity(8 + frame.len());
        out.extend((frame.len() as u32).to_le_bytes());
        out.extend(((room - frame.len()) as u32).to_le_bytes());
        out.extend(&frame);
        pgm.write(GuestPhys(at.output), &out);
        let none = frame.is_empty() && room != 0 && options & TEST == 0;
        Ok(if none { result::NO_DATA } else { result::SUCCESS })
    }

    /// A message to VMBus, which is not there: the refusal has the guest go on with the debugger's registers. It looks for an answer all the
    /// same.
    fn refuse_message(&self, pgm: &Pgm, vcpu: usize, at: Parameters) -> Result<u64, u64> {
        /// Connection and message type of VMBus.
        const VMBUS: u32 = 1;
        /// Where VMBus's messages come.
        const SOURCE: usize = 2;
        const SLOT: u64 = 256;
        const ENABLED: u64 = 1;
        let [connection, _] = words(pgm, at.input)?;
        let [kind, _] = words(pgm, at.input.wrapping_add(8))?;
        if let Some(synic) = self.synic.get(vcpu)
            && (connection, kind) == (VMBUS, VMBUS)
            && synic.sources[SOURCE] & MASKED == 0
            && synic.messages & ENABLED != 0
        {
            let mut message = [0; SLOT as usize];
            (message[0], message[4], message[16]) = (VMBUS as u8, 0xf, 0xf);
            let page = synic.messages & !(PAGE as u64 - 1);
            pgm.write(GuestPhys(page.wrapping_add(SOURCE as u64 * SLOT)), &message);
        }
        Ok(result::NOT_ACKNOWLEDGED)
    }

    fn receive(&mut self, pgm: &Pgm) -> Option<Vec<u8>> {
        let data = self.debugger.receive();
        self.tell_pending(pgm);
        data
    }

    /// Guests look at a byte in memory before they ask for data.
    pub(crate) fn tell_pending(&self, pgm: &Pgm) {
        if self.pending_buffer != 0 {
            pgm.write(GuestPhys(self.pending_buffer), &[self.debugger.has_data().into()]);
        }
    }

    fn note(&mut self, how: &str) {
        if !self.told {
            self.told = true;
            tracing::info!(target: "gim", "HyperV: the guest reaches for a kernel debugger, by {how}");
        }
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        for value in [self.status, self.send_buffer, self.receive_buffer, self.pending_buffer] {
            out.put_u64(value);
        }
        for Synic { control, events, messages, sources } in &self.synic {
            for value in [control, events, messages].into_iter().chain(sources) {
                out.put_u64(*value);
            }
        }
        self.frames.save(out);
    }

    pub(crate) fn load(&self, input: &mut Reader<'_>) -> Result<Self, Error> {
        let mut new = self.fresh();
        for value in [&mut new.status, &mut new.send_buffer, &mut new.receive_buffer, &mut new.pending_buffer]
        {
            *value = input.take_u64()?;
        }
        for Synic { control, events, messages, sources } in &mut new.synic {
            for value in [control, events, messages].into_iter().chain(sources) {
                *value = input.take_u64()?;
            }
        }
        new.frames = Frames::load(input)?;
        Ok(new)
    }
}

impl Synic {
    fn register(&self, number: u32) -> Option<&u64> {
        Some(match number {
            msr::SYNIC_CONTROL => &self.control,
            msr::EVENT_PAGE => &self.events,
            msr::MESSAGE_PAGE => &self.messages,
            msr::SOURCE_0..=msr::SOURCE_15 => &self.sources[(number - msr::SOURCE_0) as usize],
            _ => return None,
        })
    }

    fn register_mut(&mut self, number: u32) -> Option<&mut u64> {
        Some(match number {
            msr::SYNIC_CONTROL => &mut self.control,
            msr::EVENT_PAGE => &mut self.events,
            msr::MESSAGE_PAGE => &mut self.messages,
            msr::SOURCE_0..=msr::SOURCE_15 => &mut self.sources[(number - msr::SOURCE_0) as usize],
            _ => return None,
        })
    }
}

/// Parameters lie in memory, at multiples of eight.
fn check(pgm: &Pgm, at: u64) -> Result<(), u64> {
    if !at.is_multiple_of(8) {
        return Err(result::INVALID_ALIGNMENT);
    }
    pgm.memory_at(GuestPhys(at)).map(drop).ok_or(result::INVALID_PARAMETER)
}

/// The first two words of a call's input.
fn words(pgm: &Pgm, at: u64) -> Result<[u32; 2], u64> {
    check(pgm, at)?;
    let mut bytes = [0; 8];
    pgm.read(GuestPhys(at), &mut bytes);
    let both = u64::from_le_bytes(bytes);
    Ok([both as u32, (both >> 32) as u32])
}

fn flags(pgm: &Pgm, at: Parameters) -> Result<u32, u64> {
    if at.fast { Ok(at.input as u32) } else { words(pgm, at.input).map(|[flags, _]| flags) }
}

/// Guest memory from `at` on; `None` if there is none.
fn read(pgm: &Pgm, at: u64, size: usize) -> Option<Vec<u8>> {
    pgm.memory_at(GuestPhys(at))?;
    let mut data = vec![0; size];
    pgm.read(GuestPhys(at), &mut data);
    Some(data)
}

/// What the guest takes for its network: itself and one neighbour.
const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 5, 5);
const HOST: Ipv4Address = Ipv4Address::new(10, 0, 5, 1);
const MASK: Ipv4Address = Ipv4Address::new(255, 255, 255, 0);
/// Guests have no address of their own here: all zeros.
const GUEST_MAC: EthernetAddress = EthernetAddress([0; 6]);
const HOST_MAC: EthernetAddress = EthernetAddress([0, 0, 0, 0, 0, 1]);
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const UDP: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Arp,
    Offer(u32),
    Acknowledge(u32),
}

/// The frames in which a guest packs the debugger's data.
#[derive(Debug)]
struct Frames {
    /// Where the debugger's data came from, and is to go to.
    guest: Ipv4Address,
    guest_port: u16,
    port: u16,
    /// The guest has begun to talk to the debugger.
    is_heard: bool,
    answer: Option<Answer>,
}

impl Default for Frames {
    fn default() -> Self {
        Self { guest: Ipv4Address::UNSPECIFIED, guest_port: 0, port: 0, is_heard: false, answer: None }
    }
}

impl Frames {
    /// What of a frame is for the debugger.
    fn hear<'f>(&mut self, frame: &'f [u8]) -> Option<&'f [u8]> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        match frame.ethertype() {
            EthernetProtocol::Arp => {
                let asked = ArpPacket::new_checked(frame.payload()).ok()?;
                if let Ok(ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Request,
                    source_protocol_addr: GUEST,
                    target_protocol_addr: HOST,
                    ..
                }) = ArpRepr::parse(&asked)
                {
                    self.answer = Some(Answer::Arp);
                }
                None
            }
            EthernetProtocol::Ipv4 => {
                let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
                let (from, to) = (packet.src_addr(), packet.dst_addr());
                if packet.next_header() != IpProtocol::Udp {
                    return None;
                }
                let datagram = UdpPacket::new_checked(packet.payload()).ok()?;
                let payload = datagram.payload();
                let ports = (datagram.src_port(), datagram.dst_port());
                let dhcp = ports == (DHCP_CLIENT_PORT, DHCP_SERVER_PORT);
                if dhcp && self.hear_dhcp(payload) {
                    return None;
                }
                // The debugger's data has no ports. Windows 8.1 leaves those of DHCP in place towards the end, and only then no destination.
                let debugger = ports == (0, 0) || (dhcp && from == GUEST && to.is_unspecified());
                if !debugger || payload.is_empty() {
                    return None;
                }
                (self.guest, self.guest_port, self.port) = (from, ports.0, ports.1);
                (self.is_heard, self.answer) = (true, None);
                Some(payload)
            }
            _ => None,
        }
    }

    /// Whether it is a message of DHCP.
    fn hear_dhcp(&mut self, message: &[u8]) -> bool {
        let Ok(request) = DhcpPacket::new_checked(message) else { return false };
        let Ok(DhcpRepr { message_type, transaction_id, .. }) = DhcpRepr::parse(&request) else {
            return false;
        };
        match message_type {
            DhcpMessageType::Discover => self.answer = Some(Answer::Offer(transaction_id)),
            DhcpMessageType::Request => self.answer = Some(Answer::Acknowledge(transaction_id)),
            _ => {}
        }
        true
    }

    /// The answer to what the guest asked last, once.
    fn answer(&mut self) -> Option<Vec<u8>> {
        match self.answer.take()? {
            Answer::Arp => {
                let reply = ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Reply,
                    source_hardware_addr: HOST_MAC,
                    source_protocol_addr: HOST,
                    target_hardware_addr: GUEST_MAC,
                    target_protocol_addr: GUEST,
                };
                let mut frame = vec![0; ETHERNET + reply.buffer_len()];
                let mut ethernet = ethernet(&mut frame, GUEST_MAC, EthernetProtocol::Arp);
                reply.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
                Some(frame)
            }
            Answer::Offer(id) => dhcp(DhcpMessageType::Offer, id),
            Answer::Acknowledge(id) => dhcp(DhcpMessageType::Ack, id),
        }
    }

    /// The debugger's data as a frame to the guest.
    fn wrap(&self, payload: &[u8]) -> Vec<u8> {
        let addresses = (Ipv4Address::UNSPECIFIED, self.guest);
        datagram(GUEST_MAC, addresses, (self.port, self.guest_port), payload)
    }

    fn save(&self, out: &mut Writer) {
        let Self { guest, guest_port, port, is_heard, answer } = self;
        out.put_bytes(&guest.octets());
        out.put_u16(*guest_port);
        out.put_u16(*port);
        out.put_bool(*is_heard);
        let (kind, id) = match *answer {
            None => (0, 0),
            Some(Answer::Arp) => (1, 0),
            Some(Answer::Offer(id)) => (2, id),
            Some(Answer::Acknowledge(id)) => (3, id),
        };
        out.put_u8(kind);
        out.put_u32(id);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, Error> {
        let mut guest = [0; 4];
        input.take_into(&mut guest)?;
        let (guest_port, port) = (input.take_u16()?, input.take_u16()?);
        let is_heard = input.take_bool()?;
        let answer = match (input.take_u8()?, input.take_u32()?) {
            (0, _) => None,
            (1, _) => Some(Answer::Arp),
            (2, id) => Some(Answer::Offer(id)),
            (3, id) => Some(Answer::Acknowledge(id)),
            (other, _) => return Err(input.invalid(format!("answer {other} to the debugged guest"))),
        };
        Ok(Self { guest: Ipv4Address::from(guest), guest_port, port, is_heard, answer })
    }
}

fn ethernet(frame: &mut [u8], to: EthernetAddress, ethertype: EthernetProtocol) -> EthernetFrame<&mut [u8]> {
    let mut ethernet = EthernetFrame::new_unchecked(frame);
    EthernetRepr { src_addr: HOST_MAC, dst_addr: to, ethertype }.emit(&mut ethernet);
    ethernet
}

/// A frame with one datagram. Its own checksum is left out, as IPv4 allows.
fn datagram(
    mac: EthernetAddress,
    (from, to): (Ipv4Address, Ipv4Address),
    (from_port, to_port): (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + IPV4 + UDP + payload.len()];
    let mut ethernet = ethernet(&mut frame, mac, EthernetProtocol::Ipv4);
    let mut packet = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    let payload_len = UDP + payload.len();
    Ipv4Repr { src_addr: from, dst_addr: to, next_header: IpProtocol::Udp, payload_len, hop_limit: 255 }
        .emit(&mut packet, &ChecksumCapabilities::default());
    let mut udp = UdpPacket::new_unchecked(packet.payload_mut());
    udp.set_src_port(from_port);
    udp.set_dst_port(to_port);
    udp.set_len(payload_len as u16);
    udp.set_checksum(0);
    udp.payload_mut().copy_from_slice(payload);
    frame
}

fn dhcp(message_type: DhcpMessageType, transaction_id: u32) -> Option<Vec<u8>> {
    let reply = DhcpRepr {
        message_type,
        transaction_id,
        secs: 0,
        client_hardware_address: GUEST_MAC,
        client_ip: Ipv4Address::UNSPECIFIED,
        your_ip: GUEST,
        server_ip: Ipv4Address::UNSPECIFIED,
        router: Some(HOST),
        subnet_mask: Some(MASK),
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: false,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(HOST),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        // For good.
        lease_duration: Some(u32::MAX),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut message = vec![0; reply.buffer_len()];
    reply.emit(&mut DhcpPacket::new_unchecked(&mut message)).ok()?;
    let (mac, to) = match message_type {
        DhcpMessageType::Offer => (EthernetAddress::BROADCAST, Ipv4Address::BROADCAST),
        _ => (GUEST_MAC, GUEST),
    };
    Some(datagram(mac, (HOST, to), (DHCP_SERVER_PORT, DHCP_CLIENT_PORT), &message))
}
