//! The card's two serial buses: the EEPROM behind EECD (Microwire, a 93C46), and the PHY's management interface, where drivers of
//! the 82543GC move its bits themselves.

/// Words of the EEPROM.
pub(super) const EEPROM_WORDS: usize = 64;

/// Bits of EECD.
pub(super) mod eecd {
    pub(crate) const SK: u32 = 1 << 0;
    pub(crate) const CS: u32 = 1 << 1;
    pub(crate) const DI: u32 = 1 << 2;
    pub(crate) const DO: u32 = 1 << 3;
    pub(crate) const REQ: u32 = 1 << 6;
    pub(crate) const GNT: u32 = 1 << 7;
    pub(crate) const PRES: u32 = 1 << 8;
}

/// What the EEPROM holds: MAC address, identity, defaults, and the checksum that drivers want (section 5.6 of the manual).
pub(super) fn eeprom(
    mac: [u8; 6],
    device: u16,
    subsystem_vendor: u16,
    subsystem: u16,
) -> [u16; EEPROM_WORDS] {
    let mut words = [0; EEPROM_WORDS];
    for (word, pair) in words.iter_mut().zip(mac.chunks_exact(2)) {
        *word = u16::from_le_bytes([pair[0], pair[1]]);
    }
    words[0x04] = 0xffff;
    // Amplitude of the serial interface: none.
    words[0x06] = 0xffff;
    // Initialization control: signature, load the identity below.
    words[0x0a] = 0x4408;
    words[0x0b] = subsystem;
    words[0x0c] = subsystem_vendor;
    words[0x0d] = device;
    words[0x0e] = 0x8086;
    // Flow control both ways.
    words[0x0f] = 0x3040;
    let total = words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
    words[EEPROM_WORDS - 1] = 0xbabau16.wrapping_sub(total);
    words
}

/// The EEPROM's side of the Microwire bus. Writing and erasing are taken as with the write protection on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Microwire {
    /// Bits since the start bit, up to 9.
    pub(super) count: u8,
    pub(super) command: u16,
    /// Bit of the memory that DO shows, while reading.
    pub(super) position: Option<u16>,
}

impl Microwire {
    /// EECD changed from `before` to `now`.
    pub(super) fn step(&mut self, before: u32, now: u32) {
        if now & eecd::CS == 0 {
            *self = Self::default();
            return;
        }
        let (rise, fall) = (now & !before & eecd::SK != 0, before & !now & eecd::SK != 0);
        let bit = u16::from(now & eecd::DI != 0);
        if rise && self.count < 9 && (self.count > 0 || bit == 1) {
            self.command = self.command << 1 | bit;
            self.count += 1;
        } else if fall && self.count == 9 && self.command >> 6 == 0b110 {
            let last = (EEPROM_WORDS * 16 - 1) as u16;
            self.position = Some(match self.position {
                None => (self.command & 0x3f) << 4,
                Some(at) => (at + 1) & last,
            });
        }
    }

    /// The level of DO: ready, unless data comes.
    pub(super) fn output(&self, words: &[u16; EEPROM_WORDS]) -> bool {
        self.position.is_none_or(|at| words[usize::from(at >> 4) % EEPROM_WORDS] << (at & 15) & 0x8000 != 0)
    }
}

/// A management frame (IEEE 802.3 clause 22) as far as it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Management {
    pub(super) count: u8,
    pub(super) bits: u32,
    pub(super) data: u16,
    pub(super) level: bool,
}

/// What a clock of the management interface asks for.
pub(super) enum Asked {
    Nothing,
    /// Give [`Management::data`] the register's content.
    Read(u8),
    Write(u8, u16),
}

impl Management {
    /// The clock rises with `bit` on the line.
    pub(super) fn clock(&mut self, bit: bool) -> Asked {
        if self.count == 0 {
            // The preamble is ones, the start of a frame is a zero.
            if !bit {
                *self = Self { count: 1, level: true, ..Self::default() };
            }
            return Asked::Nothing;
        }
        self.bits = self.bits << 1 | u32::from(bit);
        self.count += 1;
        let header = if self.count <= 14 { self.bits } else { self.bits >> (self.count - 14) };
        let (start, op, phy, register) =
            (header >> 12 & 3, header >> 10 & 3, header >> 5 & 0x1f, header as u8 & 0x1f);
        let mut asked = Asked::Nothing;
        match (self.count, op) {
            (14, _) if start != 1 || phy != 1 => self.count = 0,
            (14, 0b10) => asked = Asked::Read(register),
            (14, 0b01) => {}
            (14, _) => self.count = 0,
            (16..=31, 0b10) => {
                self.level = self.data >> (31 - self.count) & 1 != 0;
                if self.count == 31 {
                    self.count = 0;
                }
            }
            (32, _) => {
                asked = Asked::Write(register, self.bits as u16);
                self.count = 0;
            }
            _ => {}
        }
        asked
    }
}
