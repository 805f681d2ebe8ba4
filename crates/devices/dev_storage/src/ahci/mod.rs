//! The AHCI controller of the ICH8M south bridge (8086:2829), as VirtualBox has it: up to 30 ports with a disk or CD drive each, 32
//! command slots, native command queuing, registers behind BAR 5, interrupts by INTA#. Sources: Serial ATA AHCI 1.1, Serial ATA 2.6,
//! ATA/ATAPI-7.
//!
//! **Left out.** Message-signalled interrupts, command completion coalescing (which VirtualBox offers), the index/data pair and the
//! legacy IDE ports in BARs 0 to 4: the capabilities do not show them. Power states of the interface do not exist. The bus-master
//! enable bit of the PCI command register is not looked at, as in VirtualBox.
//!
//! **Asynchrony.** Commands complete when the medium has answered. A reset of port or controller drops the answers of requests under
//! way; the next request waits until they have come, so that an abandoned write cannot overtake a later one.
//!
//! **Saved state.** Saving requires that all requests have completed (the machine stops the vCPUs and drains its media first).

mod port;
mod saved;
mod spec;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{BlockError, BlockOp, Medium};
use pdm::iom::mmio_handler;
use pdm::irq::IrqLine;
use pdm::pci::{self, Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, MmioDevice, Width};
use pgm::{Backing, Pgm};

use crate::ide::Drive;
use crate::ide::channel::{DriveKind, Request, SECTOR};
use crate::scsi::cd::CdMedium;
use port::{Ask, Owner, Port};
use spec::{ABAR_SIZE, Ghc, MAX_PORTS, PORT_SIZE, PORTS_AT, hba};

/// What a port is built with.
#[derive(Default)]
pub struct PortSetup {
    pub drive: Option<Drive>,
    /// Tell the guest that drives may come and go while it runs.
    pub hot_pluggable: bool,
}

/// Told when a guest ejects a disc. Called with the controller's lock held: it may only queue.
pub trait EjectSink: Send + Sync {
    /// The medium of the drive at `port` has been let go.
    fn ejected(&self, port: usize);
}

/// What the controller is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    /// INTA# of the controller's slot.
    pub irq: IrqLine,
    pub ejected: Option<Arc<dyn EjectSink>>,
}

/// Why a drive or disc cannot be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    #[error("the AHCI controller has no port {0}")]
    NoPort(usize),
    #[error("there is no CD drive at AHCI port {0}")]
    NoDrive(usize),
    #[error("AHCI port {0} has a drive already")]
    Taken(usize),
    #[error("the guest has locked the disc in the drive")]
    Locked,
}

/// One AHCI controller.
pub struct Ahci {
    wiring: Wiring,
    me: Weak<Mutex<Self>>,
    media: Vec<Medium>,
    ports: Vec<Port>,
    ghc: Ghc,
    /// Ports with an interrupt, until software writes the bits.
    is: u32,
    /// The guest uses other means than INTA#.
    intx_disabled: bool,
    level: bool,
}

fn split(drive: Option<Drive>) -> (Option<DriveKind>, Medium) {
    match drive {
        None => (None, None),
        Some(Drive::Disk { identity, medium }) => {
            let sectors = medium.size().0 / SECTOR;
            let read_only = medium.is_read_only();
            (Some(DriveKind::Disk { identity, sectors, read_only }), Some(medium))
        }
        Some(Drive::Cd { identity, medium }) => {
            (Some(DriveKind::Cd { identity, medium: CdMedium::of(&medium) }), medium)
        }
    }
}

impl Ahci {
    /// Builds a controller with its ports.
    ///
    /// # Panics
    /// Unless there are 1 to 30 ports.
    pub fn new(wiring: Wiring, setup: Vec<PortSetup>) -> Arc<Mutex<Self>> {
        assert!((1..=MAX_PORTS).contains(&setup.len()), "{} AHCI ports", setup.len());
        let (mut media, mut ports) = (Vec::new(), Vec::new());
        for PortSetup { drive, hot_pluggable } in setup {
            let (kind, medium) = split(drive);
            media.push(medium);
            ports.push(Port::new(kind, hot_pluggable));
        }
        Arc::new_cyclic(|me| {
            Mutex::new(Self {
                wiring,
                me: me.clone(),
                media,
                ports,
                ghc: Ghc::new().with_ae(true),
                is: 0,
                intx_disabled: false,
                level: false,
            })
        })
    }

    /// Plugs the controller into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x2829,
            revision: 2,
            // Serial ATA controller with AHCI registers.
            class: [0x01, 0x06, 0x01],
            interrupt_pin: 1,
            ..Identity::default()
        });
        // Power management: nothing but D0.
        space.add_capability(0x70, 0x01, &[0x03, 0x00, 0, 0, 0, 0]);
        let backing = Backing::mmio(mmio_handler(this, 0));
        let bar = Bar::Memory { size: ABAR_SIZE, prefetchable: false, wide: false, backing };
        bus.add(at, "ahci", space, vec![(5, bar)], this.clone());
    }

    /// Puts another disc into a CD drive, or takes it out. Unless `force`, a disc the guest has locked stays, and the guest is
    /// told that somebody pressed the eject button.
    pub fn set_medium(&mut self, port: usize, medium: Medium, force: bool) -> Result<(), PortError> {
        let channel = &mut self.ports.get_mut(port).ok_or(PortError::NoPort(port))?.channel;
        let Some(DriveKind::Cd { medium: present, .. }) = &channel.kinds[0] else {
            return Err(PortError::NoDrive(port));
        };
        if present.is_some() && channel.state.drives[0].cd.locked && !force {
            channel.cd_eject_request(0);
            return Err(PortError::Locked);
        }
        channel.cd_medium_changed(0, CdMedium::of(&medium));
        self.media[port] = medium;
        Ok(())
    }

    /// Plugs a drive into an empty port.
    pub fn attach(&mut self, port: usize, drive: Drive) -> Result<(), PortError> {
        let slot = self.ports.get_mut(port).ok_or(PortError::NoPort(port))?;
        if slot.is_present() {
            return Err(PortError::Taken(port));
        }
        let (kind, medium) = split(Some(drive));
        self.media[port] = medium;
        slot.plug(&self.wiring.pgm, kind);
        self.sync(port);
        Ok(())
    }

    /// Pulls the drive out of a port. Requests under way reach its medium still; nobody waits for them.
    pub fn detach(&mut self, port: usize) -> Result<(), PortError> {
        let slot = self.ports.get_mut(port).ok_or(PortError::NoPort(port))?;
        if slot.is_present() {
            slot.plug(&self.wiring.pgm, None);
            self.media[port] = None;
            self.sync(port);
        }
        Ok(())
    }

    /// Whether no request is with a medium.
    pub fn is_idle(&self) -> bool {
        self.ports.iter().all(|port| port.in_flight == 0)
    }

    /// Carries on after anything has changed at a port: requests, interrupt.
    fn sync(&mut self, number: usize) {
        let mut asked = Vec::new();
        self.ports[number].run(&self.wiring.pgm, &mut asked);
        self.carry_on(number, asked);
    }

    /// Hands requests to the medium, and what follows from those that it cannot take.
    fn carry_on(&mut self, number: usize, mut asked: Vec<Ask>) {
        while !asked.is_empty() {
            for ask in std::mem::take(&mut asked) {
                if let Some(Ask { owner, generation, .. }) = self.submit(number, ask) {
                    let port = &mut self.ports[number];
                    port.completed(&self.wiring.pgm, owner, generation, Err(()), &mut asked);
                }
            }
            self.ports[number].run(&self.wiring.pgm, &mut asked);
        }
        if self.ports[number].channel.cd_ejected(0) {
            self.media[number] = None;
            self.ports[number].channel.cd_medium_changed(0, None);
            if let Some(sink) = &self.wiring.ejected {
                sink.ejected(number);
            }
        }
        self.update_interrupt();
    }

    /// Gives the request back if there is no medium.
    fn submit(&mut self, number: usize, ask: Ask) -> Option<Ask> {
        let Some(medium) = self.media[number].clone() else { return Some(ask) };
        let Ask { owner, generation, request } = ask;
        let me = self.me.clone();
        let op = match request {
            Request::Read { offset, buffer } => BlockOp::Read { offset, buffer },
            Request::Write { offset, buffer } => BlockOp::Write { offset, buffer },
            Request::Flush => BlockOp::Flush,
            Request::Discard { offset, len } => BlockOp::Discard { offset, len },
        };
        medium.submit(
            op,
            Box::new(move |result| {
                if let Some(me) = me.upgrade() {
                    me.lock().answered(number, owner, generation, result);
                }
            }),
        );
        None
    }

    fn answered(
        &mut self,
        number: usize,
        owner: Owner,
        generation: u64,
        result: Result<Vec<u8>, BlockError>,
    ) {
        if let Err(error) = &result {
            tracing::warn!(target: "ahci", port = number, %error, "the medium failed a request");
        }
        let mut asked = Vec::new();
        let port = &mut self.ports[number];
        port.completed(&self.wiring.pgm, owner, generation, result.map_err(|_| ()), &mut asked);
        port.run(&self.wiring.pgm, &mut asked);
        self.carry_on(number, asked);
    }

    fn update_interrupt(&mut self) {
        for (number, port) in self.ports.iter().enumerate() {
            if port.interrupts() & port.regs.ie != 0 {
                self.is |= 1 << number;
            }
        }
        let level = self.ghc.ie() && self.is != 0 && !self.intx_disabled;
        if level != self.level {
            self.level = level;
            self.wiring.irq.set(level);
        }
    }

    fn read_register(&self, at: u32) -> u32 {
        match at {
            hba::CAP => hba::CAPABILITIES | (self.ports.len() as u32 - 1),
            hba::GHC => self.ghc.into(),
            hba::IS => self.is,
            hba::PI => (1 << self.ports.len()) - 1,
            hba::VS => hba::VERSION,
            PORTS_AT.. => {
                let at = at - PORTS_AT;
                self.ports.get((at / PORT_SIZE) as usize).map_or(0, |port| port.read(at % PORT_SIZE))
            }
            _ => 0,
        }
    }

    /// Writes the bits of `mask` of the register at `at`.
    fn write_register(&mut self, at: u32, value: u32, mask: u32) {
        match at {
            hba::GHC => {
                let written = Ghc::from(u32::from(self.ghc) & !mask | value & mask);
                if written.hr() {
                    self.reset_all();
                } else {
                    self.ghc = self.ghc.with_ie(written.ie());
                    self.update_interrupt();
                }
            }
            hba::IS => {
                self.is &= !(value & mask);
                self.update_interrupt();
            }
            PORTS_AT.. => {
                let number = ((at - PORTS_AT) / PORT_SIZE) as usize;
                if let Some(port) = self.ports.get_mut(number) {
                    port.write(&self.wiring.pgm, (at - PORTS_AT) % PORT_SIZE, value, mask);
                    self.sync(number);
                }
            }
            _ => {}
        }
    }

    /// Controller reset.
    fn reset_all(&mut self) {
        for port in &mut self.ports {
            port.reset();
        }
        self.ghc = Ghc::new().with_ae(true);
        self.is = 0;
        self.update_interrupt();
    }
}

impl MmioDevice for Ahci {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.wrapping_add(i as u64);
            let register = self.read_register((at & (ABAR_SIZE - 1)) as u32 & !3);
            *byte = register.to_le_bytes()[(at & 3) as usize];
        }
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, mut data: &[u8]) {
        let mut at = offset & (ABAR_SIZE - 1);
        while !data.is_empty() && at < ABAR_SIZE {
            let first = (at & 3) as usize;
            let (now, rest) = data.split_at(data.len().min(4 - first));
            let (mut value, mut mask) = ([0; 4], [0; 4]);
            value[first..first + now.len()].copy_from_slice(now);
            mask[first..first + now.len()].fill(0xff);
            self.write_register(at as u32 & !3, u32::from_le_bytes(value), u32::from_le_bytes(mask));
            at += now.len() as u64;
            data = rest;
        }
    }
}

impl PciDevice for Ahci {
    fn config_written(&mut self, offset: u8, _width: Width, space: &mut ConfigSpace) {
        if offset & !3 == pci::reg::COMMAND {
            self.intx_disabled = space.u16(pci::reg::COMMAND) & pci::COMMAND_INTX_DISABLE != 0;
            self.update_interrupt();
        }
    }
}

impl Device for Ahci {
    fn reset(&mut self) {
        self.intx_disabled = false;
        self.reset_all();
    }
}
