//! The drives of a running machine: what is in them, and how it changes while the guest runs.
//!
//! A change is told as the machine's whole new settings; what differs from the drives that are there is carried out. Discs and
//! floppies are exchanged, drives at AHCI ports are plugged and unplugged; all else waits for the machine to be off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use dev_storage::ahci::{self, Ahci, PortError, PortSetup};
use dev_storage::floppy::{DriveType, Floppy, FloppyDrive};
use dev_storage::ide::{self, CdIdentity, DiskIdentity, Drive, Ide, MediumError};
use dev_storage::scsi::{self, TargetError, buslogic, mpt, virtio::VirtioScsi};
use dev_storage::{nvme, virtio_blk};
use parking_lot::{Condvar, Mutex};
use pdm::connector::{BlockDriver, Medium};

use crate::block::ImageDriver;
use crate::config::{DriveConfig, DriveKind, MachineConfig, PortsConfig, ScsiConfig, ScsiModel};
use crate::engine::Between;
use crate::keys::{KeyError, Keys};
use crate::limit::Limits;

/// A controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Chip {
    Ide,
    Ahci,
    Nvme,
    VirtioBlk,
    Scsi(ScsiModel),
    Floppy,
}

impl Chip {
    /// The controller's name in messages.
    fn name(self) -> &'static str {
        match self {
            Self::Ide => "IDE",
            Self::Ahci => "SATA",
            Self::Nvme => "NVMe",
            Self::VirtioBlk => "virtio-blk",
            Self::Scsi(ScsiModel::LsiLogicSas) => "SAS",
            Self::Scsi(ScsiModel::Virtio) => "virtio-scsi",
            Self::Scsi(_) => "SCSI",
            Self::Floppy => "floppy",
        }
    }
}

/// A place for a drive: controller, port, device.
type Place = (Chip, u8, u8);

/// Why a drive cannot be changed while the machine runs.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("the guest has locked the medium in the drive")]
    Locked,
    #[error(
        "only discs, floppies and drives at SATA, SAS and virtio-scsi ports can be changed while the machine runs"
    )]
    NotWhileRunning,
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// The controllers, once they are built.
#[derive(Clone, Default)]
pub struct Controllers {
    pub ide: Option<Arc<Mutex<Ide>>>,
    pub ahci: Option<Arc<Mutex<Ahci>>>,
    pub scsi: BTreeMap<ScsiModel, Arc<Mutex<dyn scsi::Controller>>>,
    pub floppy: Option<Arc<Mutex<Floppy>>>,
}

/// The drives of a machine with their images.
pub struct Storage {
    controllers: Controllers,
    drives: Mutex<Drives>,
    ejected: Arc<Ejected>,
    keys: Arc<Keys>,
    limits: Arc<Limits>,
}

#[derive(Default)]
struct Drives {
    configs: BTreeMap<Place, DriveConfig>,
    images: BTreeMap<Place, Arc<ImageDriver>>,
    /// Ejects that [`Storage::ejects`] has not told yet.
    untold: Vec<(String, u8, u8)>,
}

/// Drives whose disc the guest has ejected and whose image is still open.
#[derive(Default)]
pub struct Ejected {
    places: Mutex<BTreeSet<Place>>,
    changed: Condvar,
}

impl Ejected {
    fn add(&self, place: Place) {
        let (chip, port, device) = place;
        tracing::info!(target: "storage", port, device, "the guest has ejected the disc at {}", chip.name());
        self.places.lock().insert(place);
        self.changed.notify_all();
    }

    /// Waits for ejects, at most for `time`.
    fn wait(&self, time: Duration) {
        let mut places = self.places.lock();
        if places.is_empty() {
            self.changed.wait_for(&mut places, time);
        }
    }

    fn take(&self) -> BTreeSet<Place> {
        std::mem::take(&mut *self.places.lock())
    }
}

impl ide::EjectSink for Ejected {
    fn ejected(&self, channel: usize, drive: usize) {
        self.add((Chip::Ide, channel as u8, drive as u8));
    }
}

impl ahci::EjectSink for Ejected {
    fn ejected(&self, port: usize) {
        self.add((Chip::Ahci, port as u8, 0));
    }
}

/// Takes note of discs that were ejected at one SCSI controller.
struct ScsiEjected {
    model: ScsiModel,
    all: Arc<Ejected>,
}

impl scsi::EjectSink for ScsiEjected {
    fn ejected(&self, target: usize) {
        self.all.add((Chip::Scsi(self.model), target as u8, 0));
    }
}

/// Every drive of the configuration by its place.
fn configs(config: &MachineConfig) -> BTreeMap<Place, DriveConfig> {
    let ide = config.ide.iter().flat_map(|(_, drives)| drives).map(|d| (Chip::Ide, d));
    let ported =
        [(Chip::Ahci, &config.ahci), (Chip::Nvme, &config.nvme), (Chip::VirtioBlk, &config.virtio_blk)];
    let ported = ported
        .into_iter()
        .flat_map(|(chip, c)| c.iter().flat_map(move |c| c.drives.iter().map(move |d| (chip, d))));
    let floppy = config.floppies.iter().flatten().map(|d| (Chip::Floppy, d));
    let scsi = config.scsi.iter().flat_map(|scsi| scsi.drives.iter().map(|d| (Chip::Scsi(scsi.model), d)));
    ide.chain(ported)
        .chain(scsi)
        .chain(floppy)
        .map(|(chip, d)| ((chip, d.port, d.device), d.clone()))
        .collect()
}

fn set_limits(limits: &Limits, rates: &BTreeMap<String, u64>) {
    for (name, rate) in rates {
        limits.set(name, *rate);
    }
}

fn no_medium(place: &str) -> String {
    format!("the hard disk at {place} has no medium: attach one, or detach the drive")
}

/// What a disk tells about itself, as VirtualBox makes it from the medium's UUID.
fn identity(drive: &DriveConfig) -> DiskIdentity {
    let id = drive.medium.as_ref().map(|m| m.uuid.into_bytes()).unwrap_or_default();
    let word = |at: usize| u32::from_le_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]);
    DiskIdentity {
        non_rotational: drive.non_rotational,
        discard: drive.discard,
        // The first field of a UUID is big endian in its bytes.
        ..DiskIdentity::virtualbox(word(0).swap_bytes(), word(12))
    }
}

/// The images of a machine's drives while it is built.
pub struct Media {
    images: BTreeMap<Place, Arc<ImageDriver>>,
    ejected: Arc<Ejected>,
    keys: Arc<Keys>,
    limits: Arc<Limits>,
    between: Option<Between>,
}

impl Media {
    /// No media yet. `between` stands between them and their controllers; `rates` are those of the bandwidth groups of disks.
    pub fn new(between: Option<Between>, limits: &Arc<Limits>, rates: &BTreeMap<String, u64>) -> Self {
        set_limits(limits, rates);
        Self {
            images: BTreeMap::new(),
            ejected: Arc::default(),
            keys: Arc::default(),
            limits: limits.clone(),
            between,
        }
    }

    /// Whom controllers tell of ejected discs.
    pub fn ejected(&self) -> Arc<Ejected> {
        self.ejected.clone()
    }

    fn open(&mut self, chip: Chip, drive: &DriveConfig) -> anyhow::Result<Option<Arc<dyn BlockDriver>>> {
        let Some(medium) = &drive.medium else { return Ok(None) };
        let image = self.keys.open(medium, self.limits.get(&drive.bandwidth_group))?;
        self.images.insert((chip, drive.port, drive.device), image.clone());
        Ok(Some(match &self.between {
            Some(between) => between(image),
            None => image,
        }))
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
            places[usize::from(drive.port * 2 + drive.device)] = Some(self.disk_or_cd(Chip::Ide, drive)?);
        }
        Ok(places)
    }

    /// The ports of an AHCI controller, with their drives.
    pub fn ahci_ports(&mut self, config: &PortsConfig) -> anyhow::Result<Vec<PortSetup>> {
        let mut ports: Vec<PortSetup> = (0..config.ports.max(1)).map(|_| PortSetup::default()).collect();
        for drive in &config.drives {
            let port = Self::port(Chip::Ahci, config, drive)?;
            if let Some(port) = ports.get_mut(port) {
                port.drive = Some(self.disk_or_cd(Chip::Ahci, drive)?);
                port.hot_pluggable = drive.hot_pluggable;
            }
        }
        Ok(ports)
    }

    /// A drive's port, if the controller has it.
    fn port(chip: Chip, config: &PortsConfig, drive: &DriveConfig) -> anyhow::Result<usize> {
        if drive.port >= config.ports.max(1) || drive.device != 0 {
            anyhow::bail!(
                "{} port {} device {} does not exist: the controller has {} ports with one device each",
                chip.name(),
                drive.port,
                drive.device,
                config.ports
            );
        }
        Ok(usize::from(drive.port))
    }

    /// The namespaces of an NVMe controller by port.
    pub fn nvme_disks(&mut self, config: &PortsConfig) -> anyhow::Result<Vec<Option<nvme::Disk>>> {
        let mut disks: Vec<_> = (0..config.ports.max(1)).map(|_| None).collect();
        for drive in &config.drives {
            let port = Self::port(Chip::Nvme, config, drive)?;
            let medium = self.disk(Chip::Nvme, drive)?;
            let uuid = drive.medium.as_ref().map(|m| m.uuid.into_bytes()).unwrap_or_default();
            if let Some(place) = disks.get_mut(port) {
                *place = Some(nvme::Disk { medium, uuid, discard: drive.discard });
            }
        }
        Ok(disks)
    }

    /// The virtio disks with their ports.
    pub fn virtio_disks(&mut self, config: &PortsConfig) -> anyhow::Result<Vec<(u8, virtio_blk::Disk)>> {
        let disk = |drive: &DriveConfig| {
            Self::port(Chip::VirtioBlk, config, drive)?;
            let medium = self.disk(Chip::VirtioBlk, drive)?;
            let serial = identity(drive).serial;
            Ok((drive.port, virtio_blk::Disk { medium, serial, discard: drive.discard }))
        };
        config.drives.iter().map(disk).collect()
    }

    /// The medium of a disk at a controller that takes nothing else.
    fn disk(&mut self, chip: Chip, drive: &DriveConfig) -> anyhow::Result<Arc<dyn BlockDriver>> {
        let name = chip.name();
        let place = format!("{name} port {} device {}", drive.port, drive.device);
        if drive.kind != DriveKind::Disk {
            anyhow::bail!(
                "only hard disks can be attached to a {name} controller, and not what is at {place}"
            );
        }
        self.open(chip, drive)?.with_context(|| no_medium(&place))
    }

    /// Whom a SCSI controller tells of ejected discs.
    pub fn scsi_ejected(&self, model: ScsiModel) -> Arc<dyn scsi::EjectSink> {
        Arc::new(ScsiEjected { model, all: self.ejected.clone() })
    }

    /// The drives of a SCSI controller by target.
    pub fn scsi_drives(&mut self, config: &ScsiConfig) -> anyhow::Result<Vec<Option<Drive>>> {
        let places = match config.model {
            ScsiModel::BusLogic => buslogic::TARGETS,
            ScsiModel::LsiLogic => mpt::Model::SPI_TARGETS,
            ScsiModel::LsiLogicSas => (config.ports as usize).clamp(1, mpt::Model::SAS_PORTS),
            // The count is how many ports are in use; a guest finds as many targets as there can be.
            ScsiModel::Virtio => VirtioScsi::TARGETS,
        };
        let mut drives: Vec<Option<Drive>> = (0..places).map(|_| None).collect();
        let chip = Chip::Scsi(config.model);
        for drive in &config.drives {
            let Some(place) = drives.get_mut(usize::from(drive.port)).filter(|_| drive.device == 0) else {
                anyhow::bail!(
                    "{} port {} device {} does not exist: the controller has {places} ports with one device each",
                    chip.name(),
                    drive.port,
                    drive.device
                );
            };
            *place = Some(self.disk_or_cd(chip, drive)?);
        }
        Ok(drives)
    }

    /// A disk or CD drive, with its medium.
    fn disk_or_cd(&mut self, chip: Chip, drive: &DriveConfig) -> anyhow::Result<Drive> {
        let place = format!("{} port {} device {}", chip.name(), drive.port, drive.device);
        let cd = match chip {
            Chip::Ide => CdIdentity::virtualbox(u32::from(drive.port) * 2 + u32::from(drive.device)),
            _ => CdIdentity::virtualbox_ahci(drive.port.into()),
        };
        Ok(match (drive.kind, self.open(chip, drive)?) {
            (DriveKind::Disk, Some(medium)) => Drive::Disk { identity: identity(drive), medium },
            (DriveKind::Dvd, medium) => Drive::Cd { identity: cd, medium: medium.map(|m| m as _) },
            (DriveKind::Disk, None) => anyhow::bail!(no_medium(&place)),
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
            *place = Some(FloppyDrive { drive_type: DriveType::Mb1_44, medium: medium.map(|m| m as _) });
        }
        Ok(places)
    }

    /// The drives of the machine that was built from the configuration.
    pub fn finish(self, config: &MachineConfig, controllers: Controllers) -> Storage {
        let drives = Drives { configs: configs(config), images: self.images, untold: Vec::new() };
        Storage {
            controllers,
            drives: Mutex::new(drives),
            ejected: self.ejected,
            keys: self.keys,
            limits: self.limits,
        }
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
        self.settle_ejects(&mut drives);
        set_limits(&self.limits, &config.disk_limits);
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

    /// Another limit holds for a bandwidth group, of disks or of cards.
    pub fn set_limit(&self, group: &str, rate: u64) {
        self.limits.set(group, rate);
    }

    /// Whether the guest waits for a key. Waits for that at most for `time`.
    pub fn key_missing(&self, time: Duration) -> bool {
        self.keys.missing(time)
    }

    /// The images that the guest waits for until their passwords are given.
    pub fn waits_for_key(&self) -> bool {
        self.drives.lock().images.values().any(|image| image.is_wanted())
    }

    /// Keeps a password and unlocks the disks that it is for. Whether the guest, which had waited for one, can go on now.
    pub fn add_password(&self, id: &str, password: &str, clear_on_suspend: bool) -> Result<bool, KeyError> {
        let drives = self.drives.lock();
        let waited = drives.images.values().any(|image| image.is_wanted());
        self.keys.add(id, password, clear_on_suspend, drives.images.values())?;
        Ok(waited && drives.images.values().all(|image| image.is_open()))
    }

    /// Forgets the password with this id; whether there was one.
    pub fn remove_password(&self, id: &str) -> bool {
        self.keys.remove(id)
    }

    pub fn clear_passwords(&self) {
        self.keys.clear();
    }

    /// The machine is paused: passwords that are not to outlive that go, and so do the keys of their disks.
    pub fn suspended(&self) {
        self.keys.suspended(self.drives.lock().images.values());
    }

    /// Takes note of the discs that the guest has ejected, and closes their images.
    fn settle_ejects(&self, drives: &mut Drives) {
        for place in self.ejected.take() {
            if let Some(drive) = drives.configs.get_mut(&place) {
                drive.medium = None;
                drives.untold.push((drive.controller.clone(), drive.port, drive.device));
            }
            self.close(drives, place);
        }
    }

    /// The drives (controller, port, device) that the guest has emptied since the last call; waits for one at most for `time`.
    pub fn ejects(&self, time: Duration) -> Vec<(String, u8, u8)> {
        self.ejected.wait(time);
        let mut drives = self.drives.lock();
        self.settle_ejects(&mut drives);
        std::mem::take(&mut drives.untold)
    }

    /// Lets go of the image at `place`.
    fn close(&self, drives: &mut Drives, place: Place) {
        let Some(image) = drives.images.remove(&place) else { return };
        image.give_up();
        if let Err(error) = image.settle() {
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
        let limit = || self.limits.get(&new.bandwidth_group);
        let image = new.medium.as_ref().map(|medium| self.keys.open(medium, limit()));
        let image = image.transpose().map_err(ChangeError::Failed)?;
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
            (Chip::Scsi(model), Controllers { scsi, .. }) => {
                let Some(controller) = scsi.get(&model) else { return Err(ChangeError::NotWhileRunning) };
                controller.lock().set_medium(port, medium, force).map_err(|e| match e {
                    TargetError::Locked => ChangeError::Locked,
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
            // An eject before that is none of the new disc.
            drives.untold.retain(|told| *told != (new.controller.clone(), new.port, new.device));
        }
        drives.configs.insert(place, new);
        Ok(())
    }

    /// The SCSI controller of the model, if drives may come and go at it: the guest is told, as a bus without hot-plug could not.
    fn pluggable(&self, model: ScsiModel) -> Option<&Arc<Mutex<dyn scsi::Controller>>> {
        self.controllers
            .scsi
            .get(&model)
            .filter(|_| matches!(model, ScsiModel::LsiLogicSas | ScsiModel::Virtio))
    }

    fn unplug(&self, drives: &mut Drives, place: Place) -> Result<(), ChangeError> {
        let port = usize::from(place.1);
        match (place.0, &self.controllers.ahci) {
            (Chip::Ahci, Some(ahci)) => {
                ahci.lock().detach(port).map_err(|e| ChangeError::Failed(e.into()))?;
            }
            (Chip::Scsi(model), _) => {
                let controller = self.pluggable(model).ok_or(ChangeError::NotWhileRunning)?;
                controller.lock().detach(port).map_err(|e| ChangeError::Failed(e.into()))?;
            }
            _ => return Err(ChangeError::NotWhileRunning),
        }
        self.close(drives, place);
        drives.configs.remove(&place);
        tracing::info!(target: "storage", bus = place.0.name(), port, "a drive was unplugged");
        Ok(())
    }

    fn plug(&self, drives: &mut Drives, place: Place, new: DriveConfig) -> Result<(), ChangeError> {
        let port = usize::from(place.1);
        let mut media = Media { keys: self.keys.clone(), ..Media::new(None, &self.limits, &BTreeMap::new()) };
        let mut drive = || media.disk_or_cd(place.0, &new).map_err(ChangeError::Failed);
        match (place.0, &self.controllers.ahci) {
            (Chip::Ahci, Some(ahci)) => {
                let drive = drive()?;
                ahci.lock().attach(port, drive).map_err(|e| ChangeError::Failed(e.into()))?;
            }
            (Chip::Scsi(model), _) => {
                let controller = self.pluggable(model).ok_or(ChangeError::NotWhileRunning)?;
                let drive = drive()?;
                controller.lock().attach(port, drive).map_err(|e| ChangeError::Failed(e.into()))?;
            }
            _ => return Err(ChangeError::NotWhileRunning),
        }
        drives.images.append(&mut media.images);
        drives.configs.insert(place, new);
        tracing::info!(target: "storage", bus = place.0.name(), port, "a drive was plugged in");
        Ok(())
    }
}
