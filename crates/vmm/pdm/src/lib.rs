//! pdm
