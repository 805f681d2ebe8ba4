//! Writes an empty FAT12 or FAT16 file system onto an image. Source: Microsoft "FAT: General Overview of On-Disk Format" 1.03.

use crate::error::Error;
use crate::image::Image;

const SECTOR: u64 = 512;
/// From these numbers of clusters on it is FAT16, and no FAT16 any more.
const FAT12_END: u64 = 4085;
const FAT16_END: u64 = 65525;

/// The shape of a file system.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    sectors: u64,
    cluster: u64,
    root_entries: u64,
    fat_sectors: u64,
    fat16: bool,
    media: u8,
    track: u16,
    heads: u16,
}

/// Floppies: sectors, sectors in a cluster, root entries, media byte, sectors in a track, heads.
const FLOPPIES: [(u64, u64, u64, u8, u16, u16); 9] = [
    (320, 1, 64, 0xfe, 8, 1),
    (360, 1, 64, 0xfc, 9, 1),
    (640, 2, 112, 0xff, 8, 2),
    (720, 2, 112, 0xfd, 9, 2),
    (1440, 2, 112, 0xf9, 9, 2),
    (2400, 1, 224, 0xf9, 15, 2),
    (2880, 1, 224, 0xf0, 18, 2),
    (3360, 1, 224, 0xf0, 21, 2),
    (5760, 2, 240, 0xf0, 36, 2),
];

fn shape(sectors: u64) -> Option<Shape> {
    let floppy = FLOPPIES.iter().find(|(size, ..)| *size == sectors);
    let (start, root_entries, media, track, heads) = match floppy {
        Some(&(_, cluster, root, media, track, heads)) => (cluster, root, media, track, heads),
        None => (1, 512, 0xf8, 63, 255),
    };
    let root = root_entries * 32 / SECTOR;
    let mut cluster = start;
    while cluster <= 128 {
        let mut fat_sectors = 1;
        // The tables take room from the clusters that they describe.
        loop {
            let data = sectors.checked_sub(1 + root + 2 * fat_sectors)?;
            let clusters = data / cluster;
            let fat16 = clusters >= FAT12_END;
            let bytes = if fat16 { (clusters + 2) * 2 } else { ((clusters + 2) * 3).div_ceil(2) };
            let needed = bytes.div_ceil(SECTOR);
            if needed <= fat_sectors {
                if (1..FAT16_END).contains(&clusters) && (floppy.is_none() || !fat16) {
                    return Some(Shape {
                        sectors,
                        cluster,
                        root_entries,
                        fat_sectors,
                        fat16,
                        media,
                        track,
                        heads,
                    });
                }
                break;
            }
            fat_sectors = needed;
        }
        cluster *= 2;
    }
    None
}

/// Writes an empty file system that takes all of the image. What the image held is lost.
pub fn format_fat(image: &Image) -> Result<(), Error> {
    let size = image.size().0;
    let Some(shape) = shape(size / SECTOR) else {
        let what = format!("a FAT file system of {size} bytes: the limit is 4 GiB");
        return Err(Error::Unsupported { path: image.path().to_owned(), what });
    };
    let mut boot = [0; SECTOR as usize];
    let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"BOXWOOD ");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[shape.cluster as u8]);
    put(14, &1u16.to_le_bytes());
    put(16, &[2]);
    put(17, &(shape.root_entries as u16).to_le_bytes());
    match u16::try_from(shape.sectors) {
        Ok(sectors) => put(19, &sectors.to_le_bytes()),
        Err(_) => put(32, &(shape.sectors as u32).to_le_bytes()),
    }
    put(21, &[shape.media]);
    put(22, &(shape.fat_sectors as u16).to_le_bytes());
    put(24, &shape.track.to_le_bytes());
    put(26, &shape.heads.to_le_bytes());
    put(36, &[if shape.media == 0xf8 { 0x80 } else { 0 }, 0, 0x29]);
    put(39, &uuid::Uuid::new_v4().as_bytes()[..4]);
    put(43, b"NO NAME    ");
    put(54, if shape.fat16 { b"FAT16   " } else { b"FAT12   " });
    // Booting from it says that there is no system, and waits for a key: a message by INT 10h, INT 16h, INT 19h.
    put(62, &[0xbe, 0x5b, 0x7c, 0xac, 0x08, 0xc0, 0x74, 0x0b, 0xb4, 0x0e, 0xbb, 0x07, 0x00, 0xcd, 0x10]);
    put(77, &[0xeb, 0xf2, 0x90, 0x90, 0x90, 0x31, 0xc0, 0xcd, 0x16, 0xcd, 0x19, 0xeb, 0xfe, 0x90]);
    put(91, b"This is not a bootable disk. Press any key to try again.\r\n\0");
    put(510, &[0x55, 0xaa]);
    let root = shape.root_entries * 32 / SECTOR;
    let zeros = vec![0; ((2 * shape.fat_sectors + root) * SECTOR) as usize];
    image.write(SECTOR, &zeros)?;
    let first: &[u8] =
        if shape.fat16 { &[shape.media, 0xff, 0xff, 0xff] } else { &[shape.media, 0xff, 0xff] };
    for fat in 0..2 {
        image.write((1 + fat * shape.fat_sectors) * SECTOR, first)?;
    }
    image.write(0, &boot)?;
    image.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_those_of_dos() {
        let floppy = shape(2880).unwrap();
        assert_eq!((floppy.cluster, floppy.fat_sectors, floppy.media), (1, 9, 0xf0));
        assert_eq!(shape(720).map(|s| s.fat_sectors), Some(2));
        let disk = shape(64 << 11).unwrap();
        assert!(disk.fat16 && disk.cluster == 2);
        assert!(shape(4).is_none() && shape(1 << 33).is_none());
        for sectors in [40, 2000, 4100, 70_000, 1 << 20, (2 << 21) - 1] {
            let shape = shape(sectors).unwrap();
            let data = sectors - 1 - 2 * shape.fat_sectors - shape.root_entries / 16;
            let clusters = data / shape.cluster;
            assert_eq!(shape.fat16, clusters >= FAT12_END, "{sectors}");
            let room = shape.fat_sectors * SECTOR * 8 / if shape.fat16 { 16 } else { 12 };
            assert!(room >= clusters + 2, "{sectors}");
        }
    }
}
