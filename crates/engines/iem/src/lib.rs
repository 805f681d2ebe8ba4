//! iem
