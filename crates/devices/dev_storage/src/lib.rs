//! dev_storage
