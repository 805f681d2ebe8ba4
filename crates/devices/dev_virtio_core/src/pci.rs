//! Virtio over PCI, transitional: BAR 0 holds the ports of virtio 0.9.5 (section 4.1.4.10), BAR 4 the four register blocks of 1.0
//! and later, which vendor-specific capabilities point to (section 4.1.4), BAR 1 the MSI-X table: a vector for each queue and one
//! for changes of the configuration. One capability is a window to BAR 4 inside configuration space (section 4.1.4.9).

use std::sync::Arc;

use parking_lot::Mutex;
use pdm::doorbell::{Bell, BellDevice};
use pdm::iom::mmio_handler;
use pdm::irq::IrqLine;
use pdm::msix::MsiX;
use pdm::pci::{Bar, BarBell, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, MmioDevice, PortIo, Width};
use pgm::{Backing, Pgm};
use ssm::{Error, Reader, Saveable, Writer, check_version};
use vbox_types::Port;

use crate::queue::Queue;
use crate::{feature, status};

/// PCI vendor of all virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// PCI device ids of transitional devices lie from here on by a list of their own.
const PORTS: u16 = 64;
/// Where the legacy ports of a device's own configuration begin without MSI-X; with it, its two registers come before.
const LEGACY_CONFIG: u16 = 20;
/// The legacy port that takes the number of a queue with new chains.
const LEGACY_NOTIFY: u16 = 16;
const LEGACY_CONFIG_MSIX: u16 = 24;
/// The BAR of the register blocks.
const BLOCKS_BAR: u8 = 4;
/// The capability that is a window to the blocks: which BAR, where in it, how many bytes (1, 2 or 4), and the data. Drivers need it
/// before addresses are given out, and some do not start without it.
const WINDOW_CAPABILITY: u8 = 0x84;
const WINDOW_BAR: u8 = WINDOW_CAPABILITY + 4;
const WINDOW_OFFSET: u8 = WINDOW_CAPABILITY + 8;
const WINDOW_LENGTH: u8 = WINDOW_CAPABILITY + 12;
const WINDOW_DATA: u8 = WINDOW_CAPABILITY + 16;
/// The capability and the BAR of MSI-X.
const MSIX_CAPABILITY: u8 = 0x98;
const MSIX_BAR: usize = 1;

/// Blocks of BAR 4.
mod block {
    pub(super) const COMMON: u64 = 0x0000;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const END: u64 = 0x4000;
    /// Bytes between the notification registers of two queues.
    pub(super) const NOTIFY_STEP: u32 = 4;
}

/// Size of the common configuration.
const COMMON_SIZE: usize = 56;
/// No MSI-X vector.
const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What a virtio device does itself. Called with the device locked.
pub trait VirtioDevice: Send {
    /// For logs and the PCI list.
    fn name(&self) -> &'static str;

    /// Virtio's device id: 1 for a network card, 2 for a disk.
    fn id(&self) -> u16;

    /// PCI class code: base class, subclass, programming interface.
    fn class(&self) -> [u8; 3];

    /// The features that the device offers beside those of the transport.
    fn features(&self) -> u64;

    /// The greatest size of each queue, powers of two. Always the same.
    fn queues(&self) -> &'static [u16];

    /// The device's configuration as it is now.
    fn config(&self) -> Vec<u8>;

    /// The driver has written to the configuration.
    fn config_written(&mut self, offset: usize, data: &[u8]);

    /// The driver is ready (DRIVER_OK): `transport` has the features that it took.
    fn activate(&mut self, transport: &mut Transport);

    /// A queue has new chains.
    fn notified(&mut self, queue: usize, transport: &mut Transport);

    /// Back to the state after power-on. What waits in back ends is dropped or awaited here.
    fn reset(&mut self, transport: &mut Transport);

    /// The device's own saved state.
    fn save(&self, out: &mut Writer);

    /// Takes back what [`Self::save`] wrote, or fails and leaves the device as it was.
    fn load(&mut self, input: &mut Reader<'_>) -> Result<(), Error>;
}

/// What a device is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    pub irq: IrqLine,
}

#[derive(Clone, PartialEq, Eq)]
struct State {
    status: u8,
    isr: u8,
    generation: u8,
    driver_features: u64,
    feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<Queue>,
    /// MSI-X vectors: of changes of the configuration, and of each queue.
    config_vector: u16,
    vectors: Vec<u16>,
}

/// The transport as a device sees it: its queues, the guest's memory, and interrupts.
pub struct Transport {
    wiring: Wiring,
    pub(crate) msix: Arc<MsiX>,
    offered: u64,
    state: State,
}

impl Transport {
    fn new(wiring: Wiring, offered: u64, queues: &[u16]) -> Self {
        let state = State {
            status: 0,
            isr: 0,
            generation: 0,
            driver_features: 0,
            feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues: queues.iter().map(|size| Queue::new(*size)).collect(),
            config_vector: NO_VECTOR,
            vectors: vec![NO_VECTOR; queues.len()],
        };
        Self { wiring, msix: MsiX::new(queues.len() as u16 + 1), offered, state }
    }

    /// Whether the driver has taken the feature.
    pub fn has(&self, feature: u64) -> bool {
        self.state.driver_features & feature == feature
    }

    /// Whether the driver works with the device.
    pub fn is_active(&self) -> bool {
        self.state.status & status::DRIVER_OK != 0 && self.state.status & status::NEEDS_RESET == 0
    }

    pub fn memory(&self) -> Arc<Pgm> {
        self.wiring.pgm.clone()
    }

    /// A queue with the memory that it lies in.
    pub fn queue(&mut self, index: usize) -> Option<(&mut Queue, &Pgm)> {
        let queue = self.state.queues.get_mut(index)?;
        Some((queue, &self.wiring.pgm))
    }

    /// Lets the driver see the chains of a queue that were given back, with an interrupt if it wants one. Takes note of a queue that
    /// makes no sense.
    pub fn publish(&mut self, index: usize) {
        let Some(queue) = self.state.queues.get_mut(index) else { return };
        let interrupt = queue.publish(&self.wiring.pgm);
        let broken = queue.is_broken();
        if interrupt {
            let vector = self.state.vectors.get(index).copied().unwrap_or(NO_VECTOR);
            self.raise(ISR_QUEUE, vector);
        }
        if broken && self.state.status & status::NEEDS_RESET == 0 {
            tracing::warn!(target: "virtio", queue = index, "the guest's queue makes no sense: the device needs a reset");
            self.state.status |= status::NEEDS_RESET;
            self.config_changed();
        }
    }

    /// The device's configuration has changed.
    pub fn config_changed(&mut self) {
        self.state.generation = self.state.generation.wrapping_add(1);
        if self.state.status & status::DRIVER_OK != 0 {
            self.raise(ISR_CONFIG, self.state.config_vector);
        }
    }

    fn raise(&mut self, cause: u8, vector: u16) {
        self.state.isr |= cause;
        if self.msix.is_enabled() {
            self.msix.notify(vector);
        } else {
            self.wiring.irq.set(true);
        }
    }

    fn read_isr(&mut self) -> u8 {
        self.wiring.irq.set(false);
        std::mem::take(&mut self.state.isr)
    }

    /// Brings INTx in line with the causes and with whether MSI-X stands in for it.
    fn sync_intx(&self) {
        self.wiring.irq.set(self.state.isr != 0 && !self.msix.is_enabled());
    }

    /// The vector that the driver asks for, if it exists.
    fn vector(&self, wanted: u16) -> u16 {
        if wanted < self.msix.vectors() { wanted } else { NO_VECTOR }
    }

    fn set_config_vector(&mut self, wanted: u16) {
        self.state.config_vector = self.vector(wanted);
    }

    fn set_queue_vector(&mut self, wanted: u16) {
        let vector = self.vector(wanted);
        if let Some(slot) = self.state.vectors.get_mut(usize::from(self.state.queue_select)) {
            *slot = vector;
        }
    }

    fn queue_vector(&self) -> u16 {
        self.state.vectors.get(usize::from(self.state.queue_select)).copied().unwrap_or(NO_VECTOR)
    }

    /// Where the legacy ports of the device's configuration begin now.
    fn legacy_config(&self) -> u16 {
        if self.msix.is_enabled() { LEGACY_CONFIG_MSIX } else { LEGACY_CONFIG }
    }

    fn reset(&mut self) {
        let state = &mut self.state;
        let queues = state.queues.iter_mut();
        queues.for_each(Queue::reset);
        (state.status, state.isr, state.driver_features) = (0, 0, 0);
        (state.feature_select, state.driver_feature_select, state.queue_select) = (0, 0, 0);
        state.config_vector = NO_VECTOR;
        state.vectors.fill(NO_VECTOR);
        self.wiring.irq.set(false);
    }

    fn selected(&mut self) -> Option<&mut Queue> {
        self.state.queues.get_mut(usize::from(self.state.queue_select))
    }

    fn accept_features(&mut self, features: u64) {
        self.state.driver_features = features & self.offered;
        let event_index = self.has(feature::EVENT_IDX);
        self.state.queues.iter_mut().for_each(|q| q.event_index = event_index);
    }
}

/// A virtio device on the PCI bus.
pub struct VirtioPci<D> {
    pub device: D,
    pub transport: Transport,
}

impl<D: VirtioDevice + 'static> VirtioPci<D> {
    pub fn new(device: D, wiring: Wiring) -> Arc<Mutex<Self>> {
        let offered = device.features()
            | feature::VERSION_1
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::ANY_LAYOUT;
        let transport = Transport::new(wiring, offered, device.queues());
        Arc::new(Mutex::new(Self { device, transport }))
    }

    /// Plugs the device into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let (name, id, class) = {
            let me = this.lock();
            (me.device.name(), me.device.id(), me.device.class())
        };
        // Transitional devices have numbers of their own.
        let device = match id {
            1 => 0x1000,
            2 => 0x1001,
            3 => 0x1003,
            4 => 0x1005,
            5 => 0x1002,
            8 => 0x1004,
            9 => 0x1009,
            other => 0x1040 + other,
        };
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device,
            revision: 0,
            class,
            subsystem_vendor: VENDOR,
            subsystem: id,
            header_type: 0,
            interrupt_pin: 1,
        });
        let mut capability = |offset: u8, kind: u8, at: u64, len: u64, more: &[u8]| {
            let mut body = vec![16 + more.len() as u8, kind, BLOCKS_BAR, 0, 0, 0];
            body.extend_from_slice(&(at as u32).to_le_bytes());
            body.extend_from_slice(&(len as u32).to_le_bytes());
            body.extend_from_slice(more);
            space.add_capability(offset, 0x09, &body);
        };
        let block = block::ISR - block::COMMON;
        capability(0x40, 1, block::COMMON, block, &[]);
        capability(0x50, 3, block::ISR, block, &[]);
        capability(0x60, 4, block::DEVICE, block, &[]);
        capability(0x70, 2, block::NOTIFY, block, &block::NOTIFY_STEP.to_le_bytes());
        capability(WINDOW_CAPABILITY, 5, 0, 0, &[0; 4]);
        space.allow(WINDOW_BAR, &[0xff]);
        space.allow(WINDOW_OFFSET, &[0xff; 12]);
        let ports = Bar::Io { size: PORTS, widest: Width::Dword, handler: this.clone() };
        let registers = Bar::Memory {
            size: block::END,
            prefetchable: false,
            wide: true,
            backing: Backing::mmio(mmio_handler(this, 0)),
        };
        let msix = this.lock().transport.msix.clone();
        space.add_msix(MSIX_CAPABILITY, MSIX_BAR, &msix);
        bus.add(
            at,
            name,
            space,
            vec![(0, ports), (MSIX_BAR, msix.bar()), (BLOCKS_BAR.into(), registers)],
            this.clone(),
        );
        // What notifies the device in either way does nothing else.
        let bells: Vec<_> = (0..this.lock().transport.state.queues.len() as u16)
            .flat_map(|queue| {
                let register = block::NOTIFY as u16 + queue * block::NOTIFY_STEP as u16;
                [(0, LEGACY_NOTIFY), (BLOCKS_BAR.into(), register)].map(|(bar, offset)| BarBell {
                    bar,
                    offset,
                    value: queue,
                    number: queue,
                })
            })
            .collect();
        let device: Arc<dyn Bell> = this.clone();
        bus.add_doorbells(at, &bells, Arc::downgrade(&device), None);
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.device.reset(&mut self.transport);
            self.transport.reset();
            return;
        }
        let before = self.transport.state.status;
        let mut new = value | before & status::NEEDS_RESET;
        if new & status::FEATURES_OK != 0 && before & status::FEATURES_OK == 0 {
            // Who speaks of FEATURES_OK speaks virtio 1.0.
            if !self.transport.has(feature::VERSION_1) {
                new &= !status::FEATURES_OK;
            }
        }
        self.transport.state.status = new;
        if new & !before & status::DRIVER_OK != 0 {
            self.device.activate(&mut self.transport);
        }
    }

    fn notify(&mut self, queue: u16) {
        let queue = usize::from(queue);
        if self.transport.is_active() && queue < self.transport.state.queues.len() {
            self.device.notified(queue, &mut self.transport);
        }
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        let config = self.device.config();
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = config.get(offset + i).copied().unwrap_or(0);
        }
    }

    // The ports of 0.9.5.

    fn legacy_read(&mut self, offset: u16, width: Width) -> u32 {
        let config = self.transport.legacy_config();
        let state = &self.transport.state;
        let selected = state.queues.get(usize::from(state.queue_select));
        match (offset, width) {
            (0x00, Width::Dword) => self.transport.offered as u32,
            (0x04, Width::Dword) => state.driver_features as u32,
            (0x08, Width::Dword) => selected.map_or(0, Queue::legacy_page),
            (0x0c, Width::Word) => selected.map_or(0, |q| q.max_size().into()),
            (0x0e, Width::Word) => state.queue_select.into(),
            (0x10, Width::Word) => 0,
            (0x12, Width::Byte) => state.status.into(),
            (0x13, Width::Byte) => self.transport.read_isr().into(),
            (_, _) if offset >= config => {
                let mut bytes = [0; 4];
                let len = width.bytes() as usize;
                self.read_config((offset - config).into(), &mut bytes[..len]);
                u32::from_le_bytes(bytes)
            }
            (0x14, Width::Word) => state.config_vector.into(),
            (0x16, Width::Word) => self.transport.queue_vector().into(),
            _ => width.ones(),
        }
    }

    fn legacy_write(&mut self, offset: u16, width: Width, value: u32) {
        let config = self.transport.legacy_config();
        match (offset, width) {
            // Legacy drivers know the lower half only.
            (0x04, Width::Dword) => self.transport.accept_features(value.into()),
            (0x08, Width::Dword) => {
                if let Some(queue) = self.transport.selected() {
                    queue.set_legacy_page(value);
                }
            }
            (0x0e, Width::Word) => self.transport.state.queue_select = value as u16,
            (LEGACY_NOTIFY, Width::Word) => self.notify(value as u16),
            (0x12, Width::Byte) => self.set_status(value as u8),
            (_, _) if offset >= config => {
                let bytes = value.to_le_bytes();
                let len = width.bytes() as usize;
                self.device.config_written((offset - config).into(), &bytes[..len]);
            }
            (0x14, Width::Word) => self.transport.set_config_vector(value as u16),
            (0x16, Width::Word) => self.transport.set_queue_vector(value as u16),
            _ => {}
        }
    }

    // The blocks of 1.0.

    fn common(&self) -> [u8; COMMON_SIZE] {
        let state = &self.transport.state;
        let none = Queue::default();
        let queue = state.queues.get(usize::from(state.queue_select)).unwrap_or(&none);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut out = [0; COMMON_SIZE];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&state.feature_select.to_le_bytes());
        // What is legacy's alone is not for drivers that select a half.
        let offered = self.transport.offered & !feature::ANY_LAYOUT;
        put(&half(offered, state.feature_select).to_le_bytes());
        put(&state.driver_feature_select.to_le_bytes());
        put(&half(state.driver_features, state.driver_feature_select).to_le_bytes());
        put(&state.config_vector.to_le_bytes());
        put(&(state.queues.len() as u16).to_le_bytes());
        put(&[state.status, state.generation]);
        put(&state.queue_select.to_le_bytes());
        put(&queue.size.to_le_bytes());
        put(&self.transport.queue_vector().to_le_bytes());
        put(&u16::from(queue.ready).to_le_bytes());
        put(&state.queue_select.to_le_bytes());
        put(&queue.descriptors.to_le_bytes());
        put(&queue.available.to_le_bytes());
        put(&queue.used.to_le_bytes());
        out
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let Some(head) = bytes.get_mut(..data.len()) else { return };
        head.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let state = &mut self.transport.state;
        match (offset, data.len()) {
            (0, 4) => state.feature_select = value as u32,
            (8, 4) => state.driver_feature_select = value as u32,
            // Settled once the device has agreed.
            (12, 4) if state.status & status::FEATURES_OK == 0 => {
                let kept = state.driver_features;
                let new = match state.driver_feature_select {
                    0 => kept & !0xffff_ffff | value,
                    1 => kept & 0xffff_ffff | value << 32,
                    _ => return,
                };
                self.transport.accept_features(new);
            }
            (16, 2) => self.transport.set_config_vector(value as u16),
            (20, 1) => self.set_status(value as u8),
            (22, 2) => state.queue_select = value as u16,
            (24, 2) => self.change_queue(|q| q.set_size(value as u16)),
            (26, 2) => self.transport.set_queue_vector(value as u16),
            (28, 2) => {
                if value == 1
                    && let Some(queue) = self.transport.selected()
                {
                    queue.ready = true;
                }
            }
            (32, 8) => self.change_queue(|q| q.descriptors = value),
            (40, 8) => self.change_queue(|q| q.available = value),
            (48, 8) => self.change_queue(|q| q.used = value),
            (32..56, 4) => self.change_queue(|q| {
                let field = match offset / 8 {
                    4 => &mut q.descriptors,
                    5 => &mut q.available,
                    _ => &mut q.used,
                };
                *field = match offset % 8 {
                    0 => *field & !0xffff_ffff | value,
                    4 => *field & 0xffff_ffff | value << 32,
                    _ => *field,
                };
            }),
            _ => {}
        }
    }

    /// Changes the selected queue, if it is not in use yet.
    fn change_queue(&mut self, change: impl FnOnce(&mut Queue)) {
        if let Some(queue) = self.transport.selected().filter(|q| !q.ready) {
            change(queue);
        }
    }
}

impl<D: VirtioDevice + 'static> PortIo for VirtioPci<D> {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        self.legacy_read(port.0 & (PORTS - 1), width)
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        self.legacy_write(port.0 & (PORTS - 1), width, value);
    }
}

impl<D: VirtioDevice + 'static> MmioDevice for VirtioPci<D> {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            block::COMMON..block::ISR => {
                let common = self.common();
                for (i, byte) in data.iter_mut().enumerate() {
                    *byte = common.get(offset as usize + i).copied().unwrap_or(0);
                }
            }
            block::ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.transport.read_isr();
                }
            }
            block::DEVICE..block::NOTIFY => self.read_config((offset - block::DEVICE) as usize, data),
            _ => {}
        }
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        match offset {
            block::COMMON..block::ISR => self.write_common(offset, data),
            block::DEVICE..block::NOTIFY => {
                self.device.config_written((offset - block::DEVICE) as usize, data);
            }
            block::NOTIFY..block::END => {
                let queue = (offset - block::NOTIFY) / u64::from(block::NOTIFY_STEP);
                self.notify(u16::try_from(queue).unwrap_or(u16::MAX));
            }
            _ => {}
        }
    }
}

/// Whether an access to configuration space reaches the window's data.
fn is_window_data(offset: u8, width: Width) -> bool {
    offset < WINDOW_DATA + 4 && u16::from(offset) + width.bytes() > WINDOW_DATA.into()
}

/// Where in the blocks' BAR the window is, and its bytes, if the driver has set it up as it may.
fn window(space: &ConfigSpace) -> Option<(u64, usize)> {
    let (at, len) = (space.u32(WINDOW_OFFSET), space.u32(WINDOW_LENGTH));
    let valid = space.byte(WINDOW_BAR) == BLOCKS_BAR && matches!(len, 1 | 2 | 4) && at % len == 0;
    (valid && u64::from(at) < block::END).then_some((at.into(), len as usize))
}

impl<D: VirtioDevice + 'static> BellDevice for VirtioPci<D> {
    fn rung(&mut self, number: u16) {
        self.notify(number);
    }
}

impl<D: VirtioDevice + 'static> PciDevice for VirtioPci<D> {
    fn config_written(&mut self, offset: u8, width: Width, space: &mut ConfigSpace) {
        // MSI-X may have been switched on or off.
        self.transport.sync_intx();
        if is_window_data(offset, width)
            && let Some((at, len)) = window(space)
        {
            let data = space.u32(WINDOW_DATA).to_le_bytes();
            self.mmio_write(0, at, &data[..len]);
        }
    }

    fn config_reading(&mut self, offset: u8, width: Width, space: &mut ConfigSpace) {
        if is_window_data(offset, width)
            && let Some((at, len)) = window(space)
        {
            let mut data = [0; 4];
            self.mmio_read(0, at, &mut data[..len]);
            for (i, byte) in data.iter().take(len).enumerate() {
                space.set_byte(WINDOW_DATA + i as u8, *byte);
            }
        }
    }
}

impl<D: VirtioDevice + 'static> Device for VirtioPci<D> {
    fn reset(&mut self) {
        self.device.reset(&mut self.transport);
        self.transport.reset();
        self.transport.state.generation = 0;
    }
}

/// Version 1: status registers, features, queues, MSI-X vectors, then the device's own state.
const VERSION: u32 = 1;

impl<D: VirtioDevice + 'static> Saveable for VirtioPci<D> {
    fn unit_name(&self) -> &'static str {
        self.device.name()
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        let State {
            status,
            isr,
            generation,
            driver_features,
            feature_select,
            driver_feature_select,
            queue_select,
            queues,
            config_vector,
            vectors,
        } = &self.transport.state;
        [*status, *isr, *generation].into_iter().for_each(|v| out.put_u8(v));
        out.put_u64(*driver_features);
        out.put_u32(*feature_select);
        out.put_u32(*driver_feature_select);
        out.put_u16(*queue_select);
        queues.iter().for_each(|q| q.save(out));
        out.put_u16(*config_vector);
        vectors.iter().for_each(|v| out.put_u16(*v));
        self.device.save(out);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let mut state = State {
            status: input.take_u8()?,
            isr: input.take_u8()?,
            generation: input.take_u8()?,
            driver_features: input.take_u64()?,
            feature_select: input.take_u32()?,
            driver_feature_select: input.take_u32()?,
            queue_select: input.take_u16()?,
            queues: Vec::new(),
            config_vector: NO_VECTOR,
            vectors: Vec::new(),
        };
        if state.driver_features & !self.transport.offered != 0 {
            return Err(input.invalid("the driver uses features that the device does not offer"));
        }
        for queue in &self.transport.state.queues {
            state.queues.push(queue.load(&mut input)?);
        }
        state.config_vector = self.transport.vector(input.take_u16()?);
        for _ in &state.queues {
            state.vectors.push(self.transport.vector(input.take_u16()?));
        }
        self.device.load(&mut input)?;
        input.finish()?;
        self.transport.state = state;
        self.transport.sync_intx();
        Ok(())
    }
}
