//! Registers and descriptors (AMD 20550, chapters "User Accessible Registers" and "Descriptor ring").

/// Control and status registers by number.
pub(super) mod csr {
    pub(crate) const STATUS: usize = 0;
    pub(crate) const IADR_LOW: usize = 1;
    pub(crate) const IADR_HIGH: usize = 2;
    /// Interrupt masks and deferral control.
    pub(crate) const MASK: usize = 3;
    /// Test and features control.
    pub(crate) const FEATURES: usize = 4;
    /// Extended control and interrupt.
    pub(crate) const EXTENDED: usize = 5;
    /// Lengths of the rings as encoded in the initialization block.
    pub(crate) const RING_LENGTHS: usize = 6;
    /// Extended control and interrupt 2: the software timer's interrupt.
    pub(crate) const EXTENDED2: usize = 7;
    /// Logical address filter, four words.
    pub(crate) const LADRF: usize = 8;
    /// Physical address, three words.
    pub(crate) const PADR: usize = 12;
    pub(crate) const MODE: usize = 15;
    /// Base addresses of the rings.
    pub(crate) const BADR_LOW: usize = 24;
    pub(crate) const BADR_HIGH: usize = 25;
    pub(crate) const BADX_LOW: usize = 30;
    pub(crate) const BADX_HIGH: usize = 31;
    /// An alias of BCR20.
    pub(crate) const STYLE: usize = 58;
    /// Ring counters and lengths, as two's complements.
    pub(crate) const RCVRC: usize = 72;
    pub(crate) const XMTRC: usize = 74;
    pub(crate) const RCVRL: usize = 76;
    pub(crate) const XMTRL: usize = 78;
    pub(crate) const FIFO: usize = 80;
    pub(crate) const CHIP_LOW: usize = 88;
    pub(crate) const CHIP_HIGH: usize = 89;
    pub(crate) const BUS_TIMEOUT: usize = 100;
    /// Missed frames.
    pub(crate) const MISSC: usize = 112;
    pub(crate) const COUNT: usize = 128;
}

/// CSR0.
pub(super) mod status {
    pub(crate) const INIT: u16 = 1 << 0;
    pub(crate) const STRT: u16 = 1 << 1;
    pub(crate) const STOP: u16 = 1 << 2;
    /// Transmit demand: look at the ring now.
    pub(crate) const TDMD: u16 = 1 << 3;
    pub(crate) const TXON: u16 = 1 << 4;
    pub(crate) const RXON: u16 = 1 << 5;
    /// Interrupt enable.
    pub(crate) const IENA: u16 = 1 << 6;
    pub(crate) const INTR: u16 = 1 << 7;
    /// Initialization done.
    pub(crate) const IDON: u16 = 1 << 8;
    pub(crate) const TINT: u16 = 1 << 9;
    pub(crate) const RINT: u16 = 1 << 10;
    pub(crate) const CERR: u16 = 1 << 13;
    /// A frame that is too long was sent.
    pub(crate) const BABL: u16 = 1 << 14;
    /// BABL, CERR, MISS or MERR.
    pub(crate) const ERR: u16 = 1 << 15;
    pub(crate) const ERRORS: u16 = 0x7800;
    /// Bits that are cleared by writing ones.
    pub(crate) const FLAGS: u16 = 0x7f00;
    /// Those of them that interrupt, unless CSR3 masks them: all but CERR.
    pub(crate) const CAUSES: u16 = 0x5f00;
}

/// CSR4.
pub(super) mod features {
    /// Transmit start.
    pub(crate) const TXSTRT: u16 = 1 << 3;
    /// User interrupt, and the command for it.
    pub(crate) const UINT: u16 = 1 << 6;
    pub(crate) const UINTCMD: u16 = 1 << 7;
    /// Auto strip: padding and check sequence of 802.3 frames go.
    pub(crate) const ASTRP_RCV: u16 = 1 << 10;
    /// No polling of the transmit ring.
    pub(crate) const DPOLL: u16 = 1 << 12;
    /// Bits that are cleared by writing ones.
    pub(crate) const FLAGS: u16 = 0x026a;
    /// Masks of interrupts; each one's flag is the bit above.
    pub(crate) const MASKS: u16 = 0x0115;
    /// What STOP clears.
    pub(crate) const STOPPED: u16 = 0x02c2;
    pub(crate) const POWER_ON: u16 = MASKS;
}

/// CSR5.
pub(super) mod extended {
    /// Suspended: the rings rest, registers can be written.
    pub(crate) const SPND: u16 = 1 << 0;
    /// Interrupt for frames whose descriptor asks for it.
    pub(crate) const LTINTEN: u16 = 1 << 14;
    /// No interrupt for frames sent well.
    pub(crate) const TOKINTD: u16 = 1 << 15;
    /// Bits that are cleared by writing ones.
    pub(crate) const FLAGS: u16 = 0x0a90;
    /// Enables of interrupts; each one's flag is the bit above.
    pub(crate) const ENABLES: u16 = 0x0548;
    /// What STOP clears.
    pub(crate) const STOPPED: u16 = 0x0011;
}

/// CSR7.
pub(super) mod extended2 {
    /// Software timer interrupt, enable and flag.
    pub(crate) const STINTE: u16 = 1 << 10;
    pub(crate) const STINT: u16 = 1 << 11;
}

/// CSR15.
pub(super) mod mode {
    pub(crate) const DRX: u16 = 1 << 0;
    pub(crate) const DTX: u16 = 1 << 1;
    pub(crate) const LOOP: u16 = 1 << 2;
    /// No frame check sequence behind frames that are sent.
    pub(crate) const DXMTFCS: u16 = 1 << 3;
    /// No physical address match.
    pub(crate) const DRCVPA: u16 = 1 << 13;
    /// No broadcasts.
    pub(crate) const DRCVBC: u16 = 1 << 14;
    pub(crate) const PROM: u16 = 1 << 15;
    /// What a reset by software keeps.
    pub(crate) const KEPT: u16 = 0x21c4;
}

/// Bus configuration registers by number.
pub(super) mod bcr {
    pub(crate) const MSRDA: usize = 0;
    pub(crate) const MSWRA: usize = 1;
    /// Miscellaneous configuration.
    pub(crate) const MC: usize = 2;
    /// Link status LED; three more follow.
    pub(crate) const LNKST: usize = 4;
    pub(crate) const LED1: usize = 5;
    pub(crate) const LED2: usize = 6;
    pub(crate) const LED3: usize = 7;
    /// Full-duplex control.
    pub(crate) const FDC: usize = 9;
    /// Burst and bus control.
    pub(crate) const BSBC: usize = 18;
    /// EEPROM control.
    pub(crate) const EECAS: usize = 19;
    /// Software style.
    pub(crate) const SWS: usize = 20;
    /// PCI latency.
    pub(crate) const PLAT: usize = 22;
    pub(crate) const PCISVID: usize = 23;
    pub(crate) const PCISID: usize = 24;
    /// Software timer.
    pub(crate) const STVAL: usize = 31;
    /// Control of the PHY.
    pub(crate) const MIICAS: usize = 32;
    pub(crate) const MIIADDR: usize = 33;
    pub(crate) const MIIMDR: usize = 34;
    pub(crate) const PCIVID: usize = 35;
    pub(crate) const COUNT: usize = 50;

    /// In MC: the address PROM can be written.
    pub(crate) const APROMWE: u16 = 1 << 7;
    /// In BSBC: registers are 32 bits wide.
    pub(crate) const DWIO: u16 = 1 << 7;
    /// In the LEDs' registers: the LED is on.
    pub(crate) const LEDOUT: u16 = 1 << 15;
    /// In the LEDs' registers: lit by the link.
    pub(crate) const LNKSTE: u16 = 1 << 6;
    /// In SWS: 32-bit structures; PCnet style descriptors.
    pub(crate) const SSIZE32: u16 = 1 << 8;
    pub(crate) const CSRPCNET: u16 = 1 << 9;
    /// In MIICAS: no auto-negotiation by the MAC; what it asks for: negotiation, full duplex, 100 Mbit/s.
    pub(crate) const DANAS: u16 = 1 << 7;
    pub(crate) const XPHYANE: u16 = 1 << 5;
    pub(crate) const XPHYFD: u16 = 1 << 4;
    pub(crate) const XPHYSP: u16 = 1 << 3;
}

/// Status bits of a descriptor, as in the upper half of its second word.
pub(super) mod dstat {
    /// The card's.
    pub(crate) const OWN: u16 = 1 << 15;
    pub(crate) const ERR: u16 = 1 << 14;
    /// Transmission: interrupt for this frame (CSR5, LTINTEN).
    pub(crate) const LTINT: u16 = 1 << 12;
    /// Start and end of a packet.
    pub(crate) const STP: u16 = 1 << 9;
    pub(crate) const ENP: u16 = 1 << 8;
    /// Reception: which filter let the frame in.
    pub(crate) const PAM: u16 = 1 << 6;
    pub(crate) const LAFM: u16 = 1 << 5;
    pub(crate) const BAM: u16 = 1 << 4;
    /// What the card writes into received descriptors.
    pub(crate) const WRITTEN: u16 = 0xff70;
}

/// Errors of transmission, in the upper half of the third word.
pub(super) mod terr {
    pub(crate) const BUFF: u16 = 1 << 15;
    pub(crate) const UFLO: u16 = 1 << 14;
    /// Loss of carrier.
    pub(crate) const LCAR: u16 = 1 << 11;
}

/// Which of the layouts the guest's structures have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// 0: words, 24-bit addresses (LANCE and PCnet-ISA).
    Words,
    /// 1 and 2: double words.
    Dwords,
    /// 3: double words, with the buffer's address last.
    Reordered,
}

impl Style {
    pub(super) fn of(sws: u16) -> Self {
        match sws & 0xff {
            1 | 2 => Self::Dwords,
            3 => Self::Reordered,
            _ => Self::Words,
        }
    }

    /// Size of a descriptor in bytes.
    pub(super) const fn size(self) -> u32 {
        match self {
            Self::Words => 8,
            Self::Dwords | Self::Reordered => 16,
        }
    }
}

/// A descriptor of either ring, whatever its layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) address: u32,
    pub(super) status: u16,
    /// The ones and the two's complement of the buffer's length.
    pub(super) count: u16,
    /// The third word: length of a received message, or errors of a transmission in its upper half.
    pub(super) message: u32,
}

impl Descriptor {
    pub(super) fn from_bytes(style: Style, raw: &[u8; 16]) -> Self {
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        match style {
            Style::Words => Self {
                address: u32::from(word(0)) | u32::from(word(2) & 0xff) << 16,
                status: word(2) & 0xff00,
                count: word(4),
                message: word(6).into(),
            },
            Style::Dwords => Self { address: dword(0), status: word(6), count: word(4), message: dword(8) },
            Style::Reordered => {
                Self { address: dword(8), status: word(6), count: word(4), message: dword(0) }
            }
        }
    }

    pub(super) fn is(&self, bit: u16) -> bool {
        self.status & bit != 0
    }

    /// Whether the card may use it: its four ones are there.
    pub(super) fn makes_sense(&self) -> bool {
        self.count >> 12 == 0xf
    }

    /// Length of the buffer in bytes, 1 to 4096.
    pub(super) fn len(&self) -> usize {
        0x1000 - usize::from(self.count & 0xfff)
    }
}
