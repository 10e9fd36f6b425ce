//! The cluster DNS: a zone that is a pure function of the cluster's Snapshot, and the server that answers from it.
//!
//! `plan` says which records a Service has, [`zone`] keeps them by name, [`answer`] composes replies from them into
//! the buffer that is sent, and [`rules`] say what is done for whose names. These are pure, and so is the way from a query to what is known
//! here, [`server::at_once`]; `server` moves datagrams, `forward` asks others, `cache` keeps what they said, `feed` follows the API.
#![deny(unsafe_code)]

mod agent;
pub mod answer;
pub mod ask;
mod autopath;
mod bytemap;
pub mod cache;
pub mod config;
mod explain;
mod failures;
pub mod feed;
mod fetch;
pub mod forward;
pub mod health;
pub mod hosts;
pub mod kept;
pub mod log;
pub mod message;
pub mod metrics;
pub mod name;
pub mod offer;
mod plan;
pub mod query;
pub mod reload;
pub mod rewrite;
pub mod rules;
pub mod server;
pub mod settings;
mod shares;
mod slim;
mod sources;
mod sys;
pub mod zone;

pub use plan::{Naming, Owner, Record, Records, plan, undashed};
