//! Configuration pages. Source: Fusion-MPT Message Passing Interface Specification 1.5, configuration chapter; the pages that
//! VirtualBox's controllers have, as far as their content means something.
//!
//! A page begins with its header: version, length in words, number, type with attributes. Extended pages give the length in a second
//! word.

use super::Model;

/// Page types, less attributes.
pub(super) const EXTENDED: u8 = 0x0f;
const IO_UNIT: u8 = 0;
const IOC: u8 = 1;
const SPI_PORT: u8 = 3;
const SPI_DEVICE: u8 = 4;
const MANUFACTURING: u8 = 9;
const SAS_IO_UNIT: u8 = 0x10;
const SAS_DEVICE: u8 = 0x12;
const SAS_PHY: u8 = 0x13;

/// Page attributes.
const READ_ONLY: u8 = 0x00;
const CHANGEABLE: u8 = 0x10;
const PERSISTENT_READ_ONLY: u8 = 0x30;

/// The initiator's own SCSI id.
pub(super) const HOST_ID: u8 = 7;
/// SPI: information units, DT, QAS, any sync period, offset 255, wide, AIP.
const SPI_CAPABILITIES: u32 = 0xa0ff_0007;
/// Low voltage differential.
const SPI_INTERFACE: u32 = 3;
/// Disconnection, scans of ids and units, tags, boot choice.
const SPI_DEVICE_FLAGS: u16 = 0x002f;

/// SAS device types and roles.
const END_DEVICE: u32 = 1;
const SSP_INITIATOR: u32 = 1 << 6;
const SSP_TARGET: u32 = 1 << 10;
const DIRECT: u32 = 1 << 11;
/// 1.5 to 3 Gbit/s.
const LINK_RATES: u8 = 0x98;
const NEGOTIATED: u8 = 9;
const NO_LINK: u8 = 2;

/// What pages tell of the controller.
pub(super) struct Facts<'a> {
    pub(super) model: Model,
    /// Which places have a drive.
    pub(super) present: &'a [bool],
    /// Parameters that the guest has asked for, by target (SPI device page 1).
    pub(super) spi_requests: &'a [[u32; 2]],
    /// PCI device and function.
    pub(super) devfn: u8,
}

/// Which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    /// Without attributes.
    pub(super) kind: u8,
    pub(super) extended: u8,
    pub(super) number: u8,
    pub(super) address: u32,
}

struct Page(Vec<u8>);

impl Page {
    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// Text in a field of `len` bytes.
    fn text(self, len: usize, text: &str) -> Self {
        let end = self.0.len() + len;
        let mut page = self.bytes(&text.as_bytes()[..text.len().min(len)]);
        page.0.resize(end, 0);
        page
    }
}

impl Facts<'_> {
    /// The page, header first; none if the controller has no such page.
    pub(super) fn page(&self, name: Name) -> Option<Vec<u8>> {
        let (attributes, version, page) = match name.kind {
            EXTENDED if self.model == Model::Sas => self.sas(name)?,
            SPI_PORT | SPI_DEVICE if self.model == Model::Spi => self.spi(name)?,
            _ => self.common(name)?,
        };
        let mut bytes = page.0;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let words = bytes.len() / 4;
        bytes[0] = version;
        (bytes[2], bytes[3]) = (name.number, name.kind | attributes);
        if name.kind == EXTENDED {
            bytes[4..6].copy_from_slice(&(words as u16).to_le_bytes());
            bytes[6] = name.extended;
        } else {
            bytes[1] = words.min(255) as u8;
        }
        Some(bytes)
    }

    fn common(&self, name: Name) -> Option<(u8, u8, Page)> {
        let page = Page(vec![0; 4]);
        Some(match (name.kind, name.number) {
            (MANUFACTURING, 0) => {
                let board = "VBox MPT Fusion";
                let page = page.text(16, board).text(8, "1.0").text(16, board).text(16, "SUN");
                (PERSISTENT_READ_ONLY, 0, page.text(16, "CAFECAFECAFECAFE"))
            }
            (MANUFACTURING, 2 | 3) => {
                let page = page.u16(self.model.device()).u8(0).u8(0);
                (PERSISTENT_READ_ONLY, 0, page.zeros(4))
            }
            (IO_UNIT, 0) => (READ_ONLY, 0, page.u32(0xcafe).u32(0)),
            // One function; no integrated RAID.
            (IO_UNIT, 1) => (READ_ONLY, 2, page.u32(0x0000_0041)),
            (IO_UNIT, 2) => {
                let page = page.u32(0).u32(0xcafe_cafe).u8(0).u8(self.devfn).u16(3);
                (READ_ONLY, 2, page.zeros(16))
            }
            (IO_UNIT, 3) => (CHANGEABLE, 1, page.zeros(4)),
            (IOC, 0) => {
                let page = page.u32(0).u32(0).u16(0x1000).u16(self.model.device()).u32(0);
                (READ_ONLY, 1, page.u32(self.model.class().into()).u16(0x1000).u16(0x8000))
            }
            // Replies are not held back to be told together.
            (IOC, 1) => (READ_ONLY, 3, page.zeros(12)),
            // No volumes, disks or enclosure processors of integrated RAID.
            (IOC, 2) => (READ_ONLY, 4, page.zeros(8)),
            (IOC, 3) => (READ_ONLY, 0, page.zeros(4)),
            (IOC, 4) => (READ_ONLY, 0, page.zeros(4)),
            _ => return None,
        })
    }

    fn spi(&self, name: Name) -> Option<(u8, u8, Page)> {
        let page = Page(vec![0; 4]);
        let [target, bus, _, _] = name.address.to_le_bytes();
        let requested = self.spi_requests.get(usize::from(target)).copied();
        Some(match (name.kind, name.number) {
            (SPI_PORT, _) if target != 0 => return None,
            (SPI_PORT, 0) => (READ_ONLY, 2, page.u32(SPI_CAPABILITIES).u32(SPI_INTERFACE)),
            (SPI_PORT, 1) => {
                let responds = 1u32 << (16 + HOST_ID);
                (READ_ONLY, 3, page.u32(responds | u32::from(HOST_ID)).u32(0).u32(0))
            }
            (SPI_PORT, 2) => {
                // Both BIOS and driver initialise the controller.
                let mut page = page.u32(0).u32(0x30 | u32::from(HOST_ID));
                for _ in self.present {
                    page = page.u8(10).u8(8).u16(SPI_DEVICE_FLAGS);
                }
                (READ_ONLY, 2, page)
            }
            (SPI_DEVICE, _) if bus != 0 || requested.is_none() => return None,
            // What was asked for is what was agreed upon.
            (SPI_DEVICE, 0) => (READ_ONLY, 4, page.u32(requested?[0]).u32(1)),
            (SPI_DEVICE, 1) => {
                let [parameters, configuration] = requested?;
                (CHANGEABLE, 5, page.u32(parameters).u32(0).u32(configuration))
            }
            (SPI_DEVICE, 2) => (READ_ONLY, 1, page.zeros(12)),
            (SPI_DEVICE, 3) => (READ_ONLY, 0, page.zeros(8)),
            _ => return None,
        })
    }

    fn is_present(&self, phy: usize) -> bool {
        self.present.get(phy).copied().unwrap_or(false)
    }

    /// Handles: 1 to n are the controller's own phys, n + 1 to 2n the drives behind them.
    fn own_handle(phy: usize) -> u16 {
        phy as u16 + 1
    }

    pub(super) fn drive_handle(&self, phy: usize) -> u16 {
        (self.present.len() + phy) as u16 + 1
    }

    fn attached(&self, phy: usize) -> u16 {
        if self.is_present(phy) { self.drive_handle(phy) } else { 0 }
    }

    /// The phy that a handle belongs to, and whether it is the controller's end.
    fn owner(&self, handle: u16) -> Option<(usize, bool)> {
        let index = usize::from(handle).checked_sub(1)?;
        let phys = self.present.len();
        match index {
            _ if index < phys => Some((index, true)),
            _ if self.is_present(index - phys) => Some((index - phys, false)),
            _ => None,
        }
    }

    /// A SAS address; the controller's own has 0xff in front of the phy's number.
    pub(super) fn address(phy: usize, own: bool) -> [u8; 8] {
        // Little endian, with the naming authority in the upper half of the last byte.
        [phy as u8, if own { 0xff } else { 0x06 }, 5, 4, 3, 2, 1, 0x50]
    }

    /// What a drive is.
    pub(super) fn drive_info() -> u32 {
        END_DEVICE | SSP_TARGET | DIRECT
    }

    fn sas(&self, name: Name) -> Option<(u8, u8, Page)> {
        let page = Page(vec![0; 8]);
        let phys = self.present.len();
        Some(match (name.extended, name.number) {
            (SAS_IO_UNIT, 0) => {
                let mut page = page.u32(0).u8(phys as u8).zeros(3);
                for phy in 0..phys {
                    let there = self.is_present(phy);
                    let rate = if there { NEGOTIATED } else { NO_LINK };
                    page = page.u8(phy as u8).u8(0).u8(0).u8(rate).u32(END_DEVICE | SSP_INITIATOR);
                    page = page.u16(self.attached(phy)).u16(Self::own_handle(phy)).u32(0);
                }
                (READ_ONLY, 4, page)
            }
            (SAS_IO_UNIT, 1) => {
                let mut page = page.zeros(8).u8(phys as u8).zeros(3);
                for phy in 0..phys {
                    page = page.u8(phy as u8).u8(0).u8(0).u8(LINK_RATES).u32(SSP_INITIATOR).u32(0);
                }
                (READ_ONLY, 7, page)
            }
            (SAS_IO_UNIT, 2) => (READ_ONLY, 6, page.zeros(12)),
            (SAS_IO_UNIT, 3) => (READ_ONLY, 0, page.zeros(36)),
            (SAS_PHY, number @ 0..=1) => {
                // By number, or by place in the table, which is the same.
                let phy = usize::from(name.address as u16);
                if name.address >> 28 > 1 || phy >= phys {
                    return None;
                }
                if number == 1 {
                    return Some((READ_ONLY, 0, page.zeros(20)));
                }
                let there = self.is_present(phy);
                let page = page.u16(Self::own_handle(phy)).u16(0).bytes(&Self::address(phy, !there));
                let page = page.u16(self.attached(phy)).u8(phy as u8).u8(0);
                let page = page.u32(if there { Self::drive_info() } else { 0 });
                (READ_ONLY, 1, page.u8(LINK_RATES).u8(LINK_RATES).zeros(6))
            }
            (SAS_DEVICE, number @ 0..=2) => {
                let (phy, own) = self.device(name.address)?;
                let handle = if own { Self::own_handle(phy) } else { self.drive_handle(phy) };
                let address = Self::address(phy, own);
                match number {
                    0 => {
                        let page = page.u16(0).u16(0).bytes(&address);
                        let page = page.u16(if own { 0 } else { Self::own_handle(phy) }).u8(phy as u8).u8(0);
                        let page = page.u16(handle).u8(phy as u8).u8(0);
                        let info = if own { END_DEVICE | SSP_INITIATOR } else { Self::drive_info() };
                        // Present, and for drives: with target id and bus, persistently.
                        let page = page.u32(info).u16(if own { 1 } else { 7 });
                        (READ_ONLY, 5, page.u8(phy as u8).u8(0))
                    }
                    1 => {
                        let page = page.u32(0).bytes(&address).u32(0).u16(handle).u8(phy as u8).u8(0);
                        (READ_ONLY, 0, page.zeros(20))
                    }
                    _ => (READ_ONLY, 1, page.bytes(&address).u32(0)),
                }
            }
            _ => return None,
        })
    }

    /// The device that a page address names.
    fn device(&self, address: u32) -> Option<(usize, bool)> {
        let handle = address as u16;
        match address >> 28 {
            // The one after a handle.
            0 => {
                let first = if handle == 0xffff { 1 } else { handle.checked_add(1)? };
                let last = 2 * self.present.len() as u16;
                (first..=last).find_map(|handle| self.owner(handle))
            }
            // By target and bus.
            1 => {
                let [target, bus, _, _] = address.to_le_bytes();
                (bus == 0 && self.is_present(target.into())).then_some((target.into(), false))
            }
            2 => self.owner(handle),
            _ => None,
        }
    }
}

/// Takes what the guest has written to a page that it may change; false if it may not.
pub(super) fn write(name: Name, page: &[u8], spi_requests: &mut [[u32; 2]]) -> bool {
    let word = |at: usize| page.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let [target, bus, _, _] = name.address.to_le_bytes();
    match (name.kind, name.number) {
        (SPI_DEVICE, 1) if bus == 0 => {
            let (Some(request), Some(parameters), Some(configuration)) =
                (spi_requests.get_mut(usize::from(target)), word(4), word(12))
            else {
                return false;
            };
            *request = [parameters, configuration];
            true
        }
        // General purpose pins: none.
        (IO_UNIT, 3) => true,
        _ => false,
    }
}
