//! A descriptor as data.

use settings::MachineSettings;
use uuid::Uuid;

/// Everything that a descriptor says and an import uses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Envelope {
    pub files: Vec<FileRef>,
    pub disks: Vec<Disk>,
    pub systems: Vec<VirtualSystem>,
}

impl Envelope {
    pub fn disk(&self, id: &str) -> Option<&Disk> {
        self.disks.iter().find(|d| d.id == id)
    }

    /// The file that holds a disk; `None` for a disk that starts empty.
    pub fn file_of(&self, disk: &Disk) -> Option<&FileRef> {
        let id = disk.file_ref.as_ref()?;
        self.files.iter().find(|f| f.id == *id)
    }
}

/// `References/File`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileRef {
    pub id: String,
    pub href: String,
    /// In bytes; what the descriptor claims.
    pub size: Option<u64>,
    /// The file is compressed as a whole (`gzip`), beside what its format does.
    pub gzip: bool,
}

/// What is in a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    Vmdk,
    /// A CD or DVD image.
    Iso,
    Unknown,
}

/// `DiskSection/Disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub id: String,
    /// In bytes.
    pub capacity: Option<u64>,
    pub file_ref: Option<String>,
    /// The URI.
    pub format: String,
    /// VirtualBox's UUID of the medium, to which `vbox:Machine` refers.
    pub vbox_uuid: Option<Uuid>,
}

impl Disk {
    /// The format that the URI, or without one the file's name, stands for.
    pub fn kind(&self, href: &str) -> DiskFormat {
        let uri = self.format.to_ascii_lowercase();
        let name = href.to_ascii_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        if uri.contains("vmdk.html") || uri.contains("/vmdk") {
            return DiskFormat::Vmdk;
        }
        if uri.contains("ecma-119") || uri.contains("iso9660") {
            return DiskFormat::Iso;
        }
        match uri.is_empty() {
            true if name.ends_with(".iso") => DiskFormat::Iso,
            true if name.ends_with(".vmdk") || name.is_empty() => DiskFormat::Vmdk,
            _ => DiskFormat::Unknown,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerKind {
    Ide,
    Sata,
    Scsi,
    Sas,
    VirtioScsi,
    Nvme,
}

/// A storage controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// InstanceID.
    pub id: String,
    pub kind: ControllerKind,
    pub sub_type: String,
    /// OVF counts the two channels of an IDE chip as controllers.
    pub primary: bool,
}

/// A disk in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Of the disk.
    pub disk: String,
    /// InstanceID of the controller.
    pub controller: String,
    pub address: u16,
}

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adapter {
    pub sub_type: String,
    pub network: String,
}

/// One machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VirtualSystem {
    pub name: String,
    pub description: String,
    pub product: String,
    pub vendor: String,
    pub version: String,
    pub product_url: String,
    pub vendor_url: String,
    pub license: String,
    /// The CIM number of the operating system.
    pub cim_os: u32,
    pub os_description: String,
    /// VirtualBox's id of the operating system.
    pub vbox_os_type: String,
    /// `vssd:VirtualSystemType`.
    pub system_type: String,
    /// 0 if the descriptor does not say, as for the memory.
    pub cpus: u32,
    /// In bytes.
    pub memory: u64,
    pub controllers: Vec<Controller>,
    pub drives: Vec<Drive>,
    pub adapters: Vec<Adapter>,
    pub floppy: bool,
    pub cdrom: bool,
    pub usb: bool,
    /// Empty without a sound card.
    pub sound: String,
    /// `vbox:Machine`.
    pub machine: Option<Box<MachineSettings>>,
}
