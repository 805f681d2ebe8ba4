//! The drives of a running machine: what is in them, and how it changes while the guest runs.
//!
//! A change is told as the machine's whole new settings; what differs from the drives that are there is carried out. Discs and
//! floppies are exchanged, drives at AHCI ports are plugged and unplugged; all else waits for the machine to be off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Context;
use dev_storage::ahci::{self, Ahci, PortError, PortSetup};
use dev_storage::floppy::{DriveType, Floppy, FloppyDrive};
use dev_storage::ide::{self, CdIdentity, DiskIdentity, Drive, Ide, MediumError};
use parking_lot::Mutex;
use pdm::connector::Medium;

use crate::block::ImageDriver;
use crate::config::{AhciConfig, DriveConfig, DriveKind, MachineConfig};

/// A controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Chip {
    Ide,
    Ahci,
    Floppy,
}

/// A place for a drive: controller, port, device.
type Place = (Chip, u8, u8);

/// Why a drive cannot be changed while the machine runs.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("the guest has locked the medium in the drive")]
    Locked,
    #[error("only discs, floppies and drives at SATA ports can be changed while the machine runs")]
    NotWhileRunning,
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// The controllers, once they are built.
#[derive(Clone, Default)]
pub struct Controllers {
    pub ide: Option<Arc<Mutex<Ide>>>,
    pub ahci: Option<Arc<Mutex<Ahci>>>,
    pub floppy: Option<Arc<Mutex<Floppy>>>,
}

/// The drives of a machine with their images.
pub struct Storage {
    controllers: Controllers,
    drives: Mutex<Drives>,
    ejected: Arc<Ejected>,
}

#[derive(Default)]
struct Drives {
    configs: BTreeMap<Place, DriveConfig>,
    images: BTreeMap<Place, Arc<ImageDriver>>,
}

/// Drives whose disc the guest has ejected since the last change.
#[derive(Default)]
pub struct Ejected(Mutex<BTreeSet<Place>>);

impl ide::EjectSink for Ejected {
    fn ejected(&self, channel: usize, drive: usize) {
        tracing::info!(target: "storage", channel, drive, "the guest has ejected the disc");
        self.0.lock().insert((Chip::Ide, channel as u8, drive as u8));
    }
}

impl ahci::EjectSink for Ejected {
    fn ejected(&self, port: usize) {
        tracing::info!(target: "storage", port, "the guest has ejected the disc");
        self.0.lock().insert((Chip::Ahci, port as u8, 0));
    }
}

/// Every drive of the configuration by its place.
fn configs(config: &MachineConfig) -> BTreeMap<Place, DriveConfig> {
    let ide = config.ide.iter().flat_map(|(_, drives)| drives).map(|d| (Chip::Ide, d));
    let ahci = config.ahci.iter().flat_map(|ahci| &ahci.drives).map(|d| (Chip::Ahci, d));
    let floppy = config.floppies.iter().flatten().map(|d| (Chip::Floppy, d));
    ide.chain(ahci).chain(floppy).map(|(chip, d)| ((chip, d.port, d.device), d.clone())).collect()
}

/// The images of a machine's drives while it is built.
#[derive(Default)]
pub struct Media {
    images: BTreeMap<Place, Arc<ImageDriver>>,
    ejected: Arc<Ejected>,
}

impl Media {
    /// Whom controllers tell of ejected discs.
    pub fn ejected(&self) -> Arc<Ejected> {
        self.ejected.clone()
    }

    fn open(&mut self, chip: Chip, drive: &DriveConfig) -> anyhow::Result<Medium> {
        let Some(medium) = &drive.medium else { return Ok(None) };
        let image = ImageDriver::open(medium)?;
        self.images.insert((chip, drive.port, drive.device), image.clone());
        Ok(Some(image))
    }

    /// The drives of an IDE controller by channel and device.
    pub fn ide_drives(&mut self, drives: &[DriveConfig]) -> anyhow::Result<[Option<Drive>; 4]> {
        let mut places: [Option<Drive>; 4] = Default::default();
        for drive in drives {
            if drive.port > 1 || drive.device > 1 {
                let (port, device) = (drive.port, drive.device);
                anyhow::bail!(
                    "IDE port {port} device {device} does not exist: ports and devices are 0 and 1"
                );
            }
            places[usize::from(drive.port * 2 + drive.device)] = Some(self.ata_drive(Chip::Ide, drive)?);
        }
        Ok(places)
    }

    /// The ports of an AHCI controller, with their drives.
    pub fn ahci_ports(&mut self, config: &AhciConfig) -> anyhow::Result<Vec<PortSetup>> {
        let mut ports: Vec<PortSetup> = (0..config.ports.max(1)).map(|_| PortSetup::default()).collect();
        for drive in &config.drives {
            let Some(port) = ports.get_mut(usize::from(drive.port)).filter(|_| drive.device == 0) else {
                anyhow::bail!(
                    "SATA port {} device {} does not exist: the controller has {} ports with one device each",
                    drive.port,
                    drive.device,
                    config.ports
                );
            };
            port.drive = Some(self.ata_drive(Chip::Ahci, drive)?);
            port.hot_pluggable = drive.hot_pluggable;
        }
        Ok(ports)
    }

    /// A disk or CD drive, with its medium.
    fn ata_drive(&mut self, chip: Chip, drive: &DriveConfig) -> anyhow::Result<Drive> {
        let place = format!(
            "{} port {} device {}",
            if chip == Chip::Ide { "IDE" } else { "SATA" },
            drive.port,
            drive.device
        );
        let cd = match chip {
            Chip::Ide => CdIdentity::virtualbox(u32::from(drive.port) * 2 + u32::from(drive.device)),
            Chip::Ahci | Chip::Floppy => CdIdentity::virtualbox_ahci(drive.port.into()),
        };
        Ok(match (drive.kind, self.open(chip, drive)?) {
            (DriveKind::Disk, Some(medium)) => {
                let id = drive.medium.as_ref().map(|m| m.uuid.into_bytes()).unwrap_or_default();
                let word = |at: usize| u32::from_le_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]);
                // The first field of a UUID is big endian in its bytes.
                let identity = DiskIdentity {
                    non_rotational: drive.non_rotational,
                    discard: drive.discard,
                    ..DiskIdentity::virtualbox(word(0).swap_bytes(), word(12))
                };
                Drive::Disk { identity, medium }
            }
            (DriveKind::Dvd, medium) => Drive::Cd { identity: cd, medium },
            (DriveKind::Disk, None) => {
                anyhow::bail!("the hard disk at {place} has no medium: attach one, or detach the drive")
            }
            (DriveKind::Floppy, _) => anyhow::bail!("a floppy drive cannot be attached at {place}"),
        })
    }

    /// The two drives of a floppy controller. Every drive is a 1.44 MB one, as VirtualBox's are unless overridden.
    pub fn floppy_drives(&mut self, drives: &[DriveConfig]) -> anyhow::Result<[Option<FloppyDrive>; 2]> {
        let mut places = [None, None];
        for drive in drives {
            let medium = self.open(Chip::Floppy, drive)?;
            let Some(place) = places.get_mut(usize::from(drive.device)) else {
                anyhow::bail!("there is no floppy drive {}: devices are 0 and 1", drive.device);
            };
            *place = Some(FloppyDrive { drive_type: DriveType::Mb1_44, medium });
        }
        Ok(places)
    }

    /// The drives of the machine that was built from the configuration.
    pub fn finish(self, config: &MachineConfig, controllers: Controllers) -> Storage {
        let drives = Drives { configs: configs(config), images: self.images };
        Storage { controllers, drives: Mutex::new(drives), ejected: self.ejected }
    }
}

impl Storage {
    /// Makes everything the guest wrote durable.
    pub fn settle(&self) -> anyhow::Result<()> {
        for image in self.drives.lock().images.values() {
            image.settle().context("the guest's last writes could not be stored")?;
        }
        Ok(())
    }

    /// Carries out what differs in the new settings. After an error the drives that come later are as they were.
    pub fn change(&self, config: &MachineConfig, force: bool) -> Result<(), ChangeError> {
        let mut drives = self.drives.lock();
        for place in std::mem::take(&mut *self.ejected.0.lock()) {
            if let Some(drive) = drives.configs.get_mut(&place) {
                drive.medium = None;
            }
            self.close(&mut drives, place);
        }
        let wanted = configs(config);
        let gone: Vec<Place> = drives.configs.keys().filter(|p| !wanted.contains_key(p)).copied().collect();
        for place in gone {
            self.unplug(&mut drives, place)?;
        }
        for (place, new) in wanted {
            match drives.configs.get(&place) {
                Some(old) if *old == new => {}
                None => self.plug(&mut drives, place, new)?,
                Some(old) if old.kind == DriveKind::Disk || old.kind != new.kind => {
                    self.unplug(&mut drives, place)?;
                    self.plug(&mut drives, place, new)?;
                }
                // Flags of a drive are found by the guest when it starts the next time.
                Some(old) if old.medium == new.medium => {
                    drives.configs.insert(place, new);
                }
                Some(_) => self.exchange(&mut drives, place, new, force)?,
            }
        }
        Ok(())
    }

    /// Lets go of the image at `place`.
    fn close(&self, drives: &mut Drives, place: Place) {
        if let Some(image) = drives.images.remove(&place)
            && let Err(error) = image.settle()
        {
            tracing::error!(target: "storage", %error, "the guest's last writes to a medium that was taken out are lost");
        }
    }

    /// Puts another medium into the drive at `place`, or none.
    fn exchange(
        &self,
        drives: &mut Drives,
        place: Place,
        new: DriveConfig,
        force: bool,
    ) -> Result<(), ChangeError> {
        let image = new.medium.as_ref().map(ImageDriver::open).transpose().map_err(ChangeError::Failed)?;
        let medium: Medium = image.clone().map(|image| image as _);
        let (chip, port, device) = place;
        let (port, device) = (usize::from(port), usize::from(device));
        match (chip, &self.controllers) {
            (Chip::Ide, Controllers { ide: Some(ide), .. }) => {
                ide.lock().set_medium(port, device, medium, force).map_err(|e| match e {
                    MediumError::Locked => ChangeError::Locked,
                    other => ChangeError::Failed(other.into()),
                })?;
            }
            (Chip::Ahci, Controllers { ahci: Some(ahci), .. }) => {
                ahci.lock().set_medium(port, medium, force).map_err(|e| match e {
                    PortError::Locked => ChangeError::Locked,
                    other => ChangeError::Failed(other.into()),
                })?;
            }
            (Chip::Floppy, Controllers { floppy: Some(floppy), .. }) => {
                floppy.lock().set_medium(device, medium).map_err(|e| ChangeError::Failed(e.into()))?;
            }
            _ => return Err(ChangeError::NotWhileRunning),
        }
        self.close(drives, place);
        if let Some(image) = image {
            drives.images.insert(place, image);
        }
        drives.configs.insert(place, new);
        Ok(())
    }

    fn unplug(&self, drives: &mut Drives, place: Place) -> Result<(), ChangeError> {
        let (Chip::Ahci, Some(ahci)) = (place.0, &self.controllers.ahci) else {
            return Err(ChangeError::NotWhileRunning);
        };
        ahci.lock().detach(place.1.into()).map_err(|e| ChangeError::Failed(e.into()))?;
        self.close(drives, place);
        drives.configs.remove(&place);
        tracing::info!(target: "storage", port = place.1, "a drive was unplugged");
        Ok(())
    }

    fn plug(&self, drives: &mut Drives, place: Place, new: DriveConfig) -> Result<(), ChangeError> {
        let (Chip::Ahci, Some(ahci)) = (place.0, &self.controllers.ahci) else {
            return Err(ChangeError::NotWhileRunning);
        };
        let mut media = Media::default();
        let drive = media.ata_drive(Chip::Ahci, &new).map_err(ChangeError::Failed)?;
        ahci.lock().attach(place.1.into(), drive).map_err(|e| ChangeError::Failed(e.into()))?;
        drives.images.append(&mut media.images);
        drives.configs.insert(place, new);
        tracing::info!(target: "storage", port = place.1, "a drive was plugged in");
        Ok(())
    }
}
