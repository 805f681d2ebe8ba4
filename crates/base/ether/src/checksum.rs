//! The Internet checksum and Ethernet's.

/// One's complement sum of big-endian words on top of `start`, folded to 16 bits.
pub fn sum(data: &[u8], start: u32) -> u32 {
    let mut total = u64::from(start);
    let mut words = data.chunks_exact(2);
    for word in &mut words {
        total += u64::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        total += u64::from(*last) << 8;
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u32
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

const CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut value = i as u32;
        let mut bit = 0;
        while bit < 8 {
            value = value >> 1 ^ if value & 1 != 0 { 0xedb8_8320 } else { 0 };
            bit += 1;
        }
        table[i] = value;
        i += 1;
    }
    table
};

/// The frame check sequence of Ethernet.
pub fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, byte| crc >> 8 ^ CRC[usize::from(crc as u8 ^ byte)])
}
