//! The text part of a VMDK image: `key=value` lines, extent lines, and the disk database with VirtualBox's UUIDs.

use uuid::Uuid;

use crate::format::{NewParent, Variant};

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

    /// The identifier of the content, as a hexadecimal number.
    pub(super) fn content(&self, key: &str) -> Option<u32> {
        u32::from_str_radix(self.value(key)?, 16).ok()
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
        "FLAT" | "VMFS" => ExtentKind::Flat,
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

/// What a new image is to be.
pub(crate) struct NewVmdk {
    pub(crate) variant: Variant,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) uuid: Uuid,
    pub(crate) parent: Option<NewParent>,
    pub(crate) comment: String,
}

/// The descriptor of a new image with these extent lines.
pub(super) fn new_descriptor(new: &NewVmdk, extents: &[String]) -> String {
    let kind = match new.variant {
        Variant::Dynamic | Variant::Differencing => "monolithicSparse",
        Variant::Fixed => "monolithicFlat",
        Variant::Split => "twoGbMaxExtentSparse",
        Variant::SplitFixed => "twoGbMaxExtentFlat",
        Variant::StreamOptimized => "streamOptimized",
        Variant::Esx => "vmfs",
    };
    descriptor_of(new, kind, extents)
}

/// As [`new_descriptor`], with another word for the kind.
pub(super) fn descriptor_of(new: &NewVmdk, kind: &str, extents: &[String]) -> String {
    let modification = Uuid::new_v4();
    let content = modification.as_fields().0 & 0x7fff_ffff;
    let cylinders = (new.size / 512 / (16 * 63)).clamp(1, 16383);
    let adapter = if new.variant == Variant::Esx { "lsilogic" } else { "ide" };
    let parent = new.parent.as_ref();
    let parent_content = parent.map_or(u32::MAX, |p| p.content.unwrap_or(0));
    let hint = parent.map_or(String::new(), |p| {
        format!("parentFileNameHint=\"{}\"\n", p.path.display().to_string().replace(['"', '\n'], "_"))
    });
    let comment = match new.comment.as_str() {
        "" => String::new(),
        text => format!("ddb.comment=\"{}\"\n", text.replace('"', "'").replace('\n', "\\n")),
    };
    format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={content:08x}\n\
         parentCID={parent_content:08x}\n\
         {hint}\
         createType=\"{kind}\"\n\
         \n\
         # Extent description\n\
         {extents}\n\
         \n\
         # The disk Data Base \n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"4\"\n\
         ddb.adapterType=\"{adapter}\"\n\
         ddb.geometry.cylinders=\"{cylinders}\"\n\
         ddb.geometry.heads=\"16\"\n\
         ddb.geometry.sectors=\"63\"\n\
         {comment}\
         ddb.uuid.image=\"{uuid}\"\n\
         ddb.uuid.parent=\"{parent_uuid}\"\n\
         ddb.uuid.modification=\"{modification}\"\n\
         ddb.uuid.parentmodification=\"{parent_modification}\"\n",
        extents = extents.join("\n"),
        uuid = new.uuid,
        parent_uuid = parent.map_or(Uuid::nil(), |p| p.uuid),
        parent_modification = parent.map_or(Uuid::nil(), |p| p.modification),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_descriptor_reads_back() {
        let uuid = Uuid::from_u128(1);
        let new = NewVmdk {
            variant: Variant::Dynamic,
            size: 2048 * 512,
            uuid,
            parent: None,
            comment: "a \"b\"".into(),
        };
        let text = new_descriptor(&new, &["RW 2048 SPARSE \"a b.vmdk\"".into()]);
        let d = Descriptor::parse(text.as_bytes());
        assert_eq!(d.value("createType"), Some("monolithicSparse"));
        assert_eq!(d.uuid("ddb.uuid.image"), Some(uuid));
        assert_eq!(d.uuid("ddb.uuid.parent"), None);
        assert_eq!(d.value("ddb.comment"), Some("a 'b'"));
        assert_eq!(d.content("parentCID"), Some(u32::MAX));
        let at = d.value_offset("CID").unwrap();
        assert_eq!(u32::from_str_radix(&d.text[at..at + 8], 16).ok(), d.content("CID"));
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
