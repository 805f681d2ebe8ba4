//! Disks of a real target: Debian's `tgtd`, in the foreground, on loopback, with files as disks.

mod common;

use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Dir, MIB, Random};
use vd::{Format, Image, OpenMode, Source, Target};

const NAME: &str = "iqn.2026-11.boxwood.test:disk";
const TGTD: &str = "/usr/sbin/tgtd";

/// A target with one LUN, number 1.
struct Tgt {
    dir: Dir,
    port: u16,
    block: u32,
    account: Option<(&'static str, &'static str)>,
    process: Option<Child>,
}

impl Tgt {
    /// With a disk of `size` bytes; `None`, loudly, where tgtd is not installed.
    fn start(size: u64, block: u32, account: Option<(&'static str, &'static str)>) -> Option<Self> {
        if !Path::new(TGTD).exists() {
            eprintln!("SKIPPED: {TGTD} is not there; install the package tgt");
            return None;
        }
        let dir = Dir::new();
        std::fs::File::create(dir.file("disk")).unwrap().set_len(size).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut tgt = Self { dir, port, block, account, process: None };
        tgt.run();
        Some(tgt)
    }

    fn file(&self) -> PathBuf {
        self.dir.file("disk")
    }

    fn socket(&self) -> PathBuf {
        self.dir.file("socket")
    }

    fn adm(&self, words: &str) -> bool {
        let mut command = Command::new("/usr/sbin/tgtadm");
        command.env("TGT_IPC_SOCKET", self.socket()).args(["-C", "1", "--lld", "iscsi"]);
        command.args(words.split(' ')).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    }

    fn run(&mut self) {
        let mut command = Command::new(TGTD);
        command.env("TGT_IPC_SOCKET", self.socket()).args(["-f", "-C", "1", "--iscsi"]);
        command.arg(format!("portal=127.0.0.1:{}", self.port));
        self.process = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let end = Instant::now() + Duration::from_secs(20);
        while !self.adm(&format!("--op new --mode target --tid 1 -T {NAME}")) {
            assert!(Instant::now() < end, "tgtd does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let disk = self.file().display().to_string();
        let lun = "--op new --mode logicalunit --tid 1 --lun 1";
        assert!(self.adm(&format!("{lun} --blocksize {} -b {disk}", self.block)));
        assert!(self.adm("--op update --mode logicalunit --tid 1 --lun 1 --params thin_provisioning=1"));
        if let Some((name, secret)) = self.account {
            assert!(self.adm(&format!("--op new --mode account --user {name} --password {secret}")));
            assert!(self.adm(&format!("--op bind --mode account --tid 1 --user {name}")));
        }
        assert!(self.adm("--op bind --mode target --tid 1 -I ALL"));
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn source(&self, properties: &[(&str, &str)]) -> Source {
        let address = format!("127.0.0.1:{}", self.port);
        let given = |name: &str| properties.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
        let target = Target::new(|name| match name {
            "TargetAddress" => Some(address.as_str()),
            "TargetName" => Some(NAME),
            "LUN" => Some(given("LUN").unwrap_or("1")),
            name => given(name),
        });
        Source { path: "127.0.0.1|disk".into(), format: Format::Iscsi, target: Some(target.unwrap()) }
    }

    fn open(&self) -> Image {
        Image::open_source(&self.source(&[]), OpenMode::ReadWrite, None).unwrap()
    }

    fn refusal(&self, properties: &[(&str, &str)]) -> String {
        let refused = Image::open_source(&self.source(properties), OpenMode::ReadWrite, None);
        format!("{:#}", anyhow::Error::new(refused.err().unwrap()))
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the file behind the disk has.
fn behind(file: &std::fs::File, offset: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    file.read_exact_at(&mut out, offset).unwrap();
    out
}

#[test]
fn random_writes_are_in_the_file_behind_the_disk() {
    for block in [512, 4096] {
        let Some(tgt) = Tgt::start(64 * MIB, block, None) else { return };
        let file = std::fs::File::open(tgt.file()).unwrap();
        let image = tgt.open();
        assert_eq!(image.size().0, 64 * MIB);
        let info = tgt.source(&[]).info().unwrap();
        assert_eq!((info.logical_size.0, info.size_on_disk.0, info.uuid), (64 * MIB, 64 * MIB, None));
        let mut random = Random(u64::from(block));
        let mut model = vec![0u8; 64 << 20];
        for round in 0..400 {
            let sectors = if round % 20 == 0 { 4096 } else { 1 + random.below(64) };
            let offset = random.below(64 * MIB / 512 - sectors) * 512;
            let range = offset as usize..(offset + sectors * 512) as usize;
            let data: Vec<u8> = (0..range.len()).map(|i| (i as u64 / 512 + round) as u8 | 1).collect();
            image.write(offset, &data).unwrap();
            model[range].copy_from_slice(&data);
            let at = random.below(64 * MIB - 20_000);
            let mut out = vec![0xee; 1 + random.below(19_999) as usize];
            image.read(at, &mut out).unwrap();
            assert!(out == model[at as usize..at as usize + out.len()], "round {round}");
        }
        image.flush().unwrap();
        assert!(behind(&file, 0, 64 << 20) == model);
        // What is given back reads as zeros; all of it here, for it is whole blocks.
        image.discard(MIB, 4 * MIB).unwrap();
        let mut out = vec![1; 4 << 20];
        image.read(MIB, &mut out).unwrap();
        assert!(out == vec![0; 4 << 20] && behind(&file, MIB, 4 << 20) == out);
        assert!(behind(&file, 5 * MIB, 512) == model[5 << 20..(5 << 20) + 512]);
    }
}

#[test]
fn disks_beyond_two_tebibytes_are_reached_to_their_end() {
    let size = 3 << 40;
    let Some(tgt) = Tgt::start(size, 512, None) else { return };
    let image = tgt.open();
    assert_eq!(image.size().0, size);
    let file = std::fs::File::open(tgt.file()).unwrap();
    for offset in [(1 << 41) - 1024, size - 4096] {
        image.write(offset, &[0x77; 4096]).unwrap();
        let mut out = [0; 4096];
        image.read(offset, &mut out).unwrap();
        assert!(out == [0x77; 4096] && behind(&file, offset, 4096) == out);
    }
}

#[test]
fn the_secret_decides_who_gets_in() {
    let Some(tgt) = Tgt::start(MIB, 512, Some(("guest", "open-sesame-1"))) else { return };
    let account = [("InitiatorUsername", "guest"), ("InitiatorSecret", "open-sesame-1")];
    let image = Image::open_source(&tgt.source(&account), OpenMode::ReadWrite, None).unwrap();
    image.write(0, &[5; 512]).unwrap();
    let text = tgt.refusal(&[("InitiatorUsername", "guest"), ("InitiatorSecret", "open-sesame-2")]);
    assert!(
        text.contains("check InitiatorUsername and InitiatorSecret") && !text.contains("sesame"),
        "{text}"
    );
    let text = tgt.refusal(&[("InitiatorUsername", "nobody"), ("InitiatorSecret", "open-sesame-1")]);
    assert!(text.contains("InitiatorUsername"), "{text}");
    let text = tgt.refusal(&[]);
    assert!(text.contains(NAME), "{text}");
}

#[test]
fn what_is_wrong_with_a_target_is_said() {
    let Some(mut tgt) = Tgt::start(MIB, 512, None) else { return };
    // The first LUN of tgtd is its controller.
    assert!(tgt.refusal(&[("LUN", "0")]).contains("not a disk"));
    assert!(tgt.refusal(&[("LUN", "5")]).contains("no such LUN"));
    let other = tgt.source(&[]).target.unwrap();
    assert!(!format!("{other:?}").is_empty());
    tgt.kill();
    let text = tgt.refusal(&[]);
    assert!(
        text.contains("cannot be reached") && text.contains(NAME) && text.contains("'127.0.0.1|disk'"),
        "{text}"
    );
}

/// Threads write and flush while the target is killed and started again; nothing that was written is missing, and nobody is told of it.
#[test]
fn a_target_that_is_killed_and_comes_back_loses_no_write() {
    const THREADS: u64 = 4;
    let Some(mut tgt) = Tgt::start(16 * MIB, 512, None) else { return };
    let image = tgt.open();
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let models = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (image, stop, written) = (&image, &stop, &written);
                scope.spawn(move || {
                    let mut random = Random(thread + 1);
                    let (start, len) = (thread * 4 * MIB, 4 * MIB);
                    let mut model = vec![0u8; len as usize];
                    let mut round = 0u64;
                    while !stop.load(Ordering::SeqCst) {
                        let sectors = 1 + random.below(1000);
                        let at = random.below(len / 512 - sectors) * 512;
                        let data: Vec<u8> = (0..sectors * 512).map(|i| (i / 512 + round * 7) as u8).collect();
                        image.write(start + at, &data).unwrap();
                        model[at as usize..at as usize + data.len()].copy_from_slice(&data);
                        round += 1;
                        written.fetch_add(1, Ordering::SeqCst);
                        if round.is_multiple_of(16) {
                            image.flush().unwrap();
                        }
                    }
                    model
                })
            })
            .collect();
        let more = |count: u64| {
            let goal = written.load(Ordering::SeqCst) + count;
            let end = Instant::now() + Duration::from_secs(60);
            while written.load(Ordering::SeqCst) < goal {
                assert!(Instant::now() < end, "writing does not go on");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        for pause in [0, 700, 50] {
            more(60);
            tgt.kill();
            std::thread::sleep(Duration::from_millis(pause));
            tgt.run();
        }
        more(60);
        stop.store(true, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    image.flush().unwrap();
    let file = std::fs::File::open(tgt.file()).unwrap();
    for (thread, model) in models.iter().enumerate() {
        let start = thread as u64 * 4 * MIB;
        let mut out = vec![0; model.len()];
        image.read(start, &mut out).unwrap();
        assert!(out == *model && behind(&file, start, out.len()) == out, "thread {thread}");
    }
}
