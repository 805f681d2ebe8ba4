//! CRC-32C (Castagnoli), as VHDX has it over its structures.

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 != 0 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

/// Of `bytes`, taking the four bytes at `skip` as zeros: a structure's checksum lies in it.
pub(super) fn crc32c(bytes: &[u8], skip: usize) -> u32 {
    let mut crc = u32::MAX;
    for (at, &byte) in bytes.iter().enumerate() {
        let byte = if (skip..skip + 4).contains(&at) { 0 } else { byte };
        crc = crc >> 8 ^ TABLE[((crc ^ u32::from(byte)) & 0xff) as usize];
    }
    !crc
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_value_of_the_polynomial_comes_out() {
        assert_eq!(super::crc32c(b"123456789", 100), 0xe306_9283);
    }
}
