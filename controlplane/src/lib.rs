//! The control plane: API server, store, controllers, scheduler.

#![forbid(unsafe_code)]
#![allow(
    clippy::todo,
    reason = "signatures that others code against; filled in by the commits that follow"
)]

pub mod auth;
pub mod codec;
pub mod patch;
pub mod registry;
pub mod selector;
pub mod store;
