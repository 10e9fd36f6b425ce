//! The control plane: API server, store, controllers, scheduler.

#![deny(unsafe_code)]
#![allow(
    clippy::todo,
    reason = "signatures that others code against; filled in by the commits that follow"
)]

pub mod api;
pub mod auth;
pub mod codec;
pub mod patch;
pub mod registry;
pub mod selector;
pub mod store;
pub mod sys;
