//! The text part of a VMDK image: `key=value` lines, extent lines, and the disk database with VirtualBox's UUIDs.

use uuid::Uuid;

/// How an extent is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ExtentKind {
    Sparse,
    Flat,
    Zero,
    Other(String),
}

/// A stretch of the disk in a file of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) sectors: u64,
    pub(super) kind: ExtentKind,
    pub(super) file: String,
    /// First sector in the file, of flat extents.
    pub(super) offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) text: String,
}

impl Descriptor {
    /// Takes the text up to the first zero byte. What is not UTF-8 is lost: only ASCII keys matter here.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
        Self { text: String::from_utf8_lossy(bytes).into_owned() }
    }

    /// The value of a key, without quotes.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            let value = value.trim();
            let bare = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
            name.trim().eq_ignore_ascii_case(key).then_some(bare.unwrap_or(value))
        })
    }

    pub(super) fn uuid(&self, key: &str) -> Option<Uuid> {
        self.value(key)?.parse().ok().filter(|uuid: &Uuid| !uuid.is_nil())
    }

    /// The extents, or the line that is none.
    pub(super) fn extents(&self) -> Result<Vec<ExtentLine>, String> {
        let is_extent =
            |line: &&str| ["RW ", "RDONLY ", "NOACCESS "].iter().any(|access| line.starts_with(access));
        self.text
            .lines()
            .map(str::trim)
            .filter(is_extent)
            .map(|line| parse_extent(line).ok_or_else(|| line.to_owned()))
            .collect()
    }

    /// Where a key's value (without quotes) lies in the text, for replacing it by one of equal length.
    pub(super) fn value_offset(&self, key: &str) -> Option<usize> {
        let value = self.value(key)?;
        Some(value.as_ptr() as usize - self.text.as_ptr() as usize)
    }
}

fn parse_extent(line: &str) -> Option<ExtentLine> {
    let mut words = line.splitn(4, ' ');
    let _access = words.next()?;
    let sectors = words.next()?.parse().ok()?;
    let kind = match words.next()? {
        "SPARSE" => ExtentKind::Sparse,
        "FLAT" => ExtentKind::Flat,
        "ZERO" => ExtentKind::Zero,
        other => ExtentKind::Other(other.to_owned()),
    };
    let rest = words.next().unwrap_or_default();
    let (file, offset) = match rest.strip_prefix('"') {
        Some(rest) => {
            let (file, offset) = rest.rsplit_once('"')?;
            (file.to_owned(), offset.trim())
        }
        None => (String::new(), ""),
    };
    let offset = if offset.is_empty() { 0 } else { offset.parse().ok()? };
    Some(ExtentLine { sectors, kind, file, offset })
}

/// The descriptor of a new image that lies in the one file `name`.
pub(super) fn new_descriptor(
    sectors: u64,
    name: &str,
    uuid: Uuid,
    modification: Uuid,
    content: u32,
) -> String {
    let cylinders = (sectors / (16 * 63)).clamp(1, 16383);
    format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={content:08x}\n\
         parentCID=ffffffff\n\
         createType=\"monolithicSparse\"\n\
         \n\
         # Extent description\n\
         RW {sectors} SPARSE \"{name}\"\n\
         \n\
         # The disk Data Base \n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"4\"\n\
         ddb.adapterType=\"ide\"\n\
         ddb.geometry.cylinders=\"{cylinders}\"\n\
         ddb.geometry.heads=\"16\"\n\
         ddb.geometry.sectors=\"63\"\n\
         ddb.uuid.image=\"{uuid}\"\n\
         ddb.uuid.parent=\"{nil}\"\n\
         ddb.uuid.modification=\"{modification}\"\n\
         ddb.uuid.parentmodification=\"{nil}\"\n",
        nil = Uuid::nil()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_descriptor_reads_back() {
        let (uuid, modification) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let d = Descriptor::parse(new_descriptor(2048, "a b.vmdk", uuid, modification, 0xabc).as_bytes());
        assert_eq!(d.value("createType"), Some("monolithicSparse"));
        assert_eq!(d.uuid("ddb.uuid.image"), Some(uuid));
        assert_eq!(d.uuid("ddb.uuid.parent"), None);
        let at = d.value_offset("CID").unwrap();
        assert_eq!(&d.text[at..at + 8], "00000abc");
        let extent =
            ExtentLine { sectors: 2048, kind: ExtentKind::Sparse, file: "a b.vmdk".into(), offset: 0 };
        assert_eq!(d.extents(), Ok(vec![extent]));
    }

    #[test]
    fn extent_lines_of_other_makers_are_understood() {
        let d = Descriptor::parse(b"RW 63 FLAT \"x-flat.vmdk\" 128\nRW 10 ZERO\nRW ten FLAT \"x\"\n");
        assert_eq!(d.extents(), Err("RW ten FLAT \"x\"".into()));
        let d = Descriptor::parse(b"RW 63 FLAT \"x-flat.vmdk\" 128\r\nNOACCESS 10 ZERO\n");
        let extents = d.extents().unwrap();
        assert_eq!((extents[0].offset, extents[0].file.as_str()), (128, "x-flat.vmdk"));
        assert_eq!((extents[1].kind.clone(), extents[1].sectors), (ExtentKind::Zero, 10));
    }
}
