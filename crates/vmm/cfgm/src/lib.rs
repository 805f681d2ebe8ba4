//! cfgm
