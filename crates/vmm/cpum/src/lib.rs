//! cpum
