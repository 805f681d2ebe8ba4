//! The hexadecimal dump of `mediumio cat --hex`.

const WIDTH: usize = 16;

/// A dump of consecutive pieces, whose lengths are multiples of 16 but for the last. Lines that repeat the one above are
/// counted instead of shown; the last line is always shown.
pub struct HexDump {
    end: u64,
    last: Option<Vec<u8>>,
    /// Lines left out, with the content of the last one.
    repeated: u64,
}

impl HexDump {
    /// A dump that ends before offset `end`.
    pub fn new(end: u64) -> Self {
        Self { end, last: None, repeated: 0 }
    }

    pub fn lines(&mut self, offset: u64, bytes: &[u8]) -> String {
        let mut text = String::new();
        for (number, line) in bytes.chunks(WIDTH).enumerate() {
            let at = offset + (number * WIDTH) as u64;
            let is_last = at + WIDTH as u64 >= self.end;
            let next = bytes.get((number + 1) * WIDTH..).unwrap_or_default();
            let next_same = next.len() >= WIDTH && next[..WIDTH] == *line;
            let same = self.last.as_deref() == Some(line);
            // A single repeated line is shown as it is.
            if same && !is_last && (self.repeated > 0 || next_same) {
                self.repeated += 1;
                continue;
            }
            if self.repeated > 0 {
                text.push_str(&format!("**********  <ditto x {}>\n", self.repeated));
                self.repeated = 0;
            }
            text.push_str(&format!("{at:012x}:"));
            for i in 0..WIDTH {
                match line.get(i) {
                    Some(byte) => {
                        text.push(if i == 8 { '-' } else { ' ' });
                        text.push_str(&format!("{byte:02x}"));
                    }
                    None => text.push_str("   "),
                }
            }
            text.push(' ');
            text.extend(line.iter().map(|&b| if (32..127).contains(&b) { char::from(b) } else { '.' }));
            text.push('\n');
            self.last = Some(line.to_vec());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_lines_are_counted() {
        let mut bytes = b"A line of text..".to_vec();
        bytes.extend([0; 80]);
        bytes.extend([0xff, b'x', 0x7f]);
        let text = HexDump::new(0x1063).lines(0x1000, &bytes);
        assert_eq!(
            text,
            "000000001000: 41 20 6c 69 6e 65 20 6f-66 20 74 65 78 74 2e 2e A line of text..\n\
             000000001010: 00 00 00 00 00 00 00 00-00 00 00 00 00 00 00 00 ................\n\
             **********  <ditto x 4>\n\
             000000001060: ff 78 7f                                        .x.\n"
        );
    }
}
