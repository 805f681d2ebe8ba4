//! vd
