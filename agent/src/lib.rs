//! The per-node daemon.

pub mod dataplane;
