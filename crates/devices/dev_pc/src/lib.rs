//! dev_pc
