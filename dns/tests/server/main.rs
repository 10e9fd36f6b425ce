//! The server over real sockets: its own names, and those of others.

mod forward;
mod rules;
mod support;
mod tls;
mod wire;
