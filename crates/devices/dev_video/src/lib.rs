//! dev_video
