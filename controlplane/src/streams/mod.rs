//! Streams of running containers: what travels over an upgraded connection, and how one protocol becomes another.
//!
//! Clients speak WebSocket with numbered channels, kubelets SPDY/3.1 (KEP-4006). Nothing here knows of HTTP requests or of the
//! store: both ends are connections that have been upgraded already.

mod channels;
mod messages;
mod spdy;
mod tunnel;

pub use channels::{Channels, Protocol, relay};
pub use messages::{Framing, send};
pub use spdy::{Session, SpdyError};
pub use tunnel::tunnel;

/// What kubectl asks for on a WebSocket that carries a whole SPDY connection.
pub const TUNNELED_PORT_FORWARD: &str = "SPDY/3.1+portforward.k8s.io";
/// The subprotocol of port-forward inside SPDY.
pub const PORT_FORWARD: &str = "portforward.k8s.io";
/// The subprotocol of exec and attach over SPDY: four streams, and a Status on the error stream.
pub const REMOTE_COMMAND: &str = "v4.channel.k8s.io";
