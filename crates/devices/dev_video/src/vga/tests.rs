use super::*;
use ssm::Saveable;

struct Bench {
    clock: Arc<Clock>,
    pgm: Arc<Pgm>,
    iom: Arc<Iom>,
    bus: Arc<PciBus>,
    vga: Arc<Mutex<Vga>>,
    screen: Arc<dyn DisplayPort>,
}

const PLACE: DevFn = DevFn::new(2, 0);

impl Bench {
    fn new() -> Self {
        let (clock, pgm, iom) = (Clock::manual(), Pgm::new(vec![]), Iom::new());
        let bus = PciBus::new(iom.clone(), pgm.clone());
        let vga = Vga::new(ByteSize(8 * MIB), clock.clone()).unwrap();
        Vga::register(&vga, &iom, &pgm, &bus, PLACE);
        let screen = Vga::display(&vga);
        Self { clock, pgm, iom, bus, vga, screen }
    }

    fn out(&self, port: u16, value: u8) {
        self.iom.write(Port(port), Width::Byte, value.into());
    }

    fn inb(&self, port: u16) -> u8 {
        self.iom.read(Port(port), Width::Byte) as u8
    }

    /// Writes indexed registers from index zero on.
    fn table(&self, port: u16, values: &[u8]) {
        for (index, &value) in values.iter().enumerate() {
            self.out(port, index as u8);
            self.out(port + 1, value);
        }
    }

    fn attributes(&self, values: &[u8]) {
        self.inb(0x3da);
        for (index, &value) in values.iter().enumerate() {
            self.out(0x3c0, index as u8);
            self.out(0x3c0, value);
        }
        self.out(0x3c0, 0x20);
    }

    fn dispi(&self, index: u16, value: u16) {
        self.iom.write(Port(0x1ce), Width::Word, index.into());
        self.iom.write(Port(0x1cf), Width::Word, value.into());
    }

    fn dispi_read(&self, index: u16) -> u16 {
        self.iom.write(Port(0x1ce), Width::Word, index.into());
        self.iom.read(Port(0x1cf), Width::Word) as u16
    }

    fn color(&self, index: u8, rgb: [u8; 3]) {
        self.out(0x3c8, index);
        rgb.iter().for_each(|&component| self.out(0x3c9, component));
    }

    /// A write by the CPU through the window: to registers or, where mapped, to memory.
    fn poke(&self, address: u64, bytes: &[u8]) {
        for (i, &byte) in bytes.iter().enumerate() {
            let address = GuestPhys(address + i as u64);
            match self.pgm.resolve(address).write {
                pgm::Target::Mmio { handler, offset } => {
                    handler.mmio_write(vbox_types::VcpuId(0), offset, &[byte]);
                }
                _ => self.pgm.write(address, &[byte]),
            }
        }
    }

    /// 80x25 text, 720x400, as the IBM BIOS sets mode 3.
    fn text_mode(&self) {
        self.out(0x3c2, 0x67);
        self.table(0x3c4, &[0x03, 0x00, 0x03, 0x00, 0x02]);
        self.out(0x3d4, 0x11);
        self.out(0x3d5, 0x00);
        self.table(
            0x3d4,
            &[
                0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00,
                0x00, 0x9c, 0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
            ],
        );
        self.table(0x3ce, &[0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x00, 0xff]);
        self.attributes(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x0c, 0, 0x0f, 0x08, 0]);
        for index in 0..16 {
            self.color(index, [index * 4, index, 63 - index]);
        }
    }

    /// Loads a glyph as the BIOS does, through plane 2.
    fn glyph(&self, character: u8, rows: &[u8]) {
        for (index, value) in [(2, 0x04), (4, 0x07)] {
            self.out(0x3c4, index);
            self.out(0x3c5, value);
        }
        for (index, value) in [(5, 0x00), (6, 0x04)] {
            self.out(0x3ce, index);
            self.out(0x3cf, value);
        }
        self.poke(0xa_0000 + u64::from(character) * 32, rows);
        for (index, value) in [(2, 0x03), (4, 0x03)] {
            self.out(0x3c4, index);
            self.out(0x3c5, value);
        }
        for (index, value) in [(5, 0x10), (6, 0x0e)] {
            self.out(0x3ce, index);
            self.out(0x3cf, value);
        }
    }

    /// Mode 13h.
    fn mode_13h(&self) {
        self.out(0x3c2, 0x63);
        self.table(0x3c4, &[0x03, 0x01, 0x0f, 0x00, 0x0e]);
        self.out(0x3d4, 0x11);
        self.out(0x3d5, 0x00);
        self.table(
            0x3d4,
            &[
                0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0x00, 0x41, 0x00, 0x00, 0x00, 0x00, 0x00,
                0x00, 0x9c, 0x8e, 0x8f, 0x28, 0x40, 0x96, 0xb9, 0xa3, 0xff,
            ],
        );
        self.table(0x3ce, &[0x00, 0x00, 0x00, 0x00, 0x00, 0x40, 0x05, 0x0f, 0xff]);
        self.attributes(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x41, 0, 0x0f, 0, 0]);
    }

    fn vbe(&self, x: u16, y: u16, bpp: u16) {
        self.dispi(4, 0);
        self.dispi(1, x);
        self.dispi(2, y);
        self.dispi(3, bpp);
        self.dispi(4, 0x41);
    }
}

fn pixel(frame: &Frame, x: u32, y: u32) -> [u8; 3] {
    let at = ((y * frame.width + x) * 4) as usize;
    [frame.pixels[at + 2], frame.pixels[at + 1], frame.pixels[at]]
}

/// A 6-bit component as 8 bits.
fn wide(component: u8) -> u8 {
    component << 2 | component >> 4
}

#[test]
fn a_text_screen_reads_back_and_shows_its_glyphs() {
    let b = Bench::new();
    b.text_mode();
    b.glyph(b'H', &[0x81]);
    b.glyph(0xc4, &[0xff]);
    b.poke(0xb_8000 + 2 * 81, &[b'H', 0x1e, b'i', 0x07, 0xc4, 0x0f]);
    let text = b.screen.text().unwrap();
    assert_eq!((text.len(), text[0].len()), (25, 80));
    assert_eq!(text[1][1..4], [b'H', b'i', 0xc4]);
    let frame = b.screen.frame();
    assert_eq!((frame.width, frame.height), (720, 400));
    let row: Vec<_> = (9..36).map(|x| pixel(&frame, x, 16)).collect();
    let color = |index: u8| [wide(index * 4), wide(index), wide(63 - index)];
    let mut expected = vec![color(1); 9];
    expected[0] = color(14);
    expected[7] = color(14);
    expected.extend([color(0); 9]);
    // A line-drawing character goes on in its ninth dot.
    expected.extend([color(15); 9]);
    assert_eq!(row, expected);
}

#[test]
fn the_cursor_blinks_over_its_cell() {
    let b = Bench::new();
    b.text_mode();
    b.poke(0xb_8000, &[b' ', 0x07]);
    let lit = |b: &Bench| pixel(&b.screen.frame(), 0, 13) != pixel(&b.screen.frame(), 0, 12);
    assert!(lit(&b));
    b.clock.advance(1_000_000_000 / 60 * 9);
    assert!(!lit(&b));
}

#[test]
fn the_start_address_and_line_compare_split_the_screen() {
    let b = Bench::new();
    b.text_mode();
    b.poke(0xb_8000, &[b'0', 7]);
    b.poke(0xb_8000 + 160, &[b'1', 7]);
    for (index, value) in [(0x0d, 80), (0x07, 0x0f), (0x09, 0x0f), (0x18, 15)] {
        b.out(0x3d4, index);
        b.out(0x3d5, value);
    }
    let text = b.screen.text().unwrap();
    assert_eq!([text[0][0], text[1][0], text[2][0]], [b'1', b'0', b'1']);
}

#[test]
fn mode_13h_is_direct_memory_and_shows_doubled_pixels() {
    let b = Bench::new();
    b.mode_13h();
    assert!(matches!(b.pgm.resolve(WINDOW).write, pgm::Target::Memory { .. }));
    b.color(200, [63, 32, 0]);
    b.poke(0xa_0000 + 320 * 100 + 17, &[200]);
    let frame = b.screen.frame();
    assert_eq!((frame.width, frame.height), (640, 400));
    let shown: Vec<_> = (0..400 * 640)
        .filter(|at| pixel(&frame, at % 640, at / 640) == [255, wide(32), 0])
        .map(|at| (at % 640, at / 640))
        .collect();
    assert_eq!(shown, [(34, 200), (35, 200), (34, 201), (35, 201)]);
    assert_eq!(b.screen.text(), None);
}

#[test]
fn mode_x_writes_one_plane_at_a_time() {
    let b = Bench::new();
    b.mode_13h();
    // Unchained, byte mode; plane 1.
    for (port, index, value) in [(0x3c4, 4, 0x06), (0x3d4, 0x14, 0x00), (0x3d4, 0x17, 0xe3), (0x3c4, 2, 0x02)]
    {
        b.out(port, index);
        b.out(port + 1, value);
    }
    assert!(matches!(b.pgm.resolve(WINDOW).write, pgm::Target::Mmio { .. }));
    b.color(9, [63, 63, 63]);
    b.poke(0xa_0000 + 80 + 2, &[9]);
    // Byte 2 of plane 1 in line 1 is pixel 9.
    assert_eq!(pixel(&b.screen.frame(), 18, 2), [255; 3]);
}

#[test]
fn planar_16_colors_use_the_attribute_palette() {
    let b = Bench::new();
    b.mode_13h();
    for (port, index, value) in
        [(0x3c4, 4, 0x06), (0x3ce, 5, 0x00), (0x3d4, 9, 0x40), (0x3d4, 0x17, 0xe3), (0x3c4, 2, 0x05)]
    {
        b.out(port, index);
        b.out(port + 1, value);
    }
    b.attributes(&[0, 1, 2, 3, 4, 0x3a, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x01, 0, 0x0f, 0, 0]);
    b.color(0x3a, [10, 20, 30]);
    b.poke(0xa_0000, &[0x40]);
    let frame = b.screen.frame();
    assert_eq!(pixel(&frame, 1, 0), [wide(10), wide(20), wide(30)]);
    assert_eq!(pixel(&frame, 0, 0), [0; 3]);
}

#[test]
fn cga_graphics_take_odd_lines_from_the_second_bank() {
    let b = Bench::new();
    b.out(0x3c2, 0x63);
    b.table(0x3c4, &[0x03, 0x09, 0x03, 0x00, 0x02]);
    b.table(
        0x3d4,
        &[
            0x2d, 0x27, 0x28, 0x90, 0x2b, 0x80, 0xbf, 0x1f, 0x00, 0xc1, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
            0x9c, 0x8e, 0x8f, 0x14, 0x00, 0x96, 0xb9, 0xa2, 0xff,
        ],
    );
    b.table(0x3ce, &[0x00, 0x00, 0x00, 0x00, 0x00, 0x30, 0x0f, 0x00, 0xff]);
    b.attributes(&[0, 0x13, 0x15, 0x17, 2, 4, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 0x01, 0, 0x03, 0, 0]);
    b.color(0x13, [1, 2, 3]);
    b.color(0x17, [4, 5, 6]);
    b.poke(0xb_8000, &[0x40]);
    b.poke(0xb_8000 + 0x2000 + 80 - 1, &[0x03]);
    let frame = b.screen.frame();
    assert_eq!((frame.width, frame.height), (640, 400));
    assert_eq!(pixel(&frame, 0, 0), [wide(1), wide(2), wide(3)]);
    assert_eq!(pixel(&frame, 639, 2), [wide(4), wide(5), wide(6)]);
    assert_eq!(pixel(&frame, 639, 0), [0; 3]);
}

#[test]
fn the_video_bios_finds_the_interface_and_sets_modes() {
    // What SeaBIOS's bochsvga.c does.
    let b = Bench::new();
    b.dispi(0, 0xb0c0);
    assert_eq!(b.dispi_read(0), 0xb0c0);
    b.dispi(0, 0xb0c5);
    assert_eq!(b.dispi_read(0), 0xb0c5);
    b.dispi(0, 0xbe01);
    assert_eq!(b.dispi_read(0), 0xb0c5, "VirtualBox's own interface is not there");
    assert_eq!(b.dispi_read(10), 128);
    b.dispi(4, 2);
    assert!(b.dispi_read(1) >= 2560 && b.dispi_read(2) >= 1600 && b.dispi_read(3) == 32);
    b.vbe(1024, 768, 32);
    assert_eq!([b.dispi_read(4), b.dispi_read(6), b.dispi_read(7)], [0x41, 1024, 2048]);
    b.dispi(8, 5000);
    b.dispi(9, 5000);
    assert_eq!([b.dispi_read(8), b.dispi_read(9)], [0, 2048 - 768]);
    b.vbe(8192, 8192, 32);
    assert_eq!(b.dispi_read(4) & 1, 0, "256 MB do not fit");
}

#[test]
fn the_linear_frame_buffer_is_what_the_screen_shows() {
    let b = Bench::new();
    b.bus.config_write(PLACE, 0x10, Width::Dword, 0xe000_0000);
    b.bus.config_write(PLACE, 4, Width::Word, 2);
    assert_eq!(b.bus.config_read(PLACE, 8, Width::Dword), 0x0300_0000);
    for (bpp, bytes, expected) in [
        (32, &[1u8, 2, 3, 0][..], [3, 2, 1]),
        (24, &[1, 2, 3], [3, 2, 1]),
        (16, &[0x00, 0xf8], [255, 0, 0]),
        (15, &[0xe0, 0x03], [0, 255, 0]),
    ] {
        b.vbe(640, 480, bpp);
        b.dispi(9, 10);
        b.poke(0xe000_0000 + ((480 + 9) * 640 + 639) * bytes.len() as u64, bytes);
        let frame = b.screen.frame();
        assert_eq!((frame.width, frame.height), (640, 480));
        assert_eq!(pixel(&frame, 639, 479), expected, "{bpp} bits");
        assert_eq!(pixel(&frame, 638, 479), [0; 3]);
    }
}

#[test]
fn the_eight_bit_dac_takes_full_bytes() {
    let b = Bench::new();
    b.vbe(640, 480, 8);
    b.color(7, [63, 63, 63]);
    b.dispi(4, 0x61 | 0x80);
    b.out(0x3c7, 7);
    assert_eq!(b.inb(0x3c9), 252);
    b.color(7, [200, 100, 50]);
    b.poke(0xa_0000, &[7]);
    assert_eq!(pixel(&b.screen.frame(), 0, 0), [200, 100, 50]);
}

#[test]
fn retrace_comes_and_goes_about_seventy_times_a_second() {
    let b = Bench::new();
    b.text_mode();
    let (mut edges, mut before) = (0, false);
    for _ in 0..100_000 {
        b.clock.advance(10_000);
        let status = b.inb(0x3da);
        let now = status & 8 != 0;
        assert!(!now || status & 1 != 0, "retrace is outside the display");
        edges += u32::from(now && !before);
        before = now;
    }
    assert!((69..=71).contains(&edges), "{edges}");
}

#[test]
fn reading_status_resets_the_attribute_flip_flop_and_the_palette_is_protected() {
    let b = Bench::new();
    b.text_mode();
    b.inb(0x3da);
    b.out(0x3c0, 0x21);
    b.out(0x3c0, 0x3f);
    assert_eq!(b.inb(0x3c1), 1, "the palette belongs to the screen");
    b.inb(0x3da);
    b.out(0x3c0, 0x01);
    b.out(0x3c0, 0x3f);
    assert_eq!(b.inb(0x3c1), 0x3f);
    assert_eq!(b.inb(0x3ba), 0xff, "the monochrome addresses are not decoded");
}

#[test]
fn locked_crtc_registers_keep_their_values() {
    let b = Bench::new();
    b.text_mode();
    for (index, value) in [(0x11, 0x8e), (0x00, 0x12), (0x07, 0x00), (0x0e, 0x12)] {
        b.out(0x3d4, index);
        b.out(0x3d5, value);
    }
    let read = |index: u8| {
        b.out(0x3d4, index);
        b.inb(0x3d5)
    };
    assert_eq!([read(0x00), read(0x07), read(0x0e)], [0x5f, 0x0f, 0x12]);
}

#[test]
fn a_blanked_screen_is_black_in_its_size() {
    let b = Bench::new();
    b.text_mode();
    b.glyph(b'H', &[0xff; 16]);
    b.poke(0xb_8000, &[b'H', 0x0f]);
    b.out(0x3c4, 1);
    b.out(0x3c5, 0x20);
    let frame = b.screen.frame();
    assert_eq!((frame.width, frame.height), (720, 400));
    assert!(frame.pixels.iter().all(|&byte| byte == 0));
}

#[test]
fn video_memory_sizes_are_powers_of_two() {
    let size = |mb: u64| vram_size(ByteSize(mb * MIB)).0 / MIB;
    assert_eq!([size(0), size(9), size(16), size(100), size(1000)], [8, 16, 16, 128, 256]);
}

#[test]
fn the_saved_state_comes_back_byte_for_byte() {
    let save = |b: &Bench| {
        let mut out = ssm::Writer::new();
        b.vga.lock().save(&mut out);
        out.into_bytes()
    };
    let one = Bench::new();
    one.text_mode();
    one.poke(0xb_8000, b"saved");
    one.vbe(800, 600, 16);
    one.dispi(5, 3);
    one.poke(0xa_0000, &[1, 2, 3]);
    let bytes = save(&one);
    let other = Bench::new();
    other.vga.lock().vram().write(5 * MIB, &[9]);
    let before = save(&other);
    let short = ssm::Reader::new("vga", 1, &bytes[..bytes.len() - 1]);
    assert!(other.vga.lock().load(short).is_err());
    assert_eq!(save(&other), before);
    other.vga.lock().load(ssm::Reader::new("vga", 1, &bytes)).unwrap();
    assert_eq!(save(&other), bytes);
    assert_eq!(other.screen.frame(), one.screen.frame());
}
