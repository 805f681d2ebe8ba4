//! Registers of the VGA (IBM VGA Technical Reference; FreeVGA) and of the Bochs VBE extension.

/// Sequencer register indexes.
pub mod seq {
    pub const CLOCKING: usize = 1;
    pub const MAP_MASK: usize = 2;
    pub const CHARACTER_MAP: usize = 3;
    pub const MEMORY_MODE: usize = 4;
    pub const COUNT: usize = 5;

    /// CLOCKING: characters are 8 dots wide, not 9.
    pub const EIGHT_DOTS: u8 = 0x01;
    /// CLOCKING: the screen is off.
    pub const SCREEN_OFF: u8 = 0x20;
    /// MEMORY_MODE: address bits 0 and 1 choose the plane.
    pub const CHAIN4: u8 = 0x08;
}

/// Graphics controller register indexes.
pub mod gfx {
    pub const SET_RESET: usize = 0;
    pub const ENABLE_SET_RESET: usize = 1;
    pub const COLOR_COMPARE: usize = 2;
    pub const DATA_ROTATE: usize = 3;
    pub const READ_MAP: usize = 4;
    pub const MODE: usize = 5;
    pub const MISC: usize = 6;
    pub const COLOR_DONT_CARE: usize = 7;
    pub const BIT_MASK: usize = 8;
    pub const COUNT: usize = 9;

    /// MODE: even addresses go to even planes.
    pub const ODD_EVEN: u8 = 0x10;
    /// MISC: graphics, not text.
    pub const GRAPHICS: u8 = 0x01;
}

/// CRT controller register indexes.
pub mod crtc {
    pub const H_DISPLAY_END: usize = 0x01;
    pub const OVERFLOW: usize = 0x07;
    pub const PRESET_ROW: usize = 0x08;
    pub const MAX_SCAN: usize = 0x09;
    pub const CURSOR_START: usize = 0x0a;
    pub const CURSOR_END: usize = 0x0b;
    pub const START_HIGH: usize = 0x0c;
    pub const START_LOW: usize = 0x0d;
    pub const CURSOR_HIGH: usize = 0x0e;
    pub const CURSOR_LOW: usize = 0x0f;
    pub const V_RETRACE_END: usize = 0x11;
    pub const V_DISPLAY_END: usize = 0x12;
    pub const OFFSET: usize = 0x13;
    pub const UNDERLINE: usize = 0x14;
    pub const MODE: usize = 0x17;
    pub const LINE_COMPARE: usize = 0x18;
    pub const COUNT: usize = 0x19;
}

/// Attribute controller register indexes; 0–15 are the palette.
pub mod attr {
    pub const MODE: usize = 0x10;
    pub const PLANE_ENABLE: usize = 0x12;
    pub const PANNING: usize = 0x13;
    pub const COLOR_SELECT: usize = 0x14;
    pub const COUNT: usize = 0x15;

    /// MODE: the ninth dot of line-drawing characters repeats the eighth.
    pub const LINE_GRAPHICS: u8 = 0x04;
    /// MODE: attribute bit 7 blinks instead of brightening the background.
    pub const BLINK: u8 = 0x08;
    /// MODE: panning does not concern the part below the line compare.
    pub const PAN_SPLIT: u8 = 0x20;
    /// MODE: palette bits 4 and 5 come from COLOR_SELECT.
    pub const P54S: u8 = 0x80;
    /// Index register: the palette feeds the screen, not the bus.
    pub const SCREEN_ON: u8 = 0x20;
}

/// Bochs VBE extension: registers behind the index at port 0x1ce and data at 0x1cf (or 0x1d0).
pub mod dispi {
    pub const ID: usize = 0;
    pub const XRES: usize = 1;
    pub const YRES: usize = 2;
    pub const BPP: usize = 3;
    pub const ENABLE: usize = 4;
    pub const BANK: usize = 5;
    pub const VIRT_WIDTH: usize = 6;
    pub const VIRT_HEIGHT: usize = 7;
    pub const X_OFFSET: usize = 8;
    pub const Y_OFFSET: usize = 9;
    pub const VIDEO_MEMORY_64K: usize = 10;
    pub const COUNT: usize = 10;

    pub const ID_FIRST: u16 = 0xb0c0;
    pub const ID_LAST: u16 = 0xb0c5;

    pub const ENABLED: u16 = 0x01;
    /// XRES, YRES and BPP read as the largest values.
    pub const GET_CAPS: u16 = 0x02;
    pub const EIGHT_BIT_DAC: u16 = 0x20;
    pub const NO_CLEAR: u16 = 0x80;

    pub const MAX_XRES: u16 = 4096;
    pub const MAX_YRES: u16 = 2160;
    pub const MAX_BPP: u16 = 32;
}
