//! A target made of a script: what a real one does, and what it should not do.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicU32;

use parking_lot::Mutex;

use super::pdu::{FINAL, HEADER, Header, NO_TAG, put, request, response};
use super::*;

const BLOCK: usize = 512;
const BLOCKS: usize = 4096;

/// How the target behaves where it may choose.
#[derive(Clone)]
struct Manners {
    /// Its answer to our offers.
    agreed: &'static str,
    /// Most bytes of a Data-In and of an R2T.
    piece: usize,
    /// The last Data-In has the status.
    collapsed: bool,
    /// Size of a block.
    block: usize,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            agreed: "InitialR2T=Yes\0ImmediateData=Yes\0FirstBurstLength=65536\0",
            piece: 8192,
            collapsed: true,
            block: BLOCK,
        }
    }
}

/// One connection, from the target's side.
struct Peer {
    stream: TcpStream,
    status: u32,
    manners: Manners,
    disk: Arc<Mutex<Vec<u8>>>,
    /// Requests that came while others were looked for.
    left: VecDeque<(Header, Vec<u8>)>,
}

/// What a test does with a request before the target looks at it.
enum Act {
    Serve,
    /// It was answered.
    Answered,
    /// The connection is to be closed.
    Close,
}

type Hook = Box<dyn FnMut(&mut Peer, &Header, &[u8]) -> Act + Send>;

impl Peer {
    /// The next request, or the first one that was left.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        self.left.pop_front().or_else(|| self.take_new())
    }

    fn take_new(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).ok()?;
        let len = usize::from(header[5]) << 16 | usize::from(header[6]) << 8 | usize::from(header[7]);
        let mut data = vec![0; len.next_multiple_of(4)];
        self.stream.read_exact(&mut data).ok()?;
        data.truncate(len);
        Some((Header(header), data))
    }

    /// Sends with the sequence numbers of the moment.
    fn send(&mut self, header: Header, data: &[u8]) {
        let mut bytes = Vec::new();
        put(&mut bytes, header.set_word::<24>(self.status).set_word::<28>(0).set_word::<32>(1000), data);
        // The other side may be gone already, which is what some tests are about.
        let _ = self.stream.write_all(&bytes);
    }

    /// As [`Peer::send`], with a status.
    fn send_status(&mut self, header: Header, data: &[u8]) {
        self.send(header, data);
        self.status = self.status.wrapping_add(1);
    }

    fn respond(&mut self, tag: u32, status: u8, sense: &[u8]) {
        let mut header = Header::new(response::RESPONSE, FINAL).set_tag(tag);
        header.0[3] = status;
        let mut data = Vec::new();
        if !sense.is_empty() {
            data.extend((sense.len() as u16).to_be_bytes());
            data.extend(sense);
        }
        self.send_status(header, &data);
    }

    fn check(&mut self, tag: u32, key: u8, code: u8) {
        let mut sense = [0; 18];
        (sense[0], sense[2], sense[7], sense[12]) = (0x70, key, 10, code);
        self.respond(tag, 2, &sense);
    }

    fn login(&mut self, flags: u8, class: u16, text: &str) {
        let mut header = Header::new(response::LOGIN, flags).set_tag(1);
        header.0[36..38].copy_from_slice(&class.to_be_bytes());
        self.send_status(header, text.as_bytes());
    }

    fn data_in(&mut self, tag: u32, data: &[u8]) {
        let piece = self.manners.piece;
        for (number, part) in data.chunks(piece).enumerate() {
            let at = number * piece;
            let last = at + part.len() == data.len();
            let flags = if last { FINAL | u8::from(self.manners.collapsed) } else { 0 };
            let header = Header::new(response::DATA_IN, flags)
                .set_tag(tag)
                .set_word::<20>(NO_TAG)
                .set_word::<36>(number as u32)
                .set_word::<40>(at as u32);
            if last && self.manners.collapsed {
                self.send_status(header, part);
                return;
            }
            self.send(header, part);
        }
        self.respond(tag, 0, &[]);
    }

    /// Takes the rest of a write's data, which `have` bytes came of: first what comes unasked, then what it asks for.
    fn data_out(&mut self, tag: u32, len: usize, mut data: Vec<u8>, finished: bool) -> Option<Vec<u8>> {
        let mut more = !finished;
        while more {
            more = self.one_data_out(tag, NO_TAG, &mut data)?;
        }
        while data.len() < len {
            let part = (len - data.len()).min(self.manners.piece);
            let header = Header::new(response::R2T, FINAL)
                .set_tag(tag)
                .set_word::<20>(77)
                .set_word::<40>(data.len() as u32)
                .set_word::<44>(part as u32);
            self.send(header, &[]);
            while self.one_data_out(tag, 77, &mut data)? {}
        }
        Some(data)
    }

    /// Whether more is to come.
    fn one_data_out(&mut self, tag: u32, transfer: u32, data: &mut Vec<u8>) -> Option<bool> {
        let ours =
            |(header, _): &(Header, Vec<u8>)| header.opcode() == request::DATA_OUT && header.tag() == tag;
        let (header, part) = match self.left.iter().position(ours) {
            Some(at) => self.left.remove(at)?,
            None => loop {
                let new = self.take_new()?;
                if ours(&new) {
                    break new;
                }
                self.left.push_back(new);
            },
        };
        assert_eq!(header.word::<20>(), transfer);
        assert_eq!(header.word::<40>() as usize, data.len(), "data are sent in their order");
        data.extend(part);
        Some(header.flags() & FINAL == 0)
    }

    fn command(&mut self, header: &Header, unasked: Vec<u8>) -> Option<()> {
        let (tag, cdb) = (header.tag(), &header.0[32..]);
        let block = self.manners.block;
        let blocks = (BLOCKS * BLOCK / block) as u64;
        let long = |at: usize| u32::from_be_bytes([cdb[at], cdb[at + 1], cdb[at + 2], cdb[at + 3]]) as usize;
        let range = |at: usize, count: usize| at * block..(at + count) * block;
        let ten = || range(long(2), usize::from(cdb[7]) << 8 | usize::from(cdb[8]));
        match cdb[0] {
            0x00 | 0x35 => self.respond(tag, 0, &[]),
            0x12 if cdb[2] == 0xb2 => self.data_in(tag, &[0, 0xb2, 0, 4, 0, 0x80, 0, 0]),
            0x12 if cdb[2] == 0xb0 => {
                let mut page = [0; 64];
                (page[1], page[23], page[27]) = (0xb0, 16, 1);
                self.data_in(tag, &page);
            }
            0x12 => self.data_in(tag, &[0; 36]),
            0x1a => self.data_in(tag, &[3, 0, 0, 0]),
            0x9e => {
                let mut answer = [0; 32];
                answer[..8].copy_from_slice(&(blocks - 1).to_be_bytes());
                answer[8..12].copy_from_slice(&(block as u32).to_be_bytes());
                answer[14] = 0xc0;
                self.data_in(tag, &answer);
            }
            0x28 => {
                let data = self.disk.lock()[ten()].to_vec();
                self.data_in(tag, &data);
            }
            0x2a => {
                let range = ten();
                let data = self.data_out(tag, range.len(), unasked, header.flags() & FINAL != 0)?;
                self.disk.lock()[range].copy_from_slice(&data);
                self.respond(tag, 0, &[]);
            }
            0x42 => {
                let list = unasked;
                let word = |at: usize| {
                    u32::from_be_bytes([list[at], list[at + 1], list[at + 2], list[at + 3]]) as usize
                };
                self.disk.lock()[range(word(12), word(16))].fill(0);
                self.respond(tag, 0, &[]);
            }
            other => panic!("a command 0x{other:x}"),
        }
        Some(())
    }

    /// Serves a connection to its end.
    fn serve(mut self, hook: &mut Hook) {
        while let Some((header, data)) = self.take() {
            match hook(&mut self, &header, &data) {
                Act::Serve => {}
                Act::Answered => continue,
                Act::Close => return,
            }
            match header.opcode() {
                request::LOGIN if header.flags() == 0x81 => self.login(0x81, 0, ""),
                request::LOGIN => {
                    let agreed = self.manners.agreed;
                    self.login(0x87, 0, agreed);
                }
                request::COMMAND => {
                    if self.command(&header, data).is_none() {
                        return;
                    }
                }
                request::LOGOUT => {
                    self.send_status(Header::new(response::LOGOUT, FINAL).set_tag(header.tag()), &[])
                }
                request::NOP_OUT if header.tag() != NO_TAG => {
                    let answer =
                        Header::new(response::NOP_IN, FINAL).set_tag(header.tag()).set_word::<20>(NO_TAG);
                    self.send_status(answer, &[]);
                }
                other => panic!("a request 0x{other:x}"),
            }
        }
    }
}

/// A target that serves one connection after another.
struct Fixture {
    target: Target,
    disk: Arc<Mutex<Vec<u8>>>,
}

fn fixture(manners: Manners, properties: &[(&str, &str)], mut hook: Hook) -> Fixture {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let disk = Arc::new(Mutex::new((0..BLOCKS * BLOCK).map(|i| (i / 7) as u8).collect()));
    let content = disk.clone();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let peer = Peer {
                stream,
                status: 900,
                manners: manners.clone(),
                disk: content.clone(),
                left: VecDeque::new(),
            };
            peer.serve(&mut hook);
        }
    });
    let given = |name: &str| properties.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    let target = Target::new(|name| match name {
        "TargetAddress" => Some(address.as_str()),
        "TargetName" => Some("iqn.2026-11.test:disk"),
        name => given(name),
    });
    Fixture { target: target.unwrap(), disk }
}

/// A target that does as it should.
fn plain(manners: Manners) -> Fixture {
    fixture(manners, &[], Box::new(|_, _, _| Act::Serve))
}

/// A target whose hook sees the commands of one opcode of SCSI alone, with their number.
fn on_command(opcode: u8, mut hook: impl FnMut(&mut Peer, &Header, u32) -> Act + Send + 'static) -> Fixture {
    let mut number = 0;
    fixture(
        Manners::default(),
        &[("Timeout", "1000")],
        Box::new(move |peer, header, _| {
            if header.opcode() != request::COMMAND || header.0[32] != opcode {
                return Act::Serve;
            }
            number += 1;
            hook(peer, header, number)
        }),
    )
}

impl Fixture {
    fn open(&self) -> Disk {
        Disk::open(&self.target, true).unwrap()
    }

    /// Reads and writes pieces of many sizes, whole blocks and not, and compares.
    fn load(&self, disk: &Disk) {
        for (n, (offset, len)) in
            [(0, 512), (512, 70_000), (513, 1), (99, 300_000), (4095, 4098), (1_000_000, 1 << 20)]
                .into_iter()
                .enumerate()
        {
            let mut out = vec![0; len];
            disk.read_at(offset as u64, &mut out).unwrap();
            assert!(out == self.disk.lock()[offset..offset + len], "read of {len} at {offset}");
            let data: Vec<u8> = (0..len).map(|i| (i * 31 + n) as u8).collect();
            let mut expected = self.disk.lock().clone();
            expected[offset..offset + len].copy_from_slice(&data);
            disk.write_at(offset as u64, &data).unwrap();
            assert!(*self.disk.lock() == expected, "write of {len} at {offset}");
        }
        disk.sync().unwrap();
    }
}

fn refused(fixture: &Fixture) -> String {
    Disk::open(&fixture.target, true).err().unwrap().to_string()
}

#[test]
fn data_arrive_whole_in_whatever_pieces_the_target_wants_them() {
    for agreed in [
        "",
        "InitialR2T=No\0ImmediateData=No\0FirstBurstLength=2048\0MaxRecvDataSegmentLength=512\0",
        "InitialR2T=No\0ImmediateData=Yes\0FirstBurstLength=65536\0MaxRecvDataSegmentLength=4096\0",
        "InitialR2T=Yes\0ImmediateData=Yes\0MaxBurstLength=262144\0MaxRecvDataSegmentLength=262144\0",
    ] {
        for (piece, collapsed, block) in [(512, true, 512), (1000, false, 512), (65536, true, 4096)] {
            let fixture = plain(Manners { agreed, piece, collapsed, block });
            let disk = fixture.open();
            assert_eq!(disk.len().unwrap(), (BLOCKS * BLOCK) as u64);
            fixture.load(&disk);
        }
    }
}

#[test]
fn what_lies_past_the_end_reads_as_zeros_and_cannot_be_written() {
    let fixture = plain(Manners::default());
    let disk = fixture.open();
    let end = disk.len().unwrap();
    let mut out = [1; 1024];
    disk.read_at(end - 512, &mut out).unwrap();
    assert!(out[..512] == fixture.disk.lock()[BLOCKS * BLOCK - 512..] && out[512..] == [0; 512]);
    assert!(disk.write_at(end - 512, &[0; 1024]).is_err() && disk.write_at(u64::MAX, &[0; 2]).is_err());
}

#[test]
fn discards_become_unmaps_of_whole_blocks_within_the_limit() {
    let fixture = plain(Manners::default());
    let disk = fixture.open();
    fixture.disk.lock().fill(1);
    disk.discard(100, 40 * 512).unwrap();
    let content = fixture.disk.lock().clone();
    let zeros = content.iter().filter(|byte| **byte == 0).count();
    assert_eq!(
        (zeros, content[511], content[512], content[40 * 512 - 1], content[40 * 512]),
        (39 * 512, 1, 0, 0, 1)
    );
}

#[test]
fn a_lost_connection_costs_nothing_but_time() {
    // In the middle of a write's data, of a read's, and before a flush is answered.
    for (opcode, data) in [(0x2a, true), (0x2a, false), (0x28, false), (0x35, false)] {
        let fixture = on_command(opcode, move |peer, header, number| {
            if number % 3 != 1 {
                return Act::Serve;
            }
            match header.0[32] {
                0x2a if data => {
                    let r2t = Header::new(response::R2T, FINAL).set_tag(header.tag()).set_word::<20>(5);
                    let at = if header.word::<20>() > 65536 { 65536 } else { 0 };
                    peer.send(r2t.set_word::<40>(at).set_word::<44>(header.word::<20>().min(512)), &[]);
                    let _ = peer.take();
                }
                0x28 => {
                    let part = Header::new(response::DATA_IN, 0).set_tag(header.tag());
                    peer.send(part, &[0xee; 512]);
                }
                _ => {}
            }
            Act::Close
        });
        fixture.load(&fixture.open());
    }
}

/// The new session has to end the old one, so that what was given to that does not come late.
#[test]
fn a_session_reinstates_the_one_that_was_lost() {
    let names = Arc::new(Mutex::new(Vec::new()));
    let seen = names.clone();
    let mut writes = 0;
    let fixture = fixture(
        Manners::default(),
        &[],
        Box::new(move |_, header, data| {
            if header.opcode() == request::LOGIN && header.flags() == 0x81 {
                let name = String::from_utf8_lossy(data).split('\0').next().unwrap().to_owned();
                seen.lock().push((header.0[8..16].to_vec(), name));
            }
            let write = header.opcode() == request::COMMAND && header.0[32] == 0x2a;
            writes += u32::from(write);
            if write && writes == 1 { Act::Close } else { Act::Serve }
        }),
    );
    fixture.open().write_at(0, &[1; 512]).unwrap();
    let other = fixture.open();
    let names = names.lock().clone();
    assert_eq!(names.len(), 3);
    assert_eq!(names[0], names[1]);
    assert!(names[0].0 != names[2].0 && names[0].0[6..] == [0, 0], "another disk has a session of its own");
    assert_eq!(names[0].1, "InitiatorName=iqn.2009-08.com.sun.virtualbox.initiator:01:127.0.0.1");
    drop(other);
}

#[test]
fn a_target_that_breaks_the_rules_loses_the_session_and_nothing_else() {
    type Misdeed = fn(&mut Peer, u32);
    let misdeeds: [(u8, Misdeed); 14] = [
        // Data that nobody asked for, out of order, too many, for a task that does not exist.
        (0x2a, |p, tag| p.send(Header::new(response::DATA_IN, 0).set_tag(tag), &[0; 4])),
        (0x28, |p, tag| {
            p.send(Header::new(response::DATA_IN, 0).set_tag(tag).set_word::<40>(512), &[0; 512])
        }),
        (0x28, |p, tag| p.send(Header::new(response::DATA_IN, 0).set_tag(tag).set_word::<36>(1), &[0; 512])),
        (0x28, |p, tag| p.send(Header::new(response::DATA_IN, 0).set_tag(tag), &[0; 4096])),
        (0x28, |p, _| p.send(Header::new(response::DATA_IN, 0).set_tag(0x999), &[0; 4])),
        // Asks for what there is not.
        (0x28, |p, tag| p.send(Header::new(response::R2T, FINAL).set_tag(tag).set_word::<44>(512), &[])),
        (0x2a, |p, tag| {
            p.send(
                Header::new(response::R2T, FINAL).set_tag(tag).set_word::<40>(u32::MAX).set_word::<44>(512),
                &[],
            )
        }),
        (0x2a, |p, tag| p.send(Header::new(response::R2T, FINAL).set_tag(tag).set_word::<44>(u32::MAX), &[])),
        (0x2a, |p, tag| p.send(Header::new(response::R2T, FINAL).set_tag(tag), &[])),
        // More data than agreed on, an unknown opcode, a lost status, a rejected command, a write that is none.
        (0x28, |p, tag| {
            let _ = p
                .stream
                .write_all(&Header::new(response::DATA_IN, 0).set_tag(tag).set_word::<4>(0x00ff_ffff).0);
        }),
        (0x28, |p, tag| p.send(Header::new(0x3c, 0).set_tag(tag), &[])),
        (0x28, |p, tag| {
            p.status += 1;
            p.respond(tag, 0, &[]);
        }),
        (0x28, |p, _| {
            p.send_status(Header::new(response::REJECT, FINAL).set_tag(NO_TAG), &[request::COMMAND])
        }),
        (0x28, |p, _| {
            let mut header = Header::new(response::ASYNC, FINAL).set_tag(NO_TAG);
            header.0[36] = 1;
            p.send_status(header, &[]);
        }),
    ];
    for (number, (opcode, misdeed)) in misdeeds.into_iter().enumerate() {
        let fixture = on_command(opcode, move |peer, header, count| {
            if count > 1 {
                return Act::Serve;
            }
            misdeed(peer, header.tag());
            Act::Answered
        });
        let disk = fixture.open();
        let mut out = [0; 512];
        disk.read_at(1024, &mut out).unwrap();
        assert!(out == fixture.disk.lock()[1024..1536], "after misdeed {number}");
        disk.write_at(2048, &[9; 512]).unwrap();
        assert!(fixture.disk.lock()[2048..2560] == [9; 512], "after misdeed {number}");
    }
}

/// A write of which only a part was taken must not pass for done.
#[test]
fn a_write_that_is_reported_done_too_early_is_done_again() {
    let fixture = on_command(0x2a, |peer, header, number| {
        if number > 1 {
            return Act::Serve;
        }
        peer.respond(header.tag(), 0, &[]);
        Act::Answered
    });
    let disk = fixture.open();
    disk.write_at(0, &[7; 100 * 512]).unwrap();
    assert!(fixture.disk.lock()[..100 * 512].iter().all(|byte| *byte == 7));
}

#[test]
fn a_write_that_is_reported_as_short_fails() {
    let fixture = on_command(0x2a, |peer, header, _| {
        let mut header = Header::new(response::RESPONSE, FINAL | 2).set_tag(header.tag()).set_word::<44>(512);
        header.0[3] = 0;
        peer.send_status(header, &[]);
        Act::Answered
    });
    let error = fixture.open().write_at(0, &[7; 1024]).unwrap_err().to_string();
    assert!(error.contains("has taken less"), "{error}");
}

#[test]
fn pings_are_answered_and_events_taken_note_of() {
    let answers = Arc::new(AtomicU32::new(0));
    let count = answers.clone();
    let fixture = fixture(
        Manners::default(),
        &[],
        Box::new(move |peer, header, data| {
            if header.opcode() == request::NOP_OUT {
                assert_eq!((header.tag(), header.word::<20>(), data), (NO_TAG, 0x1234, &b"echo"[..]));
                count.fetch_add(1, Ordering::SeqCst);
                return Act::Answered;
            }
            if header.opcode() == request::COMMAND && header.0[32] == 0x28 {
                peer.send(
                    Header::new(response::NOP_IN, FINAL).set_tag(NO_TAG).set_word::<20>(0x1234),
                    b"echo",
                );
                // One that wants no answer.
                peer.send(Header::new(response::NOP_IN, FINAL).set_tag(NO_TAG).set_word::<20>(NO_TAG), &[]);
                // An event of SCSI.
                peer.send_status(Header::new(response::ASYNC, FINAL).set_tag(NO_TAG), &[]);
            }
            Act::Serve
        }),
    );
    let disk = fixture.open();
    let mut out = [0; 512];
    for _ in 0..10 {
        disk.read_at(0, &mut out).unwrap();
    }
    drop(disk);
    assert_eq!(answers.load(Ordering::SeqCst), 10);
}

#[test]
fn commands_that_are_put_off_are_given_again_and_bad_ones_are_not() {
    let fixture = on_command(0x28, |peer, header, number| {
        match number {
            1 => peer.check(header.tag(), 6, 0x29),
            2 => peer.respond(header.tag(), 8, &[]),
            3 => peer.respond(header.tag(), 0x28, &[]),
            4 => peer.check(header.tag(), 11, 0),
            6 => peer.check(header.tag(), 3, 0x11),
            // Less than was asked for.
            7 => peer.data_in(header.tag(), &[1; 100]),
            8.. => peer.check(header.tag(), 6, 0x29),
            _ => return Act::Serve,
        }
        Act::Answered
    });
    let disk = fixture.open();
    let mut out = [0; 512];
    disk.read_at(0, &mut out).unwrap();
    let error = disk.read_at(0, &mut out).unwrap_err().to_string();
    assert!(error.contains("the medium is damaged") && error.contains("iqn.2026-11.test:disk"), "{error}");
    assert!(disk.read_at(0, &mut out).unwrap_err().to_string().contains("less than was asked for"));
    assert!(disk.read_at(0, &mut out).unwrap_err().to_string().contains("again and again"));
}

#[test]
fn a_silent_target_is_asked_and_then_left() {
    let fixture = on_command(0x28, |peer, _, number| {
        if number > 1 {
            return Act::Serve;
        }
        // The ping comes, and nothing is said to it.
        let (header, _) = peer.take().unwrap();
        assert_eq!(header.opcode(), request::NOP_OUT);
        let _ = peer.take();
        Act::Close
    });
    let disk = fixture.open();
    let start = Instant::now();
    let mut out = [0; 512];
    disk.read_at(512, &mut out).unwrap();
    assert!(out == fixture.disk.lock()[512..1024] && start.elapsed() >= Duration::from_millis(1900));
}

#[test]
fn commands_wait_while_the_window_is_shut() {
    let fixture = on_command(0x28, |peer, header, number| {
        if number == 1 {
            // Nothing is said of the window in what opens it.
            std::thread::sleep(Duration::from_millis(50));
            let mut bytes = Vec::new();
            let nop = Header::new(response::NOP_IN, FINAL).set_tag(NO_TAG).set_word::<20>(NO_TAG);
            put(&mut bytes, nop.set_word::<28>(0).set_word::<32>(0), &[]);
            peer.stream.write_all(&bytes).unwrap();
            peer.command(header, Vec::new()).unwrap();
            return Act::Answered;
        }
        Act::Serve
    });
    let disk = fixture.open();
    // Many commands at once.
    let mut out = vec![0; BLOCKS * BLOCK];
    disk.read_at(0, &mut out).unwrap();
    assert!(out == *fixture.disk.lock());
}

#[test]
fn chap_is_proved_in_both_directions() {
    let account = [
        ("InitiatorUsername", "me"),
        ("InitiatorSecret", "my own secret"),
        ("TargetUsername", "it"),
        ("TargetSecret", "the secret of it"),
    ];
    let target = |own: &'static str| -> Hook {
        Box::new(move |peer, header, data| {
            if header.opcode() != request::LOGIN || header.flags() & 0x0c != 0 {
                return Act::Serve;
            }
            let text = text::Text::parse(data).unwrap();
            if text.value("AuthMethod").is_some() {
                assert_eq!(text.value("AuthMethod"), Some("CHAP,None"));
                peer.login(0x00, 0, "AuthMethod=CHAP\0");
            } else if text.value("CHAP_A").is_some() {
                peer.login(0x00, 0, "CHAP_A=5\0CHAP_I=7\0CHAP_C=0x0102030405060708\0");
            } else {
                let right = text::chap_response(7, b"my own secret", &[1, 2, 3, 4, 5, 6, 7, 8]);
                let proved =
                    text.value("CHAP_R") == Some(&text::hex(&right)) && text.value("CHAP_N") == Some("me");
                if !proved {
                    peer.login(0x00, 0x0201, "");
                    return Act::Answered;
                }
                let id = text.value("CHAP_I").unwrap().parse().unwrap();
                let challenge = text::parse_binary(text.value("CHAP_C").unwrap()).unwrap();
                let answer = text::hex(&text::chap_response(id, own.as_bytes(), &challenge));
                peer.login(0x81, 0, &format!("CHAP_N=it\0CHAP_R={answer}\0"));
            }
            Act::Answered
        })
    };
    let good = fixture(Manners::default(), &account, target("the secret of it"));
    good.load(&good.open());
    let impostor = fixture(Manners::default(), &account, target("a guess"));
    assert!(refused(&impostor).contains("did not prove"));
    let mut wrong = account;
    wrong[1].1 = "not my secret";
    let wrong = fixture(Manners::default(), &wrong, target("the secret of it"));
    let text = refused(&wrong);
    assert!(text.contains("InitiatorSecret") && !text.contains("not my secret"), "{text}");
    // A target that has to prove itself and does not ask us to.
    assert!(
        refused(&fixture(
            Manners::default(),
            &account,
            Box::new(|peer, header, _| {
                if header.opcode() == request::LOGIN && header.flags() & 0x0c == 0 {
                    peer.login(0x00, 0, "AuthMethod=None\0");
                    return Act::Answered;
                }
                Act::Serve
            })
        ))
        .contains("did not prove")
    );
}

#[test]
fn logins_that_lead_nowhere_say_why() {
    let answer = |flags: u8, class: u16, text: &'static str| {
        let hook: Hook = Box::new(move |peer, header, _| {
            if header.opcode() == request::LOGIN {
                peer.login(flags, class, text);
                return Act::Answered;
            }
            Act::Serve
        });
        refused(&fixture(Manners::default(), &[("Timeout", "1000")], hook))
    };
    for (flags, class, text, why) in [
        (0x81, 0x0203, "", "check TargetName"),
        (0x81, 0x0202, "", "InitiatorName"),
        (0x81, 0x0301, "", "not in service"),
        (0x00, 0, "AuthMethod=CHAP\0", "set InitiatorUsername and InitiatorSecret"),
        (0x81, 0, "HeaderDigest=CRC32C\0", "HeaderDigest=CRC32C"),
        (0x81, 0, "MaxRecvDataSegmentLength=1\0", "MaxRecvDataSegmentLength"),
        (0x81, 0, "nonsense\0", "no list of keys"),
        (0x40, 0, "Endless=", "does not come to an end"),
        (0x00, 0, "", "does not come to an end"),
        (0x81, 0x0101, "", "does not say where"),
        (0x81, 0x0101, "TargetAddress=127.0.0.1:1\0", "cannot be reached"),
        (0x8b, 0, "", "leaves out a stage"),
    ] {
        let found = answer(flags, class, text);
        assert!(found.contains(why) && found.contains("iqn.2026-11.test:disk"), "{why}: {found}");
    }
}

#[test]
fn a_target_that_has_moved_is_followed() {
    let real = plain(Manners::default());
    let address = format!("TargetAddress={}:{},1\0", real.target.host, real.target.port);
    let guide = fixture(
        Manners::default(),
        &[],
        Box::new(move |peer, _, _| {
            peer.login(0x00, 0x0101, &address);
            Act::Answered
        }),
    );
    real.load(&Disk::open(&guide.target, true).unwrap());
}

#[test]
fn what_is_no_disk_is_refused() {
    let refusal = |opcode: u8, answer: fn(&mut Peer, u32)| {
        refused(&on_command(opcode, move |peer, header, _| {
            answer(peer, header.tag());
            Act::Answered
        }))
    };
    assert!(refusal(0x12, |p, tag| p.data_in(tag, &[0x7f; 36])).contains("no such LUN"));
    assert!(refusal(0x12, |p, tag| p.data_in(tag, &[5; 36])).contains("0x05"));
    assert!(refusal(0x9e, |p, tag| p.data_in(tag, &[0; 32])).contains("size cannot be used"));
    assert!(refusal(0x1a, |p, tag| p.data_in(tag, &[3, 0, 0x80, 0])).contains("write-protected"));
    assert!(refusal(0x00, |p, tag| p.check(tag, 2, 0x3a)).contains("not ready"));
    // Mode parameters are not needed.
    let fixture = on_command(0x1a, |peer, header, _| {
        peer.check(header.tag(), 5, 0x20);
        Act::Answered
    });
    fixture.load(&fixture.open());
}

#[test]
fn a_disk_without_a_cache_needs_no_flush() {
    let count = Arc::new(AtomicU32::new(0));
    let flushes = count.clone();
    let fixture = on_command(0x35, move |peer, header, number| {
        flushes.store(number, Ordering::SeqCst);
        peer.check(header.tag(), 5, 0x20);
        Act::Answered
    });
    let disk = fixture.open();
    disk.sync().unwrap();
    disk.sync().unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[test]
fn many_threads_use_one_disk() {
    let fixture = plain(Manners {
        agreed: "InitialR2T=No\0ImmediateData=Yes\0FirstBurstLength=1024\0",
        ..Manners::default()
    });
    let disk = fixture.open();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..20u64 {
                    let offset = (thread * 100 + round * 3) * 512 + 256 * (round % 2);
                    let data = vec![(thread * 20 + round) as u8; 1300];
                    disk.write_at(offset, &data).unwrap();
                    let mut out = vec![0; 1300];
                    disk.read_at(offset, &mut out).unwrap();
                    assert!(out == data);
                }
            });
        }
    });
}
