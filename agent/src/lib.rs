//! The per-node daemon.

pub mod addresses;
pub mod dataplane;
pub mod net;
pub mod plan;
