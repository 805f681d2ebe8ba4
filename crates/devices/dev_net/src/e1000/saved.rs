//! Saved state, version 1: cable, MAC address, registers in the order of the register table, tables, PHY, serial buses, the packet
//! under way and frames not yet sent.

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::serial::{EEPROM_WORDS, Management, Microwire};
use super::spec::{Context, KEPT, cause, reg};
use super::{E1000, MAX_PACKET, Sending, State};

const VERSION: u32 = 1;
/// Frames that one packet becomes at most, with room to spare.
const MAX_PENDING: u32 = 2048;

/// Registers that are no [`KEPT`] ones: the MDI control, statistics, multicast, receive-address and VLAN tables.
fn tables() -> impl Iterator<Item = u32> {
    let ranges = [reg::MDIC..reg::MDIC + 4, reg::STATS..reg::STATS_END, reg::MTA..0x5480, reg::VFTA..0x5800];
    ranges.into_iter().flat_map(|range| range.step_by(4))
}

impl Saveable for E1000 {
    fn unit_name(&self) -> &'static str {
        "e1000"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        let State {
            regs: _,
            icr,
            ims,
            link,
            phy,
            microwire: Microwire { count, command, position },
            management: Management { count: management_count, bits, data, level },
            io_address,
            contexts,
            sending: Sending { started, segmented, options, dropped },
            packet,
            pending,
            quiet_until,
        } = &self.state;
        out.put_bytes(&self.mac);
        KEPT.iter().map(|k| k.0).chain(tables()).for_each(|at| out.put_u32(self.state.reg(at)));
        out.put_u32(*icr);
        out.put_u32(*ims);
        out.put_bool(*link);
        phy.iter().for_each(|value| out.put_u16(*value));
        out.put_u8(*count);
        out.put_u16(*command);
        out.put_bool(position.is_some());
        out.put_u16(position.unwrap_or(0));
        out.put_u8(*management_count);
        out.put_u32(*bits);
        out.put_u16(*data);
        out.put_bool(*level);
        out.put_u32(*io_address);
        contexts.iter().flat_map(|c| c.words).for_each(|word| out.put_u64(word));
        [*started, *segmented, *dropped].into_iter().for_each(|flag| out.put_bool(flag));
        out.put_u8(*options);
        out.put_blob(packet);
        out.put_u32(pending.len() as u32);
        pending.iter().for_each(|frame| out.put_blob(frame));
        out.put_u64(*quiet_until);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let mut mac = [0; 6];
        input.take_into(&mut mac)?;
        if mac != self.mac {
            return Err(input.invalid("the network card has another MAC address"));
        }
        let mut state = State::power_on(mac, false, [0; 32]);
        for (at, mask) in KEPT {
            let value = input.take_u32()?;
            // The EEPROM read register shows more than is written to it.
            if *at != reg::EERD && value & !mask != 0 && value != state.reg(*at) {
                return Err(input.invalid(format!("register 0x{at:x}")));
            }
            state.set(*at, value);
        }
        for at in tables() {
            state.set(at, input.take_u32()?);
        }
        state.icr = input.take_u32()?;
        state.ims = input.take_u32()?;
        if (state.icr | state.ims) & !cause::ALL != 0 {
            return Err(input.invalid("interrupt causes"));
        }
        state.link = input.take_bool()?;
        for value in &mut state.phy {
            *value = input.take_u16()?;
        }
        let (count, command) = (input.take_u8()?, input.take_u16()?);
        let (reading, position) = (input.take_bool()?, input.take_u16()?);
        if count > 9 || usize::from(position) >= EEPROM_WORDS * 16 || command >> 9 != 0 {
            return Err(input.invalid("the EEPROM's bus"));
        }
        state.microwire = Microwire { count, command, position: reading.then_some(position) };
        state.management = Management {
            count: input.take_u8()?,
            bits: input.take_u32()?,
            data: input.take_u16()?,
            level: input.take_bool()?,
        };
        if state.management.count > 31 {
            return Err(input.invalid("the PHY's bus"));
        }
        state.io_address = input.take_u32()?;
        for context in &mut state.contexts {
            *context = Context { words: [input.take_u64()?, input.take_u64()?] };
        }
        state.sending = Sending {
            started: input.take_bool()?,
            segmented: input.take_bool()?,
            dropped: input.take_bool()?,
            options: input.take_u8()?,
        };
        state.packet = input.take_blob(MAX_PACKET)?.to_vec();
        let frames = input.take_u32()?;
        if frames > MAX_PENDING {
            return Err(input.invalid("too many frames wait"));
        }
        for _ in 0..frames {
            state.pending.push_back(input.take_blob(MAX_PACKET + 4)?.to_vec());
        }
        state.quiet_until = input.take_u64()?;
        input.finish()?;
        self.state = state;
        // The line shows what waits; the time until the next interrupt stays what it was.
        let quiet_until = self.state.quiet_until;
        self.level = false;
        self.wiring.irq.set(false);
        self.update_irq();
        self.state.quiet_until = quiet_until;
        // Frames that wait go on their way when time runs again.
        self.tx.arm(self.tx.clock().now());
        Ok(())
    }
}
