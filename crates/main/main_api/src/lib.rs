//! main_api
