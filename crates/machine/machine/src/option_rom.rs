//! Fits an option ROM to the adapter that it is for.

/// An image that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RomError {
    #[error("an image of {0} bytes is not an option ROM")]
    NotARom(usize),
    #[error("the option ROM has no PCI data structure")]
    NoPciData,
}

/// Writes an adapter's PCI identity into the PCI data structure of an option ROM, and makes its checksum right again.
///
/// SeaBIOS starts a ROM from fw_cfg for the adapter that its file is named after. The image's own identity counts too: SeaBIOS's video
/// BIOS looks the frame buffer's address up in BAR 0 only if it is started for a device with the identity that its image carries, else
/// it reports the fixed address 0xe0000000; iPXE's images are each made for one card, and know all of its relatives.
pub fn adopt(rom: &mut [u8], vendor: u16, device: u16) -> Result<(), RomError> {
    // PCI Firmware Specification 3.0, 5.1: header 0x55 0xaa, size in units of 512 bytes, pointer to "PCIR" at 0x18.
    let len = rom.len();
    let size = rom.get(2).map_or(0, |&units| usize::from(units) * 512);
    if rom.get(..2) != Some(&[0x55, 0xaa]) || size == 0 || size > len {
        return Err(RomError::NotARom(len));
    }
    let rom = &mut rom[..size];
    let at = usize::from(u16::from_le_bytes([rom[0x18], rom[0x19]]));
    if rom.get(at..at + 4) != Some(b"PCIR") || at + 0x18 > size {
        return Err(RomError::NoPciData);
    }
    rom[at + 4..at + 6].copy_from_slice(&vendor.to_le_bytes());
    rom[at + 6..at + 8].copy_from_slice(&device.to_le_bytes());
    // Byte 6 is filled by the builders of ROMs to make the sum zero (SeaBIOS `scripts/buildrom.py`, iPXE `romprefix.S`).
    let sum = rom.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
    rom[6] = rom[6].wrapping_sub(sum);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_gets_the_identity_and_a_good_checksum() {
        let mut rom = vec![0; 1024];
        rom[..3].copy_from_slice(&[0x55, 0xaa, 2]);
        rom[0x18] = 0x40;
        rom[0x40..0x44].copy_from_slice(b"PCIR");
        adopt(&mut rom, 0x80ee, 0xbeef).unwrap();
        assert_eq!(rom[0x44..0x48], [0xee, 0x80, 0xef, 0xbe]);
        assert_eq!(rom.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(adopt(&mut [0; 600], 1, 2), Err(RomError::NotARom(600)));
        assert_eq!(adopt(&mut [], 1, 2), Err(RomError::NotARom(0)));
        let mut rom = vec![0; 512];
        rom[..3].copy_from_slice(&[0x55, 0xaa, 1]);
        rom[0x18..0x1a].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(adopt(&mut rom, 1, 2), Err(RomError::NoPciData));
    }
}
