//! The control plane: API server, store, controllers, scheduler.

#![deny(unsafe_code)]

pub mod api;
pub mod auth;
pub mod codec;
pub mod controllers;
pub mod page;
pub mod patch;
pub mod pki;
pub mod registry;
pub mod scheduler;
pub mod selector;
pub mod store;
pub mod streams;
pub mod sys;
