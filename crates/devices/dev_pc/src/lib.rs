//! The chips every PC has: interrupt controllers, timer, clock, DMA, keyboard controller and serial ports.
//!
//! Each module holds one chip: a `State` that is a pure function of the values written and the time, and the device around it
//! that decodes ports and drives lines. `new` builds the device, `register` claims its ports.

pub mod pic;
