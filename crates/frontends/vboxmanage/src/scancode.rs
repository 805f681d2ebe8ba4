//! Text as keyboard scan codes: set 1, US layout, with the shift key pressed where a character needs it.

const SHIFT: u8 = 0x2a;
const SPACE: u8 = 0x39;
const RELEASE: u8 = 0x80;

/// Rows of keys as `(first code, plain, shifted)`.
const ROWS: &[(u8, &str, &str)] = &[
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2b, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
];

/// The key and whether shift is held; `None` for what no key of the layout types.
fn key(character: u8) -> Option<(u8, bool)> {
    match character {
        b'\t' => return Some((0x0f, false)),
        b'\n' => return Some((0x1c, false)),
        b' ' => return Some((SPACE, false)),
        _ => {}
    }
    ROWS.iter().find_map(|(first, plain, shifted)| {
        let at = |row: &str| row.bytes().position(|byte| byte == character).map(|at| first + at as u8);
        at(plain).map(|code| (code, false)).or_else(|| at(shifted).map(|code| (code, true)))
    })
}

/// Presses and releases the keys of `text` one after the other.
#[derive(Debug, Default)]
pub struct Typist {
    codes: Vec<u8>,
    shift: bool,
}

impl Typist {
    pub fn put(&mut self, text: &[u8]) {
        for (code, shift) in text.iter().filter_map(|byte| key(*byte)) {
            if shift != self.shift {
                self.shift = shift;
                self.codes.push(if shift { SHIFT } else { SHIFT | RELEASE });
            }
            self.codes.extend([code, code | RELEASE]);
        }
    }

    /// The codes, with the shift key released at the end.
    pub fn finish(mut self) -> Vec<u8> {
        if self.shift {
            self.codes.push(SHIFT | RELEASE);
        }
        self.codes
    }
}

/// The codes for several strings, with a space between them.
pub fn strings(texts: &[String]) -> Vec<u8> {
    let mut typist = Typist::default();
    for (i, text) in texts.iter().enumerate() {
        if i > 0 && !typist.codes.is_empty() {
            typist.codes.extend([SPACE, SPACE | RELEASE]);
        }
        typist.put(text.as_bytes());
    }
    typist.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shift_is_held_over_a_run_of_capitals() {
        assert_eq!(strings(&["aBC".into()]), [0x1e, 0x9e, 0x2a, 0x30, 0xb0, 0x2e, 0xae, 0xaa]);
    }

    #[test]
    fn strings_are_separated_by_a_space() {
        assert_eq!(strings(&["a".into(), "b".into()]), [0x1e, 0x9e, 0x39, 0xb9, 0x30, 0xb0]);
    }

    #[test]
    fn every_printable_character_has_a_key() {
        for byte in 0x20..0x7f_u8 {
            assert!(key(byte).is_some(), "{}", byte as char);
        }
        for (character, expected) in [
            (b'\\', (0x2b, false)),
            (b'|', (0x2b, true)),
            (b'`', (0x29, false)),
            (b'/', (0x35, false)),
            (b'?', (0x35, true)),
            (b'\'', (0x28, false)),
            (b'"', (0x28, true)),
            (b'0', (0x0b, false)),
            (b'=', (0x0d, false)),
            (b'\n', (0x1c, false)),
        ] {
            assert_eq!(key(character), Some(expected), "{}", character as char);
        }
        assert_eq!(key(0x07), None);
        assert_eq!(key(0xe4), None);
    }
}
