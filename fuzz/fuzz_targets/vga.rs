//! The VGA: whatever a guest does to its registers and memory, no panic, and the screen can be drawn; every state saves and
//! loads to itself.
#![no_main]

mod driver;

use dev_video::vga::Vga;
use driver::{Bench, Bytes};
use libfuzzer_sys::fuzz_target;
use pdm::Width;
use pdm::pci::{DevFn, PciBus};
use vbox_types::ByteSize;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = Bytes::new(bytes);
    let mut bench = Bench::new();
    let bus = PciBus::new(bench.iom.clone(), bench.pgm.clone());
    let vga = Vga::new(ByteSize(8 << 20), bench.clock.clone()).unwrap();
    let at = DevFn::new(2, 0);
    Vga::register(&vga, &bench.iom, &bench.pgm, &bus, at);
    bus.config_write(at, 0x10, Width::Dword, 0xe000_0000);
    bus.config_write(at, 4, Width::Word, 2);
    let screen = Vga::display(&vga);
    bench.devices = vec![vga];
    // The ports that matter most come twice.
    bench.ports = vec![
        (0x3b4, 2),
        (0x3ba, 1),
        (0x3c0, 16),
        (0x3d4, 2),
        (0x3da, 1),
        (0x1ce, 3),
        (0x1ce, 2),
        (0x3c0, 1),
        (0x3c4, 2),
        (0x3ce, 2),
        (0x3d4, 2),
    ];
    bench.memory =
        vec![(0xa_0000, 0x2_0000), (0xa_0000, 0x1_0000), (0xb_8000, 0x1000), (0xe000_0000, 8 << 20)];
    // Pictures and states of 8 MB take long: a few for each input.
    let mut pictures = 0;
    let mut special = |_: u8, _: &mut Bytes<'_>| {
        pictures += 1;
        if pictures <= 3 {
            let frame = screen.frame();
            assert_eq!(frame.pixels.len(), frame.width as usize * frame.height as usize * 4);
            if let Some(text) = screen.text() {
                assert!(text.iter().all(|row| row.len() == text[0].len()));
            }
        }
    };
    while !bytes.is_empty() {
        bench.step(&mut bytes, &mut special);
    }
    special(0, &mut bytes);
});
