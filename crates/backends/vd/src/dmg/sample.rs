//! A small Apple disk image, for tests and as a seed for fuzzing.

use std::io::Write;

fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |sum, &b| sum << 8 | u32::from(b)) << (8 * (3 - group.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
            out.push(if i > group.len() { '=' } else { digit.into() });
        }
        if out.len() % 65 == 64 {
            out.push('\n');
        }
    }
    out
}

/// A file, and what it holds, in eight sectors: two plain, two of zeros, three packed by deflate and said to be of `last_kind`, one that
/// no chunk names.
pub(crate) fn sample(last_kind: u32) -> (Vec<u8>, Vec<u8>) {
    let mut model = vec![0; 8 * 512];
    model[..1024].fill(7);
    for (i, byte) in model[4 * 512..7 * 512].iter_mut().enumerate() {
        *byte = (i / 100) as u8;
    }
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&model[4 * 512..7 * 512]).unwrap();
    let packed = encoder.finish().unwrap();
    let mut file = model[..1024].to_vec();
    file.extend_from_slice(&packed);
    let mut table = vec![0; 204];
    table[..4].copy_from_slice(b"mish");
    table[203] = 4;
    for (kind, start, count, at, len) in [
        (1u32, 0u64, 2u64, 0u64, 1024u64),
        (2, 2, 2, 0, 0),
        (last_kind, 4, 3, 1024, packed.len() as u64),
        (0xffff_ffff, 7, 0, 0, 0),
    ] {
        table.extend_from_slice(&kind.to_be_bytes());
        table.extend_from_slice(&[0; 4]);
        for word in [start, count, at, len] {
            table.extend_from_slice(&word.to_be_bytes());
        }
    }
    let list = format!(
        "<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key><data>\n{}</data></dict></array></dict></dict></plist>",
        encode(&table)
    );
    let mut trailer = [0; 512];
    trailer[..4].copy_from_slice(b"koly");
    trailer[216..224].copy_from_slice(&(file.len() as u64).to_be_bytes());
    trailer[224..232].copy_from_slice(&(list.len() as u64).to_be_bytes());
    trailer[492..500].copy_from_slice(&8u64.to_be_bytes());
    file.extend_from_slice(list.as_bytes());
    file.extend_from_slice(&trailer);
    (file, model)
}
