//! The control plane: API server, store, controllers, scheduler.

#![forbid(unsafe_code)]

pub mod auth;
pub mod codec;
pub mod patch;
pub mod registry;
pub mod selector;
pub mod store;
