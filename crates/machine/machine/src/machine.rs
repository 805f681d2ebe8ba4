//! Builds the machine: the only place that names concrete devices and engines and wires them up.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cpum::{CpuidTable, VcpuLink};
use dev_apic::{Apic, ApicConfig};
use dev_pc::acpi_pm::{AcpiPm, SCI_IRQ};
use dev_pc::cpu_hotplug::{self, CpuHotplug};
use dev_pc::dma::Dma;
use dev_pc::fw_cfg::{self, FwCfg};
use dev_pc::hpet::Hpet;
use dev_pc::i440fx::I440Fx;
use dev_pc::i8042::I8042;
use dev_pc::piix3::{Piix3, Wiring};
use dev_pc::rtc::{self, CmosSetup};
use dev_pc::tables::acpi::AcpiConfig;
use dev_pc::tables::smbios::{Dmi, SmbiosConfig};
use dev_pc::{memory_map, pic::Pic, pit::Pit, rtc::Rtc, serial::Serial, tables};
use dev_storage::ahci::{self, Ahci};
use dev_storage::floppy::{self, DriveType, Floppy};
use dev_storage::ide::{self, Ide};
use dev_storage::nvme::{self, Nvme};
use dev_storage::scsi::buslogic::BusLogic;
use dev_storage::scsi::mpt::{self, Mpt};
use dev_storage::scsi::virtio::VirtioScsi;
use dev_storage::virtio_blk::{self, VirtioBlk};
use dev_video::vga::{self, Vga};
use dev_virtio_core::VirtioPci;
use em::{Em, VmContext};
use gim::Gim;
use parking_lot::Mutex;
use pdm::connector::{DisplayPort, Frame, KeyboardPort, MousePort, SystemControl, SystemRequest};
use pdm::pci::{DevFn, PciBus};
use pdm::{Device, Iom};
use pgm::{Backing, HostMemory, Layer, Pgm};
use tm::TimerQueue;
use vbox_types::{ByteSize, GuestPhys, Hz};

use crate::config::{BootDevice, DriveConfig, DriveKind, IdeModel, MachineConfig, PortsConfig, ScsiModel};
use crate::cpus::Cpus;
use crate::debugger::Connection;
use crate::engine::{Backend, Kind};
use crate::limit::Limits;
use crate::network::{self, Nic, NicConfig};
use crate::serial::CharBackend;
use crate::stam::Sample;
use crate::storage::{Controllers, Media, Storage};
use crate::{bios_log, bios_mends, firmware, host, hwvirt, option_rom};

/// The IDE controller is a function of the ISA bridge's device.
const IDE_PLACE: DevFn = DevFn::new(1, 1);
/// Where VirtualBox has its first AHCI controller.
const AHCI_PLACE: DevFn = DevFn::new(0x0d, 0);
/// Where VirtualBox has its NVMe controller.
const NVME_PLACE: DevFn = DevFn::new(0x0e, 0);
/// Where virtio disks begin, one slot each: places that VirtualBox leaves free.
const VIRTIO_BLK_FIRST: u8 = 0x17;
/// Where VirtualBox has its SCSI controllers.
const fn scsi_place(model: ScsiModel) -> DevFn {
    match model {
        ScsiModel::Virtio => DevFn::new(0x0f, 0),
        ScsiModel::LsiLogic => DevFn::new(0x14, 0),
        ScsiModel::BusLogic => DevFn::new(0x15, 0),
        ScsiModel::LsiLogicSas => DevFn::new(0x16, 0),
    }
}
/// Where VirtualBox has its display adapter.
const VGA_PLACE: DevFn = DevFn::new(2, 0);
/// The power management timer has 32 bits, so that guests read it without watching for its wrap every few seconds.
const WIDE_PM_TIMER: bool = true;
/// Milliseconds that the BIOS waits for a key when the boot menu is on.
const BOOT_MENU_WAIT: u16 = 500;

/// IA32_FEATURE_CONTROL as the BIOS leaves it: locked, VMX on outside of SMX.
const FEATURE_CONTROL: u64 = 1 << 0 | 1 << 2;

/// Crashes of the guest that wait to be told to clients.
const CRASHES: usize = 8;

/// A machine, assembled and not running yet.
pub struct Machine {
    folder: PathBuf,
    em: Arc<Em>,
    engine: Mutex<Kind>,
    /// The engine that the machine was built for: what its CPU shows is that engine's.
    built_for: Kind,
    /// The guest has virtualization itself, of which KVM alone knows the state.
    nested: bool,
    /// In the order of their reset.
    devices: Vec<Arc<Mutex<dyn Device>>>,
    pci: Arc<PciBus>,
    display: Arc<dyn DisplayPort>,
    keyboard: Arc<dyn KeyboardPort>,
    mouse: Arc<dyn MousePort>,
    acpi: Option<Arc<Mutex<AcpiPm>>>,
    storage: Storage,
    serial: Vec<Arc<CharBackend>>,
    nics: Vec<Nic>,
    cpus: Option<Cpus>,
    crashes: Mutex<Receiver<gim::Crash>>,
}

/// Leads the guest's requests to EM, which is built last.
#[derive(Default)]
struct Control {
    em: OnceLock<Weak<Em>>,
}

impl SystemControl for Control {
    fn request(&self, request: SystemRequest) {
        if let Some(em) = self.em.get().and_then(Weak::upgrade) {
            em.request(request);
        }
    }
}

impl Machine {
    /// Opens the images, reads the firmware, and wires everything up, with the engine that the settings name.
    pub fn build(config: &MachineConfig) -> Result<Arc<Self>> {
        Self::build_on(config, Backend::choose(config)?)
    }

    /// The same, with an engine of the caller's choice.
    pub fn build_on(config: &MachineConfig, backend: Backend) -> Result<Arc<Self>> {
        let links: Vec<_> = (0..config.cpus).map(|_| Arc::new(VcpuLink::default())).collect();
        let pgm = Pgm::new(links.clone());
        let iom = Iom::new();
        let clock = backend.clock();
        let timers = TimerQueue::new(clock.clone());
        let control = Arc::new(Control::default());
        let tsc = backend.tsc_frequency(config);
        let gim_setup = host::gim_setup(config, tsc, &backend);
        let nested = backend.nested(config)?;
        let cpuid = host::cpuid(config, &gim_setup, backend.features(), nested);
        let mut devices: Vec<Arc<Mutex<dyn Device>>> = Vec::new();

        // Memory.
        let ram = HostMemory::new("guest-ram", config.ram)
            .with_context(|| format!("cannot allocate {} of memory for the guest", config.ram))?;
        let ram = Arc::new(ram);
        tracing::info!(target: "pgm", "{}", hwvirt::large_pages(config.hw_virt.large_pages, &ram));
        let (low, high) = memory_map::split_ram(config.ram);
        pgm.map(GuestPhys(0), low, Layer::Ram, Backing::ram(ram.clone(), 0));
        if high > 0 {
            pgm.map(memory_map::HIGH_RAM, high, Layer::Ram, Backing::ram(ram.clone(), low));
        }
        let mut bios = firmware::read("bios-256k.bin", "seabios")?;
        let mended = bios_mends::mend(&mut bios);
        tracing::debug!(target: "main", mended, "known faults of the BIOS");
        let bios = rom("bios", &bios)?;
        let bios_base = GuestPhys((1 << 32) - bios.len());
        pgm.map(bios_base, bios.len(), Layer::Rom, Backing::rom(bios.clone(), 0));

        // Interrupts and chipset.
        let apic = Apic::new(
            ApicConfig {
                local_apic: config.ioapic,
                x2apic: config.x2apic,
                io_apic: config.ioapic,
                tsc_frequency: tsc,
            },
            &links,
            &timers,
        );
        apic.register(&pgm);
        let pic = Pic::new();
        pic.lock().connect_intr(apic.intr_line());
        Pic::register(&pic, &iom);
        apic.connect_pic(Pic::output(&pic));
        let wiring = Wiring::new(Pic::inputs(&pic), apic.io_apic());
        let pci = PciBus::new(iom.clone(), pgm.clone());
        pci.connect_msi(apic.clone());
        let bridge = I440Fx::new(&pci, &pgm, ram.clone(), bios);
        I440Fx::register(&bridge, &iom, &pci);
        let piix3 = Piix3::new(wiring.clone(), control.clone());
        Piix3::register(&piix3, &iom, &pci);
        devices.extend(apic.devices());
        devices.push(pic);
        devices.push(bridge);
        devices.push(piix3);

        // The chips of every PC.
        let pit = Pit::new(wiring.isa(0), &timers);
        Pit::register(&pit, &iom);
        devices.push(pit);
        let cmos = CmosSetup {
            low_memory: ByteSize(low),
            high_memory: ByteSize(high),
            cpus: config.cpus as u8,
            boot: first_three(&config.boot_order),
            floppies: floppy_types(config),
        };
        let rtc = Rtc::new(wiring.isa(8), &timers, &backend.wall_clock(config), &cmos);
        Rtc::register(&rtc, &iom);
        devices.push(rtc.clone());
        let dma = Dma::new(pgm.clone());
        Dma::register(&dma, &iom);
        devices.push(dma.clone());
        let i8042 = I8042::new(wiring.isa(1), wiring.isa(12), pgm.clone(), control.clone());
        I8042::register(&i8042, &iom);
        let (keyboard, mouse) = (I8042::keyboard(&i8042), I8042::mouse(&i8042));
        devices.push(i8042);
        let mut serial = Vec::new();
        for uart in &config.uarts {
            let device = Serial::new(uart.io_base, wiring.isa(uart.irq), &timers, false);
            Serial::register(&device, &iom);
            if let Some(backend) = CharBackend::open(&uart.mode)? {
                device.lock().connect(Some(backend.clone()));
                backend.attach(Serial::port(&device));
                serial.push(backend);
            }
            devices.push(device);
        }
        if config.hpet {
            let hpet = Hpet::new(&wiring, &timers);
            Hpet::register(&hpet, &pgm);
            devices.push(hpet);
        }

        // Display.
        let vga = Vga::new(config.vram, clock.clone()).context("cannot allocate the video memory")?;
        Vga::register(&vga, &iom, &pgm, &pci, VGA_PLACE);
        let display = Vga::display(&vga);
        devices.push(vga);

        // Storage.
        let limits = Limits::new(&timers);
        let mut media = Media::new(backend.between(), &limits, &config.disk_limits);
        let mut controllers = Controllers::default();
        if let Some((model, drives)) = &config.ide {
            let ide_wiring = ide::Wiring {
                pgm: pgm.clone(),
                irqs: [wiring.isa(14), wiring.isa(15)],
                ejected: Some(media.ejected()),
            };
            let ide = Ide::new(ide_model(*model), ide_wiring, media.ide_drives(drives)?);
            Ide::register(&ide, &iom, &pci, IDE_PLACE);
            controllers.ide = Some(ide.clone());
            devices.push(ide);
        }
        if let Some(ahci_config) = &config.ahci {
            let ahci_wiring = ahci::Wiring {
                pgm: pgm.clone(),
                irq: wiring.intx(AHCI_PLACE, 1),
                ejected: Some(media.ejected()),
            };
            let ahci = Ahci::new(ahci_wiring, media.ahci_ports(ahci_config)?);
            Ahci::register(&ahci, &pci, AHCI_PLACE);
            controllers.ahci = Some(ahci.clone());
            devices.push(ahci);
        }
        if let Some(nvme_config) = &config.nvme {
            let nvme_wiring = nvme::Wiring { pgm: pgm.clone(), irq: wiring.intx(NVME_PLACE, 1) };
            let nvme = Nvme::new(nvme_wiring, media.nvme_disks(nvme_config)?);
            Nvme::register(&nvme, &pci, NVME_PLACE);
            devices.push(nvme);
        }
        if let Some(blk_config) = &config.virtio_blk {
            for (port, disk) in media.virtio_disks(blk_config)? {
                let place = virtio_blk_place(port);
                let blk_wiring = dev_virtio_core::Wiring { pgm: pgm.clone(), irq: wiring.intx(place, 1) };
                let disk = VirtioBlk::create(disk, blk_wiring);
                virtio_blk::Card::register(&disk, &pci, place);
                devices.push(disk);
            }
        }
        for scsi in &config.scsi {
            let place = scsi_place(scsi.model);
            let irq = wiring.intx(place, 1);
            let ejected = Some(media.scsi_ejected(scsi.model));
            let drives = media.scsi_drives(scsi)?;
            let model = match scsi.model {
                ScsiModel::Virtio => {
                    let virtio_wiring = dev_virtio_core::Wiring { pgm: pgm.clone(), irq };
                    let card = VirtioScsi::create(virtio_wiring, drives, ejected);
                    VirtioPci::register(&card, &pci, place);
                    controllers.scsi.insert(scsi.model, card.clone());
                    devices.push(card);
                    continue;
                }
                ScsiModel::BusLogic => {
                    let card = BusLogic::new(mpt::Wiring { pgm: pgm.clone(), irq, ejected }, drives);
                    BusLogic::register(&card, &pci, place);
                    controllers.scsi.insert(scsi.model, card.clone());
                    devices.push(card);
                    continue;
                }
                ScsiModel::LsiLogic => mpt::Model::Spi,
                ScsiModel::LsiLogicSas => mpt::Model::Sas,
            };
            let mpt = Mpt::new(model, mpt::Wiring { pgm: pgm.clone(), irq, ejected }, drives);
            Mpt::register(&mpt, &pci, place);
            controllers.scsi.insert(scsi.model, mpt.clone());
            devices.push(mpt);
        }
        if let Some(drives) = &config.floppies {
            let floppy_wiring = floppy::Wiring { irq: wiring.isa(6), dma: Dma::channels(&dma) };
            let floppy = Floppy::new(floppy_wiring, media.floppy_drives(drives)?);
            Floppy::register(&floppy, &iom);
            controllers.floppy = Some(floppy.clone());
            devices.push(floppy);
        }

        // Network.
        let nic_wiring = network::Wiring {
            pgm: &pgm,
            iom: &iom,
            irqs: &wiring,
            timers: &timers,
            limits: &limits,
            pci: &pci,
        };
        let (nics, cards) = network::build(&config.nics, &nic_wiring)?;
        devices.extend(cards);

        bios_log::register(&iom);

        // Firmware: power management, tables, boot order.
        let fw_cfg = FwCfg::new(&pgm);
        FwCfg::register(&fw_cfg, &iom);
        let (mut acpi, mut cpu_hotplug) = (None, None);
        {
            let mut store = fw_cfg.lock();
            store.add_machine(config.cpus as u16, config.ram);
            store.add_boot(
                &boot_list(config),
                config.boot_menu,
                if config.boot_menu { BOOT_MENU_WAIT } else { 0 },
            );
            // Named after the PCI function and with its identity inside, so that the VGA BIOS learns where the adapter is
            // and finds its frame buffer.
            let mut vga_bios = firmware::read("vgabios-stdvga.bin", "seabios")?;
            option_rom::adopt(&mut vga_bios, vga::VENDOR, vga::DEVICE)
                .context("cannot use vgabios-stdvga.bin")?;
            store.add_file(&rom_file(vga::VENDOR, vga::DEVICE), vga_bios);
            add_boot_roms(&mut store, config);
            if cpuid.has(cpum::cpuid::bit::VMX) {
                // The BIOS switches VT-x on, as those of real machines do.
                store.add_file("etc/msr_feature_control", FEATURE_CONTROL.to_le_bytes().to_vec());
            }
            if config.acpi {
                let pm = AcpiPm::new(&iom, wiring.isa(SCI_IRQ), control.clone(), &timers, WIDE_PM_TIMER);
                AcpiPm::register(&pm, &iom, &pci);
                devices.push(pm.clone());
                if let Some(present) = config.hotplug {
                    let device = CpuHotplug::new(AcpiPm::events(&pm, cpu_hotplug::EVENT), present);
                    CpuHotplug::register(&device, &iom);
                    devices.push(device.clone());
                    cpu_hotplug = Some(device);
                }
                acpi = Some(pm);
                tables::add_acpi(&mut store, &acpi_config(config, low));
            }
            tables::add_smbios(&mut store, &smbios_config(config, &cpuid, tsc));
        }
        devices.push(fw_cfg.clone());

        // Paravirtualization.
        let (crashed, crashes) = sync_channel(CRASHES);
        let debugger =
            host::hyperv_debug(config).map(|debug| Connection::open(debug.debugger)).transpose()?;
        let gim_wiring = gim::Wiring {
            pgm: pgm.clone(),
            clock: clock.clone(),
            links: links.clone(),
            utc: Box::new(host::utc(config)),
            control: control.clone(),
            amd: host::is_amd(&cpuid),
            // Where nobody asks they are in VBox.log all the same.
            crashed: Box::new(move |crash| {
                let _ = crashed.try_send(*crash);
            }),
            stolen: (backend.kind() != Kind::Kvm).then(|| Box::new(host::stolen) as Box<_>),
            debugger: debugger.clone().map(|debugger| debugger as Arc<_>),
        };
        let gim = Gim::new(&gim_setup, gim_wiring);
        if let (Some(debugger), Some(gim)) = (&debugger, &gim) {
            let gim = Arc::downgrade(gim);
            debugger.listen(move || {
                if let Some(gim) = gim.upgrade() {
                    gim.debugger_spoke();
                }
            })?;
        }
        devices.extend(gim.as_ref().map(Gim::device));
        let gim = gim.map(|gim| gim as Arc<dyn em::Gim>);

        // CPUs.
        let context =
            Arc::new(VmContext { pgm, iom, irq: apic, clock, tsc_frequency: tsc, cpuid, links, gim });
        let (engine, described) = (backend.kind(), backend.describe());
        let engines = backend.engines(&context, &timers)?;
        let em = Em::new(context, engines, timers);
        em.set_execution_cap(config.execution_cap).context("cannot start the thread of the execution cap")?;
        em.set_triple_fault_reset(config.triple_fault_reset && config.cpus == 1);
        let _ = control.em.set(Arc::downgrade(&em));
        let cpus =
            cpu_hotplug.map(|device| Cpus::new(em.clone(), rtc, fw_cfg, device, acpi_config(config, low)));
        let machine = Arc::new(Self {
            folder: config.folder.clone(),
            em,
            engine: Mutex::new(engine),
            built_for: engine,
            nested: nested.is_some(),
            devices,
            pci,
            display,
            keyboard,
            mouse,
            acpi,
            storage: media.finish(config, controllers),
            serial,
            nics,
            cpus,
            crashes: Mutex::new(crashes),
        });
        machine.reset_devices();
        machine.log(config, tsc, &described);
        if let Some(nested) = nested {
            tracing::info!(target: "hm", "nested hardware virtualization: the guest has {} (--nested-hw-virt)", nested.name);
        }
        Ok(machine)
    }

    fn log(&self, config: &MachineConfig, tsc: Hz, engine: &str) {
        tracing::info!(target: "em", "engine: {engine}");
        for line in hwvirt::describe(self.engine(), &config.hw_virt) {
            tracing::info!(target: "hm", "{line}");
        }
        tracing::info!(target: "cpum", "{} vCPUs, time-stamp counter {tsc}", config.cpus);
        if let Some(profile) = config.cpu_profile {
            tracing::info!(target: "cpum", "CPU profile: {}", profile.name);
        }
        tracing::info!(target: "gim", "paravirtualization provider: {}", config.paravirt.name());
        match (config.hyperv_debug, host::hyperv_debug(config)) {
            (_, Some(found)) => {
                tracing::info!(target: "gim", "HyperV: the guest finds a kernel debugger at {} (UDP)", found.debugger);
            }
            (Some(_), None) => tracing::warn!(
                target: "gim",
                "HyperV: the guest finds no kernel debugger: it looks for one with the vendor \"Microsoft Hv\" only (--paravirt-debug)"
            ),
            (None, None) => {}
        }
        tracing::info!(target: "pgm", "{} MiB of RAM, {} MiB of video memory", config.ram.0 >> 20, config.vram.0 >> 20);
        for (at, name) in self.pci.list() {
            tracing::info!(target: "pdm", "PCI 00:{:02x}.{} {name}", at.device(), at.function());
        }
    }

    /// The machine's folder, in which relative paths of its settings begin.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What guest code runs on.
    pub fn engine(&self) -> Kind {
        *self.engine.lock()
    }

    /// Has another engine go on with the guest where it is. To KVM only goes what began there: the guest knows that CPU and its counter.
    pub fn change_engine(&self, kind: Kind) -> Result<()> {
        let mut engine = self.engine.lock();
        if *engine == kind {
            return Ok(());
        }
        anyhow::ensure!(
            kind != Kind::Kvm || self.built_for == Kind::Kvm,
            "a machine that did not start under KVM cannot go on there; start it with --vm-execution-engine hwvirt"
        );
        anyhow::ensure!(
            !self.nested,
            "a guest that has hardware virtualization itself cannot leave KVM, which alone knows the state of its virtual machines; use \
             --nested-hw-virt off"
        );
        let backend = Backend::of(kind)?;
        let described = backend.describe();
        self.em.change_engines(|context, timers| backend.engines(context, timers))?;
        tracing::info!(target: "em", "the guest goes on under another engine: {described}");
        *engine = kind;
        Ok(())
    }

    pub fn em(&self) -> &Arc<Em> {
        &self.em
    }

    /// Brings every device to its state after reset. All vCPUs are stopped.
    pub fn reset_devices(&self) {
        self.pci.reset();
        for device in &self.devices {
            device.lock().reset();
        }
        self.em.switch_absent_off();
    }

    /// Makes what the guest wrote durable and closes the back ends. The vCPUs have ended.
    pub fn close(&self) -> Result<()> {
        for nic in &self.nics {
            nic.close();
        }
        for backend in &self.serial {
            backend.close();
        }
        self.storage.settle()
    }

    /// The drives.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Joins the cards to the networks that machines share.
    pub fn connect_networks(&self, networks: &Arc<dyn network::Networks>) -> Result<()> {
        self.nics.iter().try_for_each(|nic| nic.connect_networks(networks))
    }

    /// The CPUs, where they come and go.
    pub fn cpus(&self) -> Option<&Cpus> {
        self.cpus.as_ref()
    }

    /// How the guest says that it has crashed; waits for it at most for `time`. Disconnected where it has no way to say so.
    pub fn guest_crash(&self, time: Duration) -> Result<gim::Crash, RecvTimeoutError> {
        self.crashes.lock().recv_timeout(time)
    }

    /// The network cards.
    pub fn nics(&self) -> &[Nic] {
        &self.nics
    }

    /// Presses the ACPI power button; false if the machine has none.
    pub fn press_power_button(&self) -> bool {
        self.acpi.as_ref().inspect(|pm| pm.lock().press_power_button()).is_some()
    }

    /// Presses the ACPI sleep button; false if the machine has none.
    pub fn press_sleep_button(&self) -> bool {
        self.acpi.as_ref().inspect(|pm| pm.lock().press_sleep_button()).is_some()
    }

    /// Whether the guest has acknowledged the last press of the power button.
    pub fn power_button_handled(&self) -> bool {
        self.acpi.as_ref().is_some_and(|pm| pm.lock().power_button_handled())
    }

    /// Whether the guest has switched ACPI on.
    pub fn acpi_enabled(&self) -> bool {
        self.acpi.as_ref().is_some_and(|pm| pm.lock().is_acpi_mode())
    }

    /// Types set-1 scan codes; returns how many fitted.
    pub fn put_scancodes(&self, codes: &[u8]) -> usize {
        self.keyboard.put_scancodes(codes)
    }

    pub fn put_mouse_event(&self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        self.mouse.put_event(dx, dy, dz, buttons);
    }

    /// What the screen shows.
    pub fn frame(&self) -> Frame {
        self.display.frame()
    }

    /// Sends a non-maskable interrupt to every virtual CPU.
    pub fn inject_nmi(&self) {
        self.em.inject_nmi();
    }

    /// What is counted.
    pub fn statistics(&self) -> Vec<Sample> {
        let engines = self.em.statistics();
        engines
            .into_iter()
            .enumerate()
            .flat_map(|(cpu, counters)| counters.into_iter().map(move |c| Sample::of_engine(cpu, c)))
            .collect()
    }
}

/// The fw_cfg file from which SeaBIOS takes the option ROM of a PCI device.
fn rom_file(vendor: u16, device: u16) -> String {
    format!("pci{vendor:04x},{device:04x}.rom")
}

/// Gives the firmware the boot ROMs of the network cards, if it is to boot from them. One that is missing or of no use does not keep
/// the machine from booting from elsewhere.
fn add_boot_roms(store: &mut FwCfg, config: &MachineConfig) {
    if !config.boot_order.contains(&BootDevice::Network) {
        return;
    }
    for network::BootRom { image, vendor, device } in
        config.nics.iter().filter_map(|nic| nic.model.boot_rom())
    {
        let rom = firmware::read(image, "ipxe-qemu").and_then(|mut rom| {
            option_rom::adopt(&mut rom, vendor, device)?;
            Ok(rom)
        });
        match rom {
            Ok(rom) => store.add_file(&rom_file(vendor, device), rom),
            Err(error) => tracing::warn!(target: "main", "no booting from the network: {error:#}"),
        }
    }
}

/// Read-only memory with `image` in it.
fn rom(name: &'static str, image: &[u8]) -> Result<Arc<HostMemory>> {
    let memory = HostMemory::new(name, ByteSize(image.len() as u64))?;
    if memory.len() != image.len() as u64 {
        bail!("the firmware image has a size of {} bytes, which is not a multiple of 4096", image.len());
    }
    memory.write(0, image);
    Ok(Arc::new(memory))
}

fn ide_model(model: IdeModel) -> ide::Model {
    match model {
        IdeModel::Piix3 => ide::Model::Piix3,
        IdeModel::Piix4 => ide::Model::Piix4,
        IdeModel::Ich6 => ide::Model::Ich6,
    }
}

/// Where the virtio disk of a port is.
fn virtio_blk_place(port: u8) -> DevFn {
    DevFn::new(VIRTIO_BLK_FIRST + port, 0)
}

/// The drives of `kind` in the order of their places, as the BIOS names them: IDE before AHCI before the others.
fn bootable(config: &MachineConfig, kind: DriveKind) -> impl Iterator<Item = fw_cfg::BootDevice> {
    let places = move |drives: &[DriveConfig]| {
        let mut places: Vec<(u8, u8)> =
            drives.iter().filter(|d| d.kind == kind && d.bootable).map(|d| (d.port, d.device)).collect();
        places.sort_unstable();
        places
    };
    let ported =
        |controller: &Option<PortsConfig>| controller.as_ref().map(|c| places(&c.drives)).unwrap_or_default();
    let ide = config.ide.as_ref().map(|(_, drives)| places(drives)).unwrap_or_default();
    let (ahci, nvme, virtio) = (ported(&config.ahci), ported(&config.nvme), ported(&config.virtio_blk));
    // SeaBIOS starts from an NVMe controller's first namespace.
    let nvme = nvme.into_iter().take(1);
    let scsi = config.scsi.iter().flat_map(move |scsi| {
        let slot = scsi_place(scsi.model).device();
        places(&scsi.drives).into_iter().map(move |(target, _)| fw_cfg::BootDevice::Scsi { slot, target })
    });
    ide.into_iter()
        .map(|(channel, device)| fw_cfg::BootDevice::Ide { channel, device })
        .chain(ahci.into_iter().map(|(port, _)| fw_cfg::BootDevice::Ahci { slot: AHCI_PLACE.device(), port }))
        .chain(nvme.map(|_| fw_cfg::BootDevice::Pci { slot: NVME_PLACE.device() }))
        .chain(
            virtio
                .into_iter()
                .map(|(port, _)| fw_cfg::BootDevice::Pci { slot: virtio_blk_place(port).device() }),
        )
        .chain(scsi)
}

/// The boot order, device by device.
fn boot_list(config: &MachineConfig) -> Vec<fw_cfg::BootDevice> {
    let mut list = Vec::new();
    for device in config.boot_order {
        match device {
            BootDevice::None => {}
            BootDevice::Network => {
                let nics = network::boot_order(&config.nics).into_iter();
                list.extend(
                    nics.filter_map(NicConfig::place)
                        .map(|place| fw_cfg::BootDevice::Network { slot: place.device() }),
                );
            }
            BootDevice::Floppy => {
                let count = config.floppies.as_ref().map_or(0, |drives| drives.len().min(2));
                list.extend((0..count as u8).map(fw_cfg::BootDevice::Floppy));
            }
            BootDevice::Dvd => list.extend(bootable(config, DriveKind::Dvd)),
            BootDevice::Disk => list.extend(bootable(config, DriveKind::Disk)),
        }
    }
    list
}

/// The first three boot devices as CMOS has them.
fn first_three(order: &[BootDevice; 4]) -> [rtc::BootDevice; 3] {
    std::array::from_fn(|i| match order[i] {
        BootDevice::None => rtc::BootDevice::None,
        BootDevice::Floppy => rtc::BootDevice::Floppy,
        BootDevice::Dvd => rtc::BootDevice::Optical,
        BootDevice::Disk => rtc::BootDevice::Disk,
        BootDevice::Network => rtc::BootDevice::Network,
    })
}

/// CMOS type bytes of the floppy drives: 1.44 MB ones.
fn floppy_types(config: &MachineConfig) -> [u8; 2] {
    let has = |n| config.floppies.iter().flatten().any(|d| d.device == n);
    [0, 1].map(|n| if has(n) { DriveType::Mb1_44 as u8 } else { 0 })
}

fn acpi_config(config: &MachineConfig, low_ram_end: u64) -> AcpiConfig {
    AcpiConfig {
        cpus: config.cpus,
        hotplug: config.hotplug,
        io_apic: config.ioapic,
        hpet: config.hpet,
        wide_timer: WIDE_PM_TIMER,
        low_ram_end,
        serial: config.uarts.iter().map(|u| (u.io_base.0, u.irq)).collect(),
        floppy: config.floppies.is_some(),
    }
}

fn smbios_config(config: &MachineConfig, cpuid: &CpuidTable, tsc: Hz) -> SmbiosConfig {
    let leaf = cpuid.raw(1, 0);
    SmbiosConfig {
        uuid: config.uuid.into_bytes(),
        cpus: config.cpus,
        processor_id: [leaf.eax, leaf.edx],
        mhz: u16::try_from(tsc.0 / 1_000_000).unwrap_or(u16::MAX),
        ram: config.ram,
        dmi: dmi(config),
    }
}

/// The SMBIOS texts: VirtualBox's, where the user has not set others.
fn dmi(config: &MachineConfig) -> Dmi {
    let mut dmi = Dmi::default();
    for (name, text) in &config.dmi {
        let field = match name.as_str() {
            "DmiBIOSVendor" => &mut dmi.bios_vendor,
            "DmiBIOSVersion" => &mut dmi.bios_version,
            "DmiBIOSReleaseDate" => &mut dmi.bios_release_date,
            "DmiSystemVendor" => &mut dmi.system_vendor,
            "DmiSystemProduct" => &mut dmi.system_product,
            "DmiSystemVersion" => &mut dmi.system_version,
            "DmiSystemSerial" => &mut dmi.system_serial,
            "DmiSystemSKU" => &mut dmi.system_sku,
            "DmiSystemFamily" => &mut dmi.system_family,
            "DmiBoardVendor" => &mut dmi.board_vendor,
            "DmiBoardProduct" => &mut dmi.board_product,
            "DmiBoardVersion" => &mut dmi.board_version,
            "DmiBoardSerial" => &mut dmi.board_serial,
            "DmiBoardAssetTag" => &mut dmi.board_asset_tag,
            "DmiBoardLocInChass" => &mut dmi.board_loc_in_chass,
            "DmiChassisVendor" => &mut dmi.chassis_vendor,
            "DmiChassisVersion" => &mut dmi.chassis_version,
            "DmiChassisSerial" => &mut dmi.chassis_serial,
            "DmiChassisAssetTag" => &mut dmi.chassis_asset_tag,
            "DmiProcManufacturer" => &mut dmi.proc_manufacturer,
            "DmiProcVersion" => &mut dmi.proc_version,
            "DmiOEMVBoxVer" => &mut dmi.oem_vbox_ver,
            "DmiOEMVBoxRev" => &mut dmi.oem_vbox_rev,
            _ => {
                dmi.system_uuid =
                    text.parse::<uuid::Uuid>().ok().map(uuid::Uuid::into_bytes).or(dmi.system_uuid);
                continue;
            }
        };
        // VirtualBox's word for "no text at all".
        *field = if text == "<EMPTY>" { String::new() } else { text.clone() };
    }
    dmi
}
