//! The server over real sockets: its own names, and those of others.

mod aliases;
mod config;
mod forward;
mod greedy;
mod hostile;
mod odd;
mod rules;
mod support;
mod tls;
mod wire;
