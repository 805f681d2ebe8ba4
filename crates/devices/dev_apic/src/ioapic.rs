//! The I/O APIC's state and behaviour (Intel 82093AA datasheet 290566), without locks or wires.
//!
//! 24 inputs. Index register at offset 0x00, data window at 0x10; registers 0 (id), 1 (version 0x11, 24 entries), 2 (arbitration
//! id), 0x10–0x3f (redirection table). As in VirtualBox, an input's level means "asserted" whatever the polarity bit says, because the
//! lines inside the machine have no polarity. Edges at a masked input are lost. There is no EOI register: version 0x11 has none.

use crate::local::{Destination, Message};
use crate::spec::{DeliveryMode, Redirection};

/// Number of inputs.
pub const PINS: usize = 24;
/// Size of the register page that is decoded.
pub const MMIO_SIZE: u64 = 0x1000;

const VERSION: u32 = (PINS as u32 - 1) << 16 | 0x11;
const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_TABLE: u8 = 0x10;

/// The I/O APIC's registers and input levels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub(crate) id: u8,
    pub(crate) index: u8,
    pub(crate) table: [Redirection; PINS],
    /// Levels at the inputs, one bit each.
    pub(crate) levels: u32,
}

impl Default for State {
    fn default() -> Self {
        Self { id: 0, index: 0, table: [Redirection::new().with_masked(true); PINS], levels: 0 }
    }
}

/// Sends a message; true if a local APIC took it.
pub type Send<'a> = &'a mut dyn FnMut(Message) -> bool;

impl State {
    /// Brings the registers to their reset values. The input levels are the wires', not the chip's: they stay.
    pub fn reset(&mut self) {
        let Self { id, index, table, levels: _ } = self;
        *id = 0;
        *index = 0;
        *table = [Redirection::new().with_masked(true); PINS];
    }

    /// Input `pin` has a new level.
    pub fn set_level(&mut self, pin: usize, level: bool, send: Send<'_>) {
        let Some(entry) = self.table.get(pin).copied() else { return };
        let before = self.levels & 1 << pin != 0;
        if level {
            self.levels |= 1 << pin;
        } else {
            self.levels &= !(1 << pin);
        }
        if level && !before && !entry.level() && !entry.masked() {
            send(message(entry));
        }
        self.service_level(pin, send);
    }

    /// Delivers a level-triggered input that is high, open and not in service.
    fn service_level(&mut self, pin: usize, send: Send<'_>) {
        let entry = self.table[pin];
        if entry.level() && !entry.masked() && !entry.remote_irr() && self.levels & 1 << pin != 0 {
            let taken = send(message(entry));
            // Remote IRR is defined for modes that end with an EOI only.
            let ends = matches!(entry.mode(), DeliveryMode::Fixed | DeliveryMode::LowestPriority);
            self.table[pin].set_remote_irr(taken && ends);
        }
    }

    /// A local APIC broadcasts the end of a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8, send: Send<'_>) {
        for pin in 0..PINS {
            let entry = self.table[pin];
            if entry.level() && entry.remote_irr() && entry.vector() == vector {
                self.table[pin].set_remote_irr(false);
                self.service_level(pin, send);
            }
        }
    }

    /// What the inputs send, whether they are masked or not.
    pub(crate) fn messages(&self) -> impl Iterator<Item = Message> + '_ {
        self.table.iter().map(|entry| message(*entry))
    }

    fn read_register(&self) -> u32 {
        match self.index {
            INDEX_ID | INDEX_ARBITRATION => u32::from(self.id) << 24,
            INDEX_VERSION => VERSION,
            index => match self.entry(index) {
                Some((pin, shift)) => (self.table[pin].into_bits() >> shift) as u32,
                None => u32::MAX,
            },
        }
    }

    /// The redirection entry and the shift of the half that `index` selects.
    fn entry(&self, index: u8) -> Option<(usize, u32)> {
        let at = index.checked_sub(INDEX_TABLE)?;
        let pin = usize::from(at / 2);
        (pin < PINS).then_some((pin, 32 * u32::from(at & 1)))
    }

    fn write_register(&mut self, value: u32, send: Send<'_>) {
        if self.index == INDEX_ID {
            self.id = (value >> 24) as u8 & 0xf;
        } else if let Some((pin, shift)) = self.entry(self.index) {
            let mask = Redirection::WRITABLE & u64::from(u32::MAX) << shift;
            let old = self.table[pin].into_bits();
            let mut entry = Redirection::from_bits(old & !mask | u64::from(value) << shift & mask);
            // An input that becomes edge-triggered forgets that it was in service; guests use this in place of the EOI register.
            if !entry.level() {
                entry.set_remote_irr(false);
            }
            self.table[pin] = entry;
            self.service_level(pin, send);
        }
    }

    /// A read at `offset` of the page. Registers are 32 bits wide; narrower reads give part of them.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 & 0xff {
            0x00 => self.index.into(),
            0x10 => self.read_register(),
            _ => 0,
        };
        data.fill(0);
        for (out, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().skip((offset & 3) as usize)) {
            *out = from;
        }
    }

    /// A write at `offset` of the page. The index takes its low byte at any width, the window 32 bits only.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], send: Send<'_>) {
        match (offset & 0xff, data) {
            (0x00, [index, ..]) => self.index = *index,
            (0x10, [a, b, c, d, ..]) => self.write_register(u32::from_le_bytes([*a, *b, *c, *d]), send),
            _ => {}
        }
    }
}

/// The message that an entry stands for.
fn message(entry: Redirection) -> Message {
    Message {
        mode: entry.mode(),
        vector: entry.vector(),
        level: entry.level(),
        destination: Destination::Address {
            id: entry.destination().into(),
            logical: entry.logical(),
            wide: false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(state: &mut State, index: u8, value: u32) -> Vec<Message> {
        let mut sent = vec![];
        let mut send = |m| {
            sent.push(m);
            true
        };
        state.mmio_write(0, &[index], &mut send);
        state.mmio_write(0x10, &value.to_le_bytes(), &mut send);
        sent
    }

    fn level(state: &mut State, pin: usize, high: bool) -> usize {
        let mut sent = 0;
        state.set_level(pin, high, &mut |_| {
            sent += 1;
            true
        });
        sent
    }

    #[test]
    fn the_version_register_tells_24_entries_and_the_id_is_four_bits() {
        let mut state = State::default();
        write(&mut state, 1, 0);
        let mut data = [0; 4];
        state.mmio_read(0x10, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0017_0011);
        write(&mut state, 0, 0xff00_0000);
        state.mmio_read(0x10, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0f00_0000);
    }

    #[test]
    fn an_edge_is_sent_once_and_lost_while_masked() {
        let mut state = State::default();
        assert_eq!(level(&mut state, 4, true), 0);
        assert_eq!(write(&mut state, 0x10 + 8, 0x44), []);
        assert_eq!(level(&mut state, 4, true), 0);
        assert_eq!(level(&mut state, 4, false), 0);
        assert_eq!(level(&mut state, 4, true), 1);
        assert!(!state.table[4].remote_irr());
    }

    #[test]
    fn a_level_is_sent_again_after_its_eoi_while_it_is_held() {
        let mut state = State::default();
        write(&mut state, 0x10 + 22, 0x8055);
        assert_eq!(level(&mut state, 11, true), 1);
        assert!(state.table[11].remote_irr());
        assert_eq!(level(&mut state, 11, false) + level(&mut state, 11, true), 0);
        let mut sent = vec![];
        let mut send = |m: Message| {
            sent.push(m.vector);
            true
        };
        state.end_of_interrupt(0x56, &mut send);
        state.end_of_interrupt(0x55, &mut send);
        assert_eq!(sent, [0x55]);
        level(&mut state, 11, false);
        let mut none = |_: Message| unreachable!("the line is low");
        state.end_of_interrupt(0x55, &mut none);
        assert!(!state.table[11].remote_irr());
    }

    #[test]
    fn a_held_level_is_sent_when_it_is_unmasked_and_edge_mode_clears_remote_irr() {
        let mut state = State::default();
        write(&mut state, 0x10 + 22, 0x1_8055);
        assert_eq!(level(&mut state, 11, true), 0);
        assert_eq!(write(&mut state, 0x10 + 22, 0x8055).len(), 1);
        assert!(state.table[11].remote_irr());
        write(&mut state, 0x10 + 22, 0x1_0055);
        assert!(!state.table[11].remote_irr());
    }

    #[test]
    fn a_level_that_nobody_takes_is_tried_again() {
        let mut state = State::default();
        write(&mut state, 0x10, 0x8055);
        state.set_level(0, true, &mut |_| false);
        assert!(!state.table[0].remote_irr());
        assert_eq!(write(&mut state, 0x11, 0), [message(state.table[0])].map(|m| m));
    }

    #[test]
    fn read_only_bits_stay_and_registers_that_do_not_exist_read_ones() {
        let mut state = State::default();
        write(&mut state, 0x10, 0xffff_ffff);
        assert_eq!(state.table[0].into_bits(), 0x1_afff);
        write(&mut state, 0x40, 0x1234);
        let mut data = [0; 4];
        state.mmio_read(0x10, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
