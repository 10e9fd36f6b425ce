//! The per-node daemon.
