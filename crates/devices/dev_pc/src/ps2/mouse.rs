//! A PS/2 mouse with Microsoft's IntelliMouse (wheel) and IntelliMouse Explorer (five buttons) protocols.
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, "Mouse"; Microsoft, "Windows hardware design: five-button
//! wheel mouse" for the identification by sample rates.
//!
//! Motion that the guest has not fetched is added up, button changes are kept apart. Packets are not slowed to the sample
//! rate.

use std::collections::VecDeque;

use super::{load_command, load_queue, save_command, save_queue};

/// Motions between button changes that wait for the guest.
const EVENT_LIMIT: usize = 64;
/// The most motion that one event holds in each direction.
const MOTION_LIMIT: i32 = 0x7fff;
/// Bytes that wait for the guest: an answer and a packet.
const OUT_LIMIT: usize = 16;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;

/// What the mouse sends when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stream,
    Remote,
    /// Everything received is sent back.
    Wrap,
}

/// Motion with the buttons held during it. Counts grow to the right, upwards and towards the user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Motion {
    dx: i32,
    dy: i32,
    dz: i32,
    /// Bit 0 left, 1 right, 2 middle, 3 and 4 the side buttons.
    buttons: u8,
}

/// Guest-visible state of the mouse.
#[derive(Clone, Debug)]
pub struct Mouse {
    mode: Mode,
    /// The mode that reset-wrap returns to.
    before_wrap: Mode,
    enabled: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    /// The last three sample rates set, newest last.
    rates: [u8; 3],
    /// Device id: 0 plain, 3 wheel, 4 wheel and five buttons.
    id: u8,
    command: Option<u8>,
    buttons: u8,
    events: VecDeque<Motion>,
    out: VecDeque<u8>,
    last: u8,
}

impl Mouse {
    pub fn power_on() -> Self {
        Self {
            mode: Mode::Stream,
            before_wrap: Mode::Stream,
            enabled: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            rates: [0; 3],
            id: 0,
            command: None,
            buttons: 0,
            events: VecDeque::new(),
            out: VecDeque::new(),
            last: 0,
        }
    }

    /// The next byte for the controller.
    pub fn pop(&mut self) -> Option<u8> {
        if self.out.is_empty() && self.mode == Mode::Stream && self.enabled && self.command.is_none() {
            if let Some(motion) = self.next_motion() {
                self.packet(motion, self.scaling);
            }
        }
        let byte = self.out.pop_front()?;
        self.last = byte;
        Some(byte)
    }

    /// Takes motion (`dy` grows downwards) and buttons from a client.
    pub fn put(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        let buttons = buttons & 0x1f;
        if dx == 0 && dy == 0 && dz == 0 && buttons == self.buttons {
            return;
        }
        self.buttons = buttons;
        if self.mode == Mode::Stream && !self.enabled {
            return;
        }
        let is_full = self.events.len() >= EVENT_LIMIT;
        match self.events.back_mut() {
            Some(last) if last.buttons == buttons || is_full => {
                let add = |sum: i32, count: i32| sum.saturating_add(count).clamp(-MOTION_LIMIT, MOTION_LIMIT);
                last.dx = add(last.dx, dx);
                last.dy = add(last.dy, dy.saturating_neg());
                last.dz = add(last.dz, dz);
                last.buttons = buttons;
            }
            _ => {
                let clamp = |count: i32| count.clamp(-MOTION_LIMIT, MOTION_LIMIT);
                self.events.push_back(Motion { dx: clamp(dx), dy: -clamp(dy), dz: clamp(dz), buttons });
            }
        }
    }

    /// Takes as much motion as one packet holds.
    fn next_motion(&mut self) -> Option<Motion> {
        let event = self.events.front_mut()?;
        let wheel = match self.id {
            0 => 0,
            3 => event.dz.clamp(-128, 127),
            _ => event.dz.clamp(-8, 7),
        };
        let motion = Motion {
            dx: event.dx.clamp(-255, 255),
            dy: event.dy.clamp(-255, 255),
            dz: wheel,
            buttons: event.buttons,
        };
        event.dx -= motion.dx;
        event.dy -= motion.dy;
        event.dz = if self.id == 0 { 0 } else { event.dz - wheel };
        if (event.dx, event.dy, event.dz) == (0, 0, 0) {
            self.events.pop_front();
        }
        Some(motion)
    }

    fn packet(&mut self, motion: Motion, scaling: bool) {
        let scale = |count: i32| {
            let size = match count.abs() {
                small @ 0..=1 => small,
                2 => 1,
                3 => 3,
                4 => 6,
                5 => 9,
                large => 2 * large,
            };
            if scaling { size.min(255) * count.signum() } else { count }
        };
        let (dx, dy) = (scale(motion.dx), scale(motion.dy));
        let first = 0x08 | motion.buttons & 7 | u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        self.out.extend([first, dx as u8, dy as u8]);
        match self.id {
            3 => self.out.push_back(motion.dz as u8),
            4 => self.out.push_back(motion.dz as u8 & 0xf | (motion.buttons & 0x18) << 1),
            _ => {}
        }
    }

    fn defaults(&mut self) {
        self.mode = Mode::Stream;
        self.enabled = false;
        self.scaling = false;
        self.resolution = 2;
        self.rate = 100;
        self.rates = [0; 3];
        self.events.clear();
    }

    fn status(&self) -> [u8; 3] {
        let b = self.buttons;
        let flags = u8::from(self.mode == Mode::Remote) << 6
            | u8::from(self.enabled) << 5
            | u8::from(self.scaling) << 4
            | (b & 1) << 2
            | (b & 4) >> 1
            | (b & 2) >> 1;
        [flags, self.resolution, self.rate]
    }

    /// A byte from the controller.
    pub fn command(&mut self, byte: u8) {
        if self.mode == Mode::Wrap && !matches!(byte, 0xec | 0xff) {
            self.out.clear();
            self.out.push_back(byte);
            return;
        }
        // A command stops what the mouse was sending.
        self.out.clear();
        if let Some(command) = self.command.take() {
            let good = match command {
                0xe8 => byte <= 3,
                _ => matches!(byte, 10 | 20 | 40 | 60 | 80 | 100 | 200),
            };
            if !good {
                self.out.push_back(RESEND);
                return;
            }
            if command == 0xe8 {
                self.resolution = byte;
            } else {
                self.rate = byte;
                self.rates = [self.rates[1], self.rates[2], byte];
                match self.rates {
                    [200, 100, 80] => self.id = 3,
                    [200, 200, 80] => self.id = 4,
                    _ => {}
                }
            }
            self.out.push_back(ACK);
            return;
        }
        self.out.push_back(ACK);
        match byte {
            0xe6 => self.scaling = false,
            0xe7 => self.scaling = true,
            0xe8 | 0xf3 => self.command = Some(byte),
            0xe9 => self.out.extend(self.status()),
            0xea => {
                self.mode = Mode::Stream;
                self.events.clear();
            }
            0xeb => {
                let motion =
                    self.next_motion().unwrap_or(Motion { buttons: self.buttons, ..Motion::default() });
                self.packet(motion, false);
            }
            0xec => {
                if self.mode == Mode::Wrap {
                    self.mode = self.before_wrap;
                }
            }
            0xee => {
                self.before_wrap = self.mode;
                self.mode = Mode::Wrap;
            }
            0xf0 => {
                self.mode = Mode::Remote;
                self.events.clear();
            }
            0xf2 => self.out.push_back(self.id),
            0xf4 => {
                self.enabled = true;
                self.events.clear();
            }
            0xf5 => self.enabled = false,
            0xf6 => self.defaults(),
            0xfe => {
                self.out.clear();
                self.out.push_back(self.last);
            }
            0xff => {
                self.defaults();
                self.id = 0;
                self.out.extend([0xaa, self.id]);
            }
            _ => {
                self.out.clear();
                self.out.push_back(RESEND);
            }
        }
    }

    pub(crate) fn save(&self, out: &mut ssm::Writer) {
        let Self {
            mode,
            before_wrap,
            enabled,
            scaling,
            resolution,
            rate,
            rates,
            id,
            command,
            buttons,
            events,
            out: queue,
            last,
        } = self;
        out.put_bytes(&[*mode as u8, *before_wrap as u8, *resolution, *rate, *id, *buttons, *last]);
        out.put_bytes(rates);
        out.put_bool(*enabled);
        out.put_bool(*scaling);
        save_command(*command, out);
        save_queue(queue, out);
        out.put_u32(events.len() as u32);
        for Motion { dx, dy, dz, buttons } in events {
            for count in [dx, dy, dz] {
                out.put_u32(*count as u32);
            }
            out.put_u8(*buttons);
        }
    }

    pub(crate) fn load(input: &mut ssm::Reader<'_>) -> Result<Self, ssm::Error> {
        fn mode(input: &mut ssm::Reader<'_>) -> Result<Mode, ssm::Error> {
            Ok(match input.take_u8()? {
                0 => Mode::Stream,
                1 => Mode::Remote,
                2 => Mode::Wrap,
                other => return Err(input.invalid(format!("mouse mode {other}"))),
            })
        }
        let (now, before_wrap) = (mode(input)?, mode(input)?);
        let [resolution, rate, id, buttons, last] =
            [input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?];
        if !matches!(id, 0 | 3 | 4) || resolution > 3 || buttons > 0x1f {
            return Err(
                input.invalid(format!("mouse id {id}, resolution {resolution}, buttons {buttons:#x}"))
            );
        }
        let mut rates = [0; 3];
        input.take_into(&mut rates)?;
        let (enabled, scaling) = (input.take_bool()?, input.take_bool()?);
        let command = load_command(input)?;
        let out = load_queue(input, OUT_LIMIT)?;
        let count = input.take_u32()? as usize;
        if count > EVENT_LIMIT {
            return Err(input.invalid(format!("{count} mouse events")));
        }
        let mut events = VecDeque::with_capacity(count);
        for _ in 0..count {
            let [dx, dy, dz] =
                [input.take_u32()?, input.take_u32()?, input.take_u32()?].map(|raw| raw as i32);
            events.push_back(Motion { dx, dy, dz, buttons: input.take_u8()? & 0x1f });
        }
        Ok(Self {
            mode: now,
            before_wrap,
            enabled,
            scaling,
            resolution,
            rate,
            rates,
            id,
            command,
            buttons,
            events,
            out,
            last,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mouse: &mut Mouse) -> Vec<u8> {
        std::iter::from_fn(|| mouse.pop()).collect()
    }

    fn send(mouse: &mut Mouse, bytes: &[u8]) -> Vec<u8> {
        bytes
            .iter()
            .flat_map(|&byte| {
                mouse.command(byte);
                drain(mouse)
            })
            .collect()
    }

    #[test]
    fn reset_reports_a_plain_mouse() {
        let mut m = Mouse::power_on();
        assert_eq!(send(&mut m, &[0xff]), [0xfa, 0xaa, 0x00]);
        assert_eq!(send(&mut m, &[0xf2]), [0xfa, 0x00]);
        assert_eq!(send(&mut m, &[0xe9]), [0xfa, 0x00, 2, 100]);
    }

    #[test]
    fn the_magic_rates_turn_the_wheel_and_the_side_buttons_on() {
        let mut m = Mouse::power_on();
        send(&mut m, &[0xf3, 200, 0xf3, 100, 0xf3, 80]);
        assert_eq!(send(&mut m, &[0xf2]), [0xfa, 3]);
        send(&mut m, &[0xf3, 200, 0xf3, 200, 0xf3, 80]);
        assert_eq!(send(&mut m, &[0xf2]), [0xfa, 4]);
        send(&mut m, &[0xf4]);
        m.put(0, 0, -1, 0x10);
        assert_eq!(drain(&mut m), [0x08, 0, 0, 0x2f]);
    }

    #[test]
    fn motion_is_signed_and_upwards() {
        let mut m = Mouse::power_on();
        send(&mut m, &[0xf4]);
        m.put(-3, 5, 0, 0b101);
        assert_eq!(drain(&mut m), [0x08 | 0x05 | 0x30, 0xfd, 0xfb]);
    }

    #[test]
    fn unfetched_motion_adds_up_and_buttons_do_not_get_lost() {
        let mut m = Mouse::power_on();
        send(&mut m, &[0xf4]);
        m.put(200, 0, 0, 0);
        m.put(100, 0, 0, 0);
        m.put(0, 0, 0, 1);
        m.put(0, 0, 0, 0);
        assert_eq!(drain(&mut m), [0x08, 255, 0, 0x08, 45, 0, 0x09, 0, 0, 0x08, 0, 0]);
    }

    #[test]
    fn remote_mode_sends_when_asked() {
        let mut m = Mouse::power_on();
        send(&mut m, &[0xf0]);
        m.put(1, 0, 0, 0);
        assert_eq!(drain(&mut m), []);
        assert_eq!(send(&mut m, &[0xeb]), [0xfa, 0x08, 1, 0]);
        assert_eq!(send(&mut m, &[0xeb]), [0xfa, 0x08, 0, 0]);
    }

    #[test]
    fn wrap_mode_echoes_until_it_is_left() {
        let mut m = Mouse::power_on();
        assert_eq!(send(&mut m, &[0xee, 0xf4, 0x12, 0xec]), [0xfa, 0xf4, 0x12, 0xfa]);
        assert_eq!(send(&mut m, &[0xf3, 33]), [0xfa, 0xfe], "no such rate");
    }
}
