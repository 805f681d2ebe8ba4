//! Registers and descriptors (Intel 317453, chapters 3 and 13).

/// Register offsets in bytes.
pub(super) mod reg {
    pub(crate) const CTRL: u32 = 0x0;
    /// A shadow of CTRL.
    pub(crate) const CTRL_DUP: u32 = 0x4;
    pub(crate) const STATUS: u32 = 0x8;
    pub(crate) const EECD: u32 = 0x10;
    pub(crate) const EERD: u32 = 0x14;
    pub(crate) const CTRL_EXT: u32 = 0x18;
    pub(crate) const MDIC: u32 = 0x20;
    pub(crate) const FCAL: u32 = 0x28;
    pub(crate) const FCAH: u32 = 0x2c;
    pub(crate) const FCT: u32 = 0x30;
    pub(crate) const VET: u32 = 0x38;
    pub(crate) const ICR: u32 = 0xc0;
    pub(crate) const ITR: u32 = 0xc4;
    pub(crate) const ICS: u32 = 0xc8;
    pub(crate) const IMS: u32 = 0xd0;
    pub(crate) const IMC: u32 = 0xd8;
    pub(crate) const RCTL: u32 = 0x100;
    pub(crate) const FCTTV: u32 = 0x170;
    pub(crate) const TXCW: u32 = 0x178;
    pub(crate) const TCTL: u32 = 0x400;
    pub(crate) const TIPG: u32 = 0x410;
    pub(crate) const AIFS: u32 = 0x458;
    pub(crate) const LEDCTL: u32 = 0xe00;
    pub(crate) const PBA: u32 = 0x1000;
    pub(crate) const FCRTL: u32 = 0x2160;
    pub(crate) const FCRTH: u32 = 0x2168;
    pub(crate) const RDBAL: u32 = 0x2800;
    pub(crate) const RDBAH: u32 = 0x2804;
    pub(crate) const RDLEN: u32 = 0x2808;
    pub(crate) const RDH: u32 = 0x2810;
    pub(crate) const RDT: u32 = 0x2818;
    pub(crate) const RDTR: u32 = 0x2820;
    pub(crate) const RXDCTL: u32 = 0x2828;
    pub(crate) const RADV: u32 = 0x282c;
    pub(crate) const RSRPD: u32 = 0x2c00;
    pub(crate) const TDBAL: u32 = 0x3800;
    pub(crate) const TDBAH: u32 = 0x3804;
    pub(crate) const TDLEN: u32 = 0x3808;
    pub(crate) const TDH: u32 = 0x3810;
    pub(crate) const TDT: u32 = 0x3818;
    pub(crate) const TIDV: u32 = 0x3820;
    pub(crate) const TXDCTL: u32 = 0x3828;
    pub(crate) const TADV: u32 = 0x382c;
    pub(crate) const TSPMT: u32 = 0x3830;
    /// First and last statistics register.
    pub(crate) const STATS: u32 = 0x4000;
    pub(crate) const STATS_END: u32 = 0x4100;
    pub(crate) const GPRC: u32 = 0x4074;
    pub(crate) const BPRC: u32 = 0x4078;
    pub(crate) const MPRC: u32 = 0x407c;
    pub(crate) const GPTC: u32 = 0x4080;
    pub(crate) const GORCL: u32 = 0x4088;
    pub(crate) const GOTCL: u32 = 0x4090;
    pub(crate) const TORL: u32 = 0x40c0;
    pub(crate) const TOTL: u32 = 0x40c8;
    pub(crate) const TPR: u32 = 0x40d0;
    pub(crate) const TPT: u32 = 0x40d4;
    pub(crate) const MPTC: u32 = 0x40f0;
    pub(crate) const BPTC: u32 = 0x40f4;
    pub(crate) const TSCTC: u32 = 0x40f8;
    pub(crate) const RXCSUM: u32 = 0x5000;
    pub(crate) const MTA: u32 = 0x5200;
    pub(crate) const RA: u32 = 0x5400;
    pub(crate) const VFTA: u32 = 0x5600;
    pub(crate) const WUC: u32 = 0x5800;
    pub(crate) const WUFC: u32 = 0x5808;
    pub(crate) const WUS: u32 = 0x5810;
    pub(crate) const MANC: u32 = 0x5820;
    pub(crate) const END: u32 = 0x6000;
}

/// Registers that keep what is written to them, with the bits that they keep. Those with effects are among them.
pub(super) const KEPT: &[(u32, u32)] = &[
    (reg::CTRL, 0x7fff_ffff),
    (reg::EECD, 0x0000_007f),
    (reg::EERD, 0xffff_ff00),
    (reg::CTRL_EXT, 0xffff_ffff),
    (reg::FCAL, 0xffff_ffff),
    (reg::FCAH, 0x0000_ffff),
    (reg::FCT, 0x0000_ffff),
    (reg::VET, 0x0000_ffff),
    (reg::ITR, 0x0000_ffff),
    (reg::RCTL, 0x07ff_ffff),
    (reg::FCTTV, 0x0000_ffff),
    (reg::TXCW, 0xffff_ffff),
    (reg::TCTL, 0x03ff_fffa),
    (reg::TIPG, 0x3fff_ffff),
    (reg::AIFS, 0x0000_ffff),
    (reg::LEDCTL, 0xffff_ffff),
    (reg::PBA, 0x0000_ffff),
    (reg::FCRTL, 0x8000_fff8),
    (reg::FCRTH, 0x0000_fff8),
    (reg::RDBAL, 0xffff_fff0),
    (reg::RDBAH, 0xffff_ffff),
    (reg::RDLEN, 0x000f_ff80),
    (reg::RDH, 0x0000_ffff),
    (reg::RDT, 0x0000_ffff),
    (reg::RDTR, 0x0000_ffff),
    (reg::RXDCTL, 0xffff_ffff),
    (reg::RADV, 0x0000_ffff),
    (reg::RSRPD, 0x0000_0fff),
    (reg::TDBAL, 0xffff_fff0),
    (reg::TDBAH, 0xffff_ffff),
    (reg::TDLEN, 0x000f_ff80),
    (reg::TDH, 0x0000_ffff),
    (reg::TDT, 0x0000_ffff),
    (reg::TIDV, 0x0000_ffff),
    (reg::TXDCTL, 0xffff_ffff),
    (reg::TADV, 0x0000_ffff),
    (reg::TSPMT, 0xffff_ffff),
    (reg::RXCSUM, 0x0000_07ff),
    (reg::WUC, 0x0000_000f),
    (reg::WUFC, 0x000f_00ff),
    (reg::WUS, 0x000f_00ff),
    (reg::MANC, 0xffff_ffff),
];

pub(super) mod ctrl {
    pub(crate) const FD: u32 = 1 << 0;
    pub(crate) const SLU: u32 = 1 << 6;
    pub(crate) const SPEED_1000: u32 = 2 << 8;
    /// Data bit and clock of the bit-banged management interface (software-definable pins 2 and 3), with their direction bits.
    pub(crate) const MDIO: u32 = 1 << 20;
    pub(crate) const MDC: u32 = 1 << 21;
    pub(crate) const MDIO_DIR: u32 = 1 << 24;
    pub(crate) const RST: u32 = 1 << 26;
    pub(crate) const VME: u32 = 1 << 30;
    pub(crate) const PHY_RST: u32 = 1 << 31;
}

pub(super) mod status {
    pub(crate) const FD: u32 = 1 << 0;
    pub(crate) const LU: u32 = 1 << 1;
    pub(crate) const SPEED_1000: u32 = 2 << 6;
    pub(crate) const ASDV_1000: u32 = 2 << 8;
}

/// Interrupt causes.
pub(super) mod cause {
    pub(crate) const TXDW: u32 = 1 << 0;
    pub(crate) const TXQE: u32 = 1 << 1;
    pub(crate) const LSC: u32 = 1 << 2;
    pub(crate) const RXDMT0: u32 = 1 << 4;
    pub(crate) const RXT0: u32 = 1 << 7;
    pub(crate) const MDAC: u32 = 1 << 9;
    pub(crate) const ALL: u32 = 0x0001_ffff;
}

pub(super) mod rctl {
    pub(crate) const EN: u32 = 1 << 1;
    pub(crate) const UPE: u32 = 1 << 3;
    pub(crate) const MPE: u32 = 1 << 4;
    pub(crate) const LPE: u32 = 1 << 5;
    pub(crate) const LBM: u32 = 3 << 6;
    pub(crate) const BAM: u32 = 1 << 15;
    pub(crate) const VFE: u32 = 1 << 18;
    pub(crate) const SECRC: u32 = 1 << 26;

    /// Size of a receive buffer in bytes.
    pub(crate) fn buffer_size(rctl: u32) -> usize {
        let shift = rctl >> 16 & 3;
        match (rctl >> 25 & 1 != 0, shift) {
            (true, 1..) => 32768 >> shift,
            _ => 2048 >> shift,
        }
    }
}

pub(super) mod tctl {
    pub(crate) const EN: u32 = 1 << 1;
}

pub(super) mod rxcsum {
    pub(crate) const IPOFL: u32 = 1 << 8;
    pub(crate) const TUOFL: u32 = 1 << 9;
}

/// Command bits of transmit descriptors, all kinds.
pub(super) mod dcmd {
    pub(crate) const EOP: u8 = 1 << 0;
    /// Legacy: insert a checksum.
    pub(crate) const IC: u8 = 1 << 2;
    /// Data and context: segmentation.
    pub(crate) const TSE: u8 = 1 << 2;
    pub(crate) const RS: u8 = 1 << 3;
    pub(crate) const RPS: u8 = 1 << 4;
    pub(crate) const DEXT: u8 = 1 << 5;
    pub(crate) const VLE: u8 = 1 << 6;
    /// Context: the packet is TCP, and IPv4.
    pub(crate) const TUCMD_TCP: u8 = 1 << 0;
    pub(crate) const TUCMD_IP: u8 = 1 << 1;
}

/// Packet options of data descriptors.
pub(super) mod popts {
    pub(crate) const IXSM: u8 = 1 << 0;
    pub(crate) const TXSM: u8 = 1 << 1;
}

/// Status byte of receive descriptors.
pub(super) mod rxs {
    pub(crate) const DD: u8 = 1 << 0;
    pub(crate) const EOP: u8 = 1 << 1;
    pub(crate) const IXSM: u8 = 1 << 2;
    pub(crate) const VP: u8 = 1 << 3;
    pub(crate) const TCPCS: u8 = 1 << 5;
    pub(crate) const IPCS: u8 = 1 << 6;
    pub(crate) const PIF: u8 = 1 << 7;
    /// Error byte.
    pub(crate) const TCPE: u8 = 1 << 5;
    pub(crate) const IPE: u8 = 1 << 6;
}

/// A transmit descriptor as two little-endian quadwords.
#[derive(Clone, Copy)]
pub(super) struct TxDescriptor(pub(super) u64, pub(super) u64);

impl TxDescriptor {
    pub(super) fn from_bytes(bytes: [u8; 16]) -> Self {
        let value = u128::from_le_bytes(bytes);
        Self(value as u64, (value >> 64) as u64)
    }

    pub(super) fn command(self) -> u8 {
        (self.1 >> 24) as u8
    }

    pub(super) fn is_extended(self) -> bool {
        self.command() & dcmd::DEXT != 0
    }

    /// 0 for a context, 1 for data; others are reserved.
    pub(super) fn extended_type(self) -> u8 {
        (self.1 >> 20) as u8 & 0xf
    }

    pub(super) fn length(self) -> usize {
        if self.is_extended() { self.1 as usize & 0xf_ffff } else { self.1 as usize & 0xffff }
    }

    pub(super) fn special(self) -> u16 {
        (self.1 >> 48) as u16
    }

    /// Data: packet options. Legacy: where the checksum starts.
    pub(super) fn byte_13(self) -> u8 {
        (self.1 >> 40) as u8
    }

    /// Legacy: where the checksum goes.
    pub(super) fn checksum_offset(self) -> u8 {
        (self.1 >> 16) as u8
    }
}

/// What a context descriptor says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) words: [u64; 2],
}

impl Context {
    pub(super) fn ip_start(self) -> usize {
        self.words[0] as usize & 0xff
    }

    pub(super) fn ip_offset(self) -> usize {
        (self.words[0] >> 8) as usize & 0xff
    }

    pub(super) fn ip_end(self) -> usize {
        (self.words[0] >> 16) as usize & 0xffff
    }

    pub(super) fn tu_start(self) -> usize {
        (self.words[0] >> 32) as usize & 0xff
    }

    pub(super) fn tu_offset(self) -> usize {
        (self.words[0] >> 40) as usize & 0xff
    }

    pub(super) fn tu_end(self) -> usize {
        (self.words[0] >> 48) as usize & 0xffff
    }

    pub(super) fn is_tcp(self) -> bool {
        (self.words[1] >> 24) as u8 & dcmd::TUCMD_TCP != 0
    }

    pub(super) fn is_ipv4(self) -> bool {
        (self.words[1] >> 24) as u8 & dcmd::TUCMD_IP != 0
    }

    pub(super) fn header_len(self) -> usize {
        (self.words[1] >> 40) as usize & 0xff
    }

    pub(super) fn mss(self) -> usize {
        (self.words[1] >> 48) as usize & 0xffff
    }
}
