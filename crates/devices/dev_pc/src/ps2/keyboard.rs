//! A PS/2 keyboard (IBM MF2, 102 keys) with scan code sets 1, 2 and 3.
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard (101- and 102-Key)"; the set 2 to set 1 table is
//! the one in every 8042's ROM.
//!
//! Clients give set 1, which is turned into the set the guest has chosen. Left out: the per-key modes of set 3 (its commands
//! are acknowledged; every key makes and breaks) and typematic repeat, which is the client's: a held key arrives as
//! repeated make codes.

use std::collections::VecDeque;

use super::{load_command, load_queue, save_command, save_queue};

/// Bytes of scan codes that wait for the guest.
const SCAN_LIMIT: usize = 256;
/// Bytes of answers that wait for the guest.
const ANSWER_LIMIT: usize = 16;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// Set 2 to set 1, as the 8042 translates each byte below 0x80; see [`translate`] for the rest.
const SET2_TO_SET1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54, //
];

/// What the controller makes of a byte from the keyboard when it translates, break prefixes apart.
pub fn translate(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        byte => SET2_TO_SET1.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}

/// Set 1 make code (below 0x80) to set 2; zero where there is none.
const SET1_TO_SET2: [u8; 128] = {
    let mut table = [0; 128];
    let mut code = 1;
    while code < 128 {
        if SET2_TO_SET1[code] < 128 {
            table[SET2_TO_SET1[code] as usize] = code as u8;
        }
        code += 1;
    }
    // F7 and Alt+SysRq really have these.
    table[0x41] = 0x83;
    table[0x54] = 0x84;
    table
};

/// Set 1 make code and whether 0xe0 came before it, to set 3.
fn set3(code: u8, extended: bool) -> Option<u8> {
    let special = if extended {
        match code {
            0x1c => 0x79,
            0x1d => 0x58,
            0x35 => 0x77,
            0x37 => 0x57,
            0x38 => 0x39,
            0x47 => 0x6e,
            0x48 => 0x63,
            0x49 => 0x6f,
            0x4b => 0x61,
            0x4d => 0x6a,
            0x4f => 0x65,
            0x50 => 0x60,
            0x51 => 0x6d,
            0x52 => 0x67,
            0x53 => 0x64,
            0x5b => 0x8b,
            0x5c => 0x8c,
            0x5d => 0x8d,
            _ => return None,
        }
    } else {
        match code {
            0x01 => 0x08,
            0x3b..=0x44 => 0x07 + 8 * (code - 0x3b),
            0x57 => 0x56,
            0x58 => 0x5e,
            0x46 => 0x5f,
            0x1d => 0x11,
            0x3a => 0x14,
            0x38 => 0x19,
            0x2b => 0x5c,
            0x56 => 0x13,
            0x45 => 0x76,
            0x37 => 0x7e,
            0x4a => 0x84,
            0x4e => 0x7c,
            code => *SET1_TO_SET2.get(usize::from(code)).filter(|&&code| code != 0)?,
        }
    };
    Some(special)
}

/// What came before the next byte from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prefix {
    None,
    E0,
    /// In a Pause sequence, with so many bytes to go.
    E1(u8),
}

/// Guest-visible state of the keyboard.
#[derive(Clone, Debug)]
pub struct Keyboard {
    scanning: bool,
    set: u8,
    /// Bits 0–2: scroll, num, caps.
    leds: u8,
    typematic: u8,
    /// A command that awaits its argument.
    command: Option<u8>,
    answers: VecDeque<u8>,
    scans: VecDeque<u8>,
    /// The last byte sent, for the resend command.
    last: u8,
    prefix: Prefix,
}

impl Keyboard {
    pub fn power_on() -> Self {
        Self {
            scanning: true,
            set: 2,
            leds: 0,
            typematic: 0x2b,
            command: None,
            answers: VecDeque::new(),
            scans: VecDeque::new(),
            last: 0,
            prefix: Prefix::None,
        }
    }

    /// Lock-key lights: num, caps, scroll.
    pub fn leds(&self) -> (bool, bool, bool) {
        (self.leds & 2 != 0, self.leds & 4 != 0, self.leds & 1 != 0)
    }

    /// The next byte for the controller.
    pub fn pop(&mut self) -> Option<u8> {
        // A keyboard sends no key while it waits for an argument.
        let byte = match self.answers.pop_front() {
            None if self.command.is_none() => self.scans.pop_front(),
            answer => answer,
        }?;
        self.last = byte;
        Some(byte)
    }

    fn answer(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.answers.len() < ANSWER_LIMIT {
                self.answers.push_back(byte);
            }
        }
    }

    fn defaults(&mut self) {
        self.typematic = 0x2b;
        self.set = 2;
        self.scans.clear();
        self.prefix = Prefix::None;
    }

    /// A byte from the controller.
    pub fn command(&mut self, byte: u8) {
        if let Some(command) = self.command.take() {
            if byte < 0x80 || matches!(command, 0xfb..=0xfd) {
                return self.argument(command, byte);
            }
            // Anything else is a new command instead of the argument.
        }
        match byte {
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.command = Some(byte);
                self.answer(&[ACK]);
            }
            0xee => self.answer(&[0xee]),
            0xf2 => self.answer(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.scans.clear();
                self.scanning = true;
                self.answer(&[ACK]);
            }
            0xf5 => {
                self.defaults();
                self.scanning = false;
                self.answer(&[ACK]);
            }
            0xf6 => {
                self.defaults();
                self.answer(&[ACK]);
            }
            0xf7..=0xfa => self.answer(&[ACK]),
            0xfe => self.answer(&[self.last]),
            0xff => {
                self.defaults();
                self.leds = 0;
                self.scanning = true;
                self.answers.clear();
                self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn argument(&mut self, command: u8, byte: u8) {
        match command {
            0xed => self.leds = byte & 7,
            0xf3 => self.typematic = byte & 0x7f,
            0xf0 => match byte {
                0 => return self.answer(&[ACK, self.set]),
                1..=3 => {
                    self.set = byte;
                    self.scans.clear();
                }
                _ => return self.answer(&[RESEND]),
            },
            _ => {}
        }
        self.answer(&[ACK]);
    }

    /// Takes set 1 codes from a client; returns how many were taken.
    pub fn put(&mut self, codes: &[u8]) -> usize {
        for (taken, &code) in codes.iter().enumerate() {
            // One byte becomes at most three.
            if self.scans.len() + 3 > SCAN_LIMIT {
                return taken;
            }
            if self.scanning {
                self.put_one(code);
            }
        }
        codes.len()
    }

    fn put_one(&mut self, code: u8) {
        let prefix = self.prefix;
        self.prefix = match (code, prefix) {
            (0xe0, _) => Prefix::E0,
            (0xe1, _) => Prefix::E1(2),
            (_, Prefix::E1(2)) => Prefix::E1(1),
            _ => Prefix::None,
        };
        let (make, is_break) = (code & 0x7f, code & 0x80 != 0);
        match self.set {
            1 => self.scans.push_back(code),
            2 => match code {
                0xe0 | 0xe1 => self.scans.push_back(code),
                _ => {
                    let byte = SET1_TO_SET2[usize::from(make)];
                    if byte != 0 {
                        if is_break {
                            self.scans.push_back(0xf0);
                        }
                        self.scans.push_back(byte);
                    }
                }
            },
            _ => {
                let byte = match (code, prefix) {
                    (0xe0 | 0xe1, _) | (_, Prefix::E1(2)) => None,
                    // The second half of a Pause sequence breaks the key.
                    (_, Prefix::E1(_)) => Some(0x62),
                    // Shifts that set 1 sends around Print Screen and the grey keys.
                    (_, Prefix::E0) => set3(make, true),
                    (_, Prefix::None) => set3(make, false),
                };
                if let Some(byte) = byte {
                    if is_break {
                        self.scans.push_back(0xf0);
                    }
                    self.scans.push_back(byte);
                }
            }
        }
    }

    pub(crate) fn save(&self, out: &mut ssm::Writer) {
        let Self { scanning, set, leds, typematic, command, answers, scans, last, prefix } = self;
        out.put_bool(*scanning);
        let prefix = match prefix {
            Prefix::None => 0,
            Prefix::E0 => 0xe0,
            Prefix::E1(left) => *left,
        };
        out.put_bytes(&[*set, *leds, *typematic, *last, prefix]);
        save_command(*command, out);
        save_queue(answers, out);
        save_queue(scans, out);
    }

    pub(crate) fn load(input: &mut ssm::Reader<'_>) -> Result<Self, ssm::Error> {
        let scanning = input.take_bool()?;
        let [set, leds, typematic, last, prefix] =
            [input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?];
        if !(1..=3).contains(&set) || leds > 7 {
            return Err(input.invalid(format!("scan code set {set}, lights {leds:#x}")));
        }
        let prefix = match prefix {
            0 => Prefix::None,
            0xe0 => Prefix::E0,
            1 | 2 => Prefix::E1(prefix),
            other => return Err(input.invalid(format!("scan code prefix {other:#x}"))),
        };
        Ok(Self {
            scanning,
            set,
            leds,
            typematic,
            last,
            prefix,
            command: load_command(input)?,
            answers: load_queue(input, ANSWER_LIMIT)?,
            scans: load_queue(input, SCAN_LIMIT)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| keyboard.pop()).collect()
    }

    fn send(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|&byte| keyboard.command(byte));
        drain(keyboard)
    }

    #[test]
    fn every_set_1_make_code_survives_the_way_through_set_2_and_back() {
        for code in 1..0x80u8 {
            let back = translate(SET1_TO_SET2[usize::from(code)]);
            assert_eq!(back, code, "code {code:#x}");
        }
    }

    #[test]
    fn keys_come_in_the_chosen_set() {
        // A pressed and released, right Ctrl pressed and released.
        let keys = [0x1e, 0x9e, 0xe0, 0x1d, 0xe0, 0x9d];
        for (set, expected) in [
            (1, &keys[..]),
            (2, &[0x1c, 0xf0, 0x1c, 0xe0, 0x14, 0xe0, 0xf0, 0x14]),
            (3, &[0x1c, 0xf0, 0x1c, 0x58, 0xf0, 0x58]),
        ] {
            let mut k = Keyboard::power_on();
            assert_eq!(send(&mut k, &[0xf0, set]), [0xfa, 0xfa]);
            assert_eq!(k.put(&keys), keys.len());
            assert_eq!(drain(&mut k), expected, "set {set}");
        }
    }

    #[test]
    fn pause_has_its_long_sequence_in_set_2_and_one_code_in_set_3() {
        let pause = [0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5];
        let mut k = Keyboard::power_on();
        k.put(&pause);
        assert_eq!(drain(&mut k), [0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]);
        send(&mut k, &[0xf0, 3]);
        k.put(&pause);
        assert_eq!(drain(&mut k), [0x62, 0xf0, 0x62]);
    }

    #[test]
    fn commands_are_acknowledged_and_answered() {
        let mut k = Keyboard::power_on();
        assert_eq!(send(&mut k, &[0xff]), [0xfa, 0xaa]);
        assert_eq!(send(&mut k, &[0xee]), [0xee]);
        assert_eq!(send(&mut k, &[0xf2]), [0xfa, 0xab, 0x83]);
        assert_eq!(send(&mut k, &[0xfe]), [0x83]);
        assert_eq!(send(&mut k, &[0xf0, 0]), [0xfa, 0xfa, 2]);
        assert_eq!(send(&mut k, &[0xed, 0x05]), [0xfa, 0xfa]);
        assert_eq!(k.leds(), (false, true, true));
        assert_eq!(send(&mut k, &[0x12]), [0xfe]);
    }

    #[test]
    fn a_disabled_keyboard_swallows_keys() {
        let mut k = Keyboard::power_on();
        send(&mut k, &[0xf5]);
        assert_eq!(k.put(&[0x1e, 0x9e]), 2);
        assert_eq!(send(&mut k, &[0xf4]), [0xfa]);
        k.put(&[0x1e]);
        assert_eq!(drain(&mut k), [0x1c]);
    }

    #[test]
    fn a_full_queue_tells_how_much_it_took() {
        let mut k = Keyboard::power_on();
        let codes = [0x1e; 400];
        let taken = k.put(&codes);
        assert!((200..400).contains(&taken));
        assert_eq!(k.put(&codes), 0);
        assert_eq!(drain(&mut k).len(), taken);
        assert_eq!(k.put(&codes[taken..]), 400 - taken);
    }
}
