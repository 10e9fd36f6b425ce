//! The cluster DNS: a zone that is a pure function of the cluster's Snapshot, and the server that answers from it.
//!
//! `plan` says which records a Service has, [`zone`] keeps them by name, [`answer`] composes replies from them into
//! the buffer that is sent. These are pure; `server` moves datagrams, `forward` asks others, `feed` follows the API.
#![deny(unsafe_code)]

pub mod answer;
pub mod ask;
pub mod config;
pub mod feed;
pub mod forward;
pub mod health;
mod metrics;
pub mod name;
mod plan;
pub mod query;
pub mod server;
mod sys;
pub mod zone;

pub use plan::{Record, Records, plan};
