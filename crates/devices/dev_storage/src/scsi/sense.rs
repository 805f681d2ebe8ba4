//! Sense data: why a command failed, and what happened to a drive since the last one. Source: SPC-3 section 4.5.

use ssm::{Error, Reader, Writer};

use super::cd::op;

/// Bytes of sense data in fixed format.
pub(crate) const FIXED: usize = 18;

/// A sense key with its additional codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sense {
    pub(crate) key: u8,
    pub(crate) asc: u8,
    pub(crate) ascq: u8,
}

impl Sense {
    pub(crate) const NONE: Self = Self::new(0, 0, 0);
    pub(crate) const NO_MEDIUM: Self = Self::new(2, 0x3a, 0);
    pub(crate) const TRAY_OPEN: Self = Self::new(2, 0x3a, 2);
    pub(crate) const READ_ERROR: Self = Self::new(3, 0x11, 0);
    pub(crate) const WRITE_ERROR: Self = Self::new(3, 0x0c, 0);
    pub(crate) const PARAMETER_LIST_LENGTH: Self = Self::new(5, 0x1a, 0);
    pub(crate) const INVALID_COMMAND: Self = Self::new(5, 0x20, 0);
    pub(crate) const OUT_OF_RANGE: Self = Self::new(5, 0x21, 0);
    pub(crate) const INVALID_FIELD: Self = Self::new(5, 0x24, 0);
    pub(crate) const NO_SUCH_UNIT: Self = Self::new(5, 0x25, 0);
    pub(crate) const INVALID_PARAMETER: Self = Self::new(5, 0x26, 0);
    pub(crate) const INCOMPATIBLE_MEDIUM: Self = Self::new(5, 0x30, 2);
    pub(crate) const SAVING_NOT_SUPPORTED: Self = Self::new(5, 0x39, 0);
    pub(crate) const REMOVAL_PREVENTED: Self = Self::new(5, 0x53, 2);
    pub(crate) const ILLEGAL_MODE: Self = Self::new(5, 0x64, 0);
    pub(crate) const MEDIUM_CHANGED: Self = Self::new(6, 0x28, 0);
    pub(crate) const RESET: Self = Self::new(6, 0x29, 0);
    pub(crate) const WRITE_PROTECTED: Self = Self::new(7, 0x27, 0);
    pub(crate) const MISCOMPARE: Self = Self::new(0x0e, 0x1d, 0);

    const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq }
    }

    /// Current sense data in fixed format.
    pub(crate) fn fixed(self) -> [u8; FIXED] {
        let mut bytes = [0; FIXED];
        (bytes[0], bytes[2], bytes[7]) = (0x70, self.key, FIXED as u8 - 8);
        (bytes[12], bytes[13]) = (self.asc, self.ascq);
        bytes
    }

    /// Current sense data in descriptor format, without descriptors.
    pub(crate) fn descriptor(self) -> [u8; 8] {
        [0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0]
    }

    pub(crate) fn save(self, out: &mut Writer) {
        let Self { key, asc, ascq } = self;
        out.put_bytes(&[key, asc, ascq]);
    }

    pub(crate) fn load(input: &mut Reader<'_>) -> Result<Self, Error> {
        Ok(Self { key: input.take_u8()? & 0x0f, asc: input.take_u8()?, ascq: input.take_u8()? })
    }
}

/// What a drive has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alerts {
    /// Why the last command failed, until the next one.
    pub(crate) sense: Sense,
    /// A unit attention that the next command is to report, or [`Sense::NONE`].
    pub(crate) attention: Sense,
}

impl Alerts {
    pub(crate) const NONE: Self = Self { sense: Sense::NONE, attention: Sense::NONE };

    /// Whether a command may be carried out. A unit attention fails it and has been told then, unless it is one of the commands that
    /// leave unit attentions alone.
    pub(crate) fn admit(&mut self, operation: u8) -> Result<(), Sense> {
        match operation {
            op::INQUIRY
            | op::REQUEST_SENSE
            | op::GET_CONFIGURATION
            | op::GET_EVENT_STATUS
            | op::REPORT_LUNS => Ok(()),
            _ => match std::mem::take(&mut self.attention) {
                Sense::NONE => Ok(()),
                attention => Err(attention),
            },
        }
    }

    /// What REQUEST SENSE tells, and nobody after it.
    pub(crate) fn report(&mut self) -> Sense {
        match std::mem::take(&mut self.attention) {
            Sense::NONE => std::mem::take(&mut self.sense),
            attention => attention,
        }
    }
}
