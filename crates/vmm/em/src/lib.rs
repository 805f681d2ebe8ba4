//! em
