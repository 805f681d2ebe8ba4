//! The Internet checksum and Ethernet's.

/// One's complement sum of big-endian words on top of `start`, folded to 16 bits.
pub fn sum(data: &[u8], start: u32) -> u32 {
    let fold = |mut total: u64| {
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    };
    // In the host's byte order and four bytes at a time, which gives the same sum with its bytes swapped (RFC 1071, section 2).
    let (words, rest) = data.as_chunks::<4>();
    let total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let total = u16::from_be(fold(total + u64::from(u32::from_ne_bytes(last))));
    fold(u64::from(start) + u64::from(total)).into()
}

/// The one's complement sum of `data`.
pub fn ones_sum(data: &[u8]) -> u16 {
    sum(data, 0) as u16
}

/// Puts a big-endian word; nothing happens where the frame ends before.
pub fn put(frame: &mut [u8], at: usize, value: u16) {
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// The frame check sequence of Ethernet.
pub fn crc32(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_sequence_is_that_of_802_3() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(&[]), 0);
    }

    #[test]
    fn the_sum_is_that_of_big_endian_words() {
        let data: Vec<u8> = (0..1000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for (start, end) in [(0, 0), (0, 1), (0, 2), (1, 4), (3, 10), (0, 999), (1, 1000), (0, 1000)] {
            for first in [0, 1, 0xffff, 0x1_2345] {
                let words = data[start..end].chunks(2);
                let plain = words.map(|w| u32::from(w[0]) << 8 | w.get(1).copied().map_or(0, u32::from));
                let mut expected = plain.sum::<u32>() + first;
                while expected > 0xffff {
                    expected = (expected & 0xffff) + (expected >> 16);
                }
                assert_eq!(sum(&data[start..end], first), expected, "{start}..{end} on {first}");
            }
        }
    }
}
