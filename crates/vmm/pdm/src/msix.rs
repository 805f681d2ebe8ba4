//! MSI-X: interrupts that a device sends as messages, by vectors of a table that the guest fills. Source: PCI Local Bus Specification
//! 3.0, section 6.8.2.
//!
//! A device makes an [`MsiX`], puts its BAR ([`MsiX::bar`]) beside its own and its capability into its configuration space
//! ([`crate::pci::ConfigSpace::add_msix`]). The bus does the rest: it follows the enable and mask bits, resets and saves the table.
//! To interrupt, the device asks [`MsiX::is_enabled`] and then [`MsiX::notify`], or drives its INTx line as ever.
//!
//! The table fills the first half of its BAR, the pending bits begin with the second half. Bus mastering is not looked at.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pgm::{Backing, MmioHandler};
use ssm::{Error, Reader, Writer};
use vbox_types::VcpuId;

use crate::pci::Bar;

/// Most vectors that a function has.
pub const MAX_VECTORS: u16 = 2048;

/// Bytes of a table entry: address, upper address, data, vector control.
const ENTRY: u64 = 16;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;
/// Message control: the function is masked; MSI-X is on.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
/// The bits of message control that the guest changes.
pub(crate) const CONTROL_WRITABLE: u16 = FUNCTION_MASK | ENABLE;

/// Takes message-signalled interrupts: writes of `data` to `address` in 0xfee00000–0xfeefffff. Called from any thread, possibly with a
/// device's lock held.
pub trait MsiSink: Send + Sync {
    fn send(&self, address: u64, data: u32);
}

#[derive(Clone, Copy)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Vector {
    const RESET: Self = Self { address: 0, data: 0, control: MASKED, pending: false };

    fn dwords(&self) -> [u32; 4] {
        [self.address as u32, (self.address >> 32) as u32, self.data, self.control]
    }
}

struct State {
    /// Message control's two bits.
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
}

impl State {
    /// Takes the message of a vector to be sent, if nothing keeps it back; else it stays pending.
    fn take(&mut self, vector: usize) -> Option<(u64, u32)> {
        let (enabled, masked) = (self.enabled, self.masked);
        let vector = self.vectors.get_mut(vector).filter(|v| v.pending)?;
        if !enabled || masked || vector.control & MASKED != 0 {
            return None;
        }
        vector.pending = false;
        Some((vector.address, vector.data))
    }
}

/// The vectors of one PCI function.
pub struct MsiX {
    state: Mutex<State>,
    sink: OnceLock<Arc<dyn MsiSink>>,
}

impl MsiX {
    /// A table of `vectors`, all masked.
    ///
    /// # Panics
    /// Unless there are 1 to 2048 vectors, which the device's author decides.
    pub fn new(vectors: u16) -> Arc<Self> {
        assert!((1..=MAX_VECTORS).contains(&vectors), "{vectors} MSI-X vectors");
        let vectors = vec![Vector::RESET; vectors.into()];
        let state = State { enabled: false, masked: false, vectors };
        Arc::new(Self { state: Mutex::new(state), sink: OnceLock::new() })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.state.lock().vectors.len() as u16
    }

    /// Where the pending bits begin in the BAR.
    pub(crate) fn pending_at(&self) -> u64 {
        (u64::from(self.vectors()) * ENTRY).next_power_of_two().max(0x800)
    }

    /// The BAR with the table and the pending bits.
    pub fn bar(self: &Arc<Self>) -> Bar {
        let backing = Backing::mmio(self.clone());
        Bar::Memory { size: 2 * self.pending_at(), prefetchable: false, wide: false, backing }
    }

    /// Whether the guest wants messages. Then the device leaves its INTx line low.
    pub fn is_enabled(&self) -> bool {
        self.state.lock().enabled
    }

    /// Sends the message of a vector, or keeps it until the guest lifts its mask. Without effect while MSI-X is off and for vectors that
    /// do not exist.
    pub fn notify(&self, vector: u16) {
        let message = {
            let mut state = self.state.lock();
            let enabled = state.enabled;
            match state.vectors.get_mut(usize::from(vector)) {
                Some(v) if enabled => v.pending = true,
                _ => return,
            }
            state.take(vector.into())
        };
        self.send(message);
    }

    fn send(&self, messages: impl IntoIterator<Item = (u64, u32)>) {
        for (address, data) in messages {
            if let Some(sink) = self.sink.get() {
                sink.send(address, data);
            }
        }
    }

    pub(crate) fn connect(&self, sink: Arc<dyn MsiSink>) {
        let _ = self.sink.set(sink);
    }

    /// Message control as it is now; `power_on` forgets the table.
    pub(crate) fn set_control(&self, control: u16) {
        let messages: Vec<_> = {
            let mut state = self.state.lock();
            (state.enabled, state.masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
            (0..state.vectors.len()).filter_map(|vector| state.take(vector)).collect()
        };
        self.send(messages);
    }

    pub(crate) fn reset(&self) {
        let State { enabled, masked, vectors } = &mut *self.state.lock();
        (*enabled, *masked) = (false, false);
        vectors.fill(Vector::RESET);
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        // Message control is in configuration space.
        let State { enabled: _, masked: _, vectors } = &*self.state.lock();
        out.put_u16(vectors.len() as u16);
        for Vector { address, data, control, pending } in vectors {
            out.put_u64(*address);
            out.put_u32(*data);
            out.put_u32(*control);
            out.put_bool(*pending);
        }
    }

    /// Reads what [`Self::save`] wrote, for [`Self::restore`].
    pub(crate) fn load(&self, input: &mut Reader<'_>) -> Result<Saved, Error> {
        let count = input.take_u16()?;
        if count != self.vectors() {
            return Err(
                input.invalid(format!("a function has {count} MSI-X vectors, not {}", self.vectors()))
            );
        }
        let vectors = (0..count).map(|_| {
            Ok(Vector {
                address: input.take_u64()?,
                data: input.take_u32()?,
                control: input.take_u32()? & MASKED,
                pending: input.take_bool()?,
            })
        });
        Ok(Saved(vectors.collect::<Result<_, Error>>()?))
    }

    pub(crate) fn restore(&self, saved: Saved) {
        self.state.lock().vectors = saved.0;
    }
}

/// A table out of a saved state.
pub(crate) struct Saved(Vec<Vector>);

impl MmioHandler for MsiX {
    fn mmio_read(&self, _vcpu: VcpuId, offset: u64, data: &mut [u8]) {
        let pending_at = self.pending_at();
        let state = self.state.lock();
        for (at, out) in (offset..).zip(data.iter_mut()) {
            *out = if at < pending_at {
                let dwords = state.vectors.get((at / ENTRY) as usize).map(Vector::dwords);
                dwords.map_or(0, |d| d[(at % ENTRY / 4) as usize].to_le_bytes()[(at % 4) as usize])
            } else {
                let first = ((at - pending_at) * 8) as usize;
                (0..8).fold(0, |byte, bit| {
                    byte | u8::from(state.vectors.get(first + bit).is_some_and(|v| v.pending)) << bit
                })
            };
        }
    }

    /// Whole dwords, as software has to.
    fn mmio_write(&self, _vcpu: VcpuId, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) || offset >= self.pending_at() {
            return;
        }
        let vector = (offset / ENTRY) as usize;
        let message = {
            let mut state = self.state.lock();
            let Some(entry) = state.vectors.get_mut(vector) else { return };
            let (dwords, _) = data.as_chunks::<4>();
            for (at, dword) in (offset % ENTRY / 4..).zip(dwords) {
                let value = u32::from_le_bytes(*dword);
                match at {
                    0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                    1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                    2 => entry.data = value,
                    3 => entry.control = value & MASKED,
                    // Past the entry: a qword at its last dword, which is not aligned.
                    _ => {}
                }
            }
            state.take(vector)
        };
        self.send(message);
    }
}

#[cfg(test)]
mod tests {
    use pgm::Pgm;

    use super::*;
    use crate::iom::{Iom, Width};
    use crate::pci::{ConfigSpace, DevFn, Identity, PciBus, PciDevice, reg};

    const CAP: u8 = 0x80;
    const AT: DevFn = DevFn::new(4, 0);

    struct Nothing;
    impl PciDevice for Nothing {
        fn config_written(&mut self, _: u8, _: Width, _: &mut ConfigSpace) {}
    }

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);
    impl MsiSink for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().push((address, data));
        }
    }
    impl Sent {
        fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut *self.0.lock())
        }
    }

    fn function() -> (Arc<PciBus>, Arc<MsiX>, Arc<Sent>) {
        let bus = PciBus::new(Iom::new(), Pgm::new(vec![]));
        let sent = Arc::new(Sent::default());
        bus.connect_msi(sent.clone());
        let msix = MsiX::new(3);
        let mut space = ConfigSpace::new(&Identity::default());
        space.add_msix(CAP, 1, &msix);
        bus.add(AT, "test", space, vec![(1, msix.bar())], Arc::new(Mutex::new(Nothing)));
        (bus, msix, sent)
    }

    fn fill(msix: &MsiX, vector: u64, address: u32, data: u32, control: u32) {
        for (at, value) in [address, 0, data, control].into_iter().enumerate() {
            msix.mmio_write(VcpuId(0), 16 * vector + 4 * at as u64, &value.to_le_bytes());
        }
    }

    fn control(bus: &PciBus, value: u16) {
        bus.config_write(AT, CAP + 2, Width::Word, value.into());
    }

    fn pending(msix: &MsiX) -> u8 {
        let mut byte = [0];
        msix.mmio_read(VcpuId(0), msix.pending_at(), &mut byte);
        byte[0]
    }

    #[test]
    fn the_capability_tells_where_the_table_is() {
        let (bus, msix, _) = function();
        assert_eq!(bus.config_read(AT, 0x34, Width::Byte), CAP.into());
        assert_eq!(bus.config_read(AT, CAP, Width::Dword), 0x0002_0011);
        assert_eq!(bus.config_read(AT, CAP + 4, Width::Dword), 1);
        assert_eq!(bus.config_read(AT, CAP + 8, Width::Dword), msix.pending_at() as u32 | 1);
        control(&bus, 0xffff);
        assert_eq!(bus.config_read(AT, CAP + 2, Width::Word), 0xc002);
        bus.config_write(AT, reg::BAR0 + 4, Width::Dword, 0xffff_ffff);
        assert_eq!(bus.config_read(AT, reg::BAR0 + 4, Width::Dword), 0xffff_f000);
    }

    #[test]
    fn a_message_goes_out_once_while_nothing_masks_it() {
        let (bus, msix, sent) = function();
        fill(&msix, 1, 0xfee0_1000, 0x41, 0);
        msix.notify(1);
        assert_eq!((sent.take(), pending(&msix)), (vec![], 0), "MSI-X is off");
        control(&bus, ENABLE);
        assert!(msix.is_enabled());
        msix.notify(1);
        msix.notify(7);
        assert_eq!(sent.take(), [(0xfee0_1000, 0x41)]);
    }

    #[test]
    fn a_masked_vector_stays_pending_until_the_mask_is_lifted() {
        let (bus, msix, sent) = function();
        fill(&msix, 0, 0xfee0_0000, 0x50, MASKED);
        fill(&msix, 2, 0xfee0_2000, 0x52, 0);
        control(&bus, ENABLE | FUNCTION_MASK);
        [0, 2, 2].into_iter().for_each(|v| msix.notify(v));
        assert_eq!((sent.take(), pending(&msix)), (vec![], 0b101));
        control(&bus, ENABLE);
        assert_eq!((sent.take(), pending(&msix)), (vec![(0xfee0_2000, 0x52)], 0b001));
        msix.mmio_write(VcpuId(0), 12, &0u32.to_le_bytes());
        assert_eq!((sent.take(), pending(&msix)), (vec![(0xfee0_0000, 0x50)], 0));
    }

    #[test]
    fn the_table_survives_saving_with_what_is_pending_and_reset_clears_it() {
        let (bus, msix, _) = function();
        fill(&msix, 0, 0xfee0_0000, 0x50, MASKED);
        control(&bus, ENABLE);
        msix.notify(0);
        let mut out = Writer::new();
        bus.save(&mut out);
        let bytes = out.into_bytes();
        let (other, restored, sent) = function();
        other.load(Reader::new("pci", 1, &bytes)).unwrap();
        assert!(restored.is_enabled());
        restored.mmio_write(VcpuId(0), 12, &0u32.to_le_bytes());
        assert_eq!(sent.take(), [(0xfee0_0000, 0x50)]);
        bus.reset();
        let mut entry = [0xff; 16];
        msix.mmio_read(VcpuId(0), 0, &mut entry);
        assert_eq!((u128::from_le_bytes(entry), msix.is_enabled()), (1 << 96, false));
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn odd_accesses_to_table_and_pending_bits_do_no_harm() {
        let (_, msix, _) = function();
        for (offset, len) in [(1, 4), (0, 3), (12, 8), (0x700, 8), (0x800, 4), (0xff8, 8)] {
            msix.mmio_write(VcpuId(0), offset, &vec![0xff; len]);
            msix.mmio_read(VcpuId(0), offset, &mut vec![0; len]);
        }
        assert_eq!(pending(&msix), 0);
    }
}
