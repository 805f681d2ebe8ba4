//! INQUIRY data: the standard ones and the pages of vital product data. Sources: SPC-3 sections 6.4 and 7.6, SBC-3 section 6.5.

/// Standard data: the header's eight bytes, then vendor, product and revision.
pub(crate) fn standard(header: [u8; 8], vendor: &str, product: &str, revision: &str) -> Vec<u8> {
    let mut bytes = header.to_vec();
    for (len, text) in [(8, vendor), (16, product), (4, revision)] {
        put_text(&mut bytes, len, text);
    }
    bytes
}

/// ASCII, cut or padded with spaces to `len` characters.
pub(super) fn put_text(bytes: &mut Vec<u8>, len: usize, text: &str) {
    let text = text.bytes().filter(u8::is_ascii).chain(std::iter::repeat(b' '));
    bytes.extend(text.take(len));
}

/// What the pages of a logical unit tell.
pub(super) struct Product<'a> {
    /// Peripheral device type: 0 direct access, 5 CD/DVD.
    pub(super) kind: u8,
    pub(super) vendor: &'a str,
    pub(super) product: &'a str,
    pub(super) serial: &'a str,
    /// Of a disk: whether it rotates, and whether it takes ranges that are not needed any more.
    pub(super) disk: Option<(bool, bool)>,
}

/// Blocks of one READ or WRITE at most, as told; a multiple of what a request to the medium carries.
pub(super) const MAX_TRANSFER: u32 = 0xffff;
/// Blocks of one UNMAP or WRITE SAME at most.
pub(super) const MAX_UNMAP: u32 = 0x0040_0000;
/// Ranges of one UNMAP at most.
pub(super) const MAX_UNMAP_RANGES: u32 = 256;

/// The page, with its header; none if there is no such page.
pub(super) fn page(number: u8, product: &Product<'_>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    match (number, product.disk) {
        (0x00, disk) => {
            body.extend_from_slice(&[0x00, 0x80, 0x83]);
            if disk.is_some() {
                body.extend_from_slice(&[0xb0, 0xb1, 0xb2]);
            }
        }
        (0x80, _) => body.extend(product.serial.bytes().filter(u8::is_ascii)),
        (0x83, _) => {
            // One designator of the logical unit: ASCII, by T10 vendor.
            let mut text = Vec::new();
            put_text(&mut text, 8, product.vendor);
            put_text(&mut text, 16, product.product);
            text.extend(product.serial.bytes().filter(u8::is_ascii).take(64));
            body.extend_from_slice(&[0x02, 0x01, 0, text.len() as u8]);
            body.extend_from_slice(&text);
        }
        // Block limits.
        (0xb0, Some((_, unmap))) => {
            body.resize(60, 0);
            // WRITE SAME of no blocks is refused.
            body[0] = 1;
            body[4..8].copy_from_slice(&MAX_TRANSFER.to_be_bytes());
            if unmap {
                body[16..20].copy_from_slice(&MAX_UNMAP.to_be_bytes());
                body[20..24].copy_from_slice(&MAX_UNMAP_RANGES.to_be_bytes());
            }
            body[32..40].copy_from_slice(&u64::from(MAX_UNMAP).to_be_bytes());
        }
        // Block device characteristics: rotation rate not told, or no rotation.
        (0xb1, Some((rotates, _))) => {
            body.resize(60, 0);
            body[1] = u8::from(!rotates);
        }
        // Logical block provisioning: by UNMAP and WRITE SAME, thin.
        (0xb2, Some((_, unmap))) => body.extend_from_slice(if unmap { &[0, 0xe0, 2, 0] } else { &[0; 4] }),
        _ => return None,
    }
    let mut bytes = vec![product.kind, number];
    bytes.extend_from_slice(&(body.len() as u16).to_be_bytes());
    bytes.append(&mut body);
    Some(bytes)
}
