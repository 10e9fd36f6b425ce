//! The Container Network Interface of Keelway: the types of the specification, and how plugin and agent talk.
//!
//! The plugin holds no credentials and no state. It checks what the runtime hands it ([`Invocation`]), gives it to the
//! agent over a Unix socket together with the open network namespace ([`protocol`]), and prints what comes back. When
//! the agent is away, a deletion is written down ([`spool`]) and counts as done.
//!
//! Specification: <https://www.cni.dev/docs/spec/>, versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0.

mod capabilities;
mod error;
mod invocation;
mod plugin;
mod result;
mod sys;

pub mod loopback;
pub mod protocol;
pub mod spool;

pub use capabilities::{Bandwidth, Capabilities, Mac, PortMapping, PortProtocol};
pub use error::{CniError, Code};
pub use invocation::{Attachment, Command, Environment, Invocation, NetConf, declared_version};
pub use plugin::{read_config, run};
pub use result::{AddResult, Dns, Interface, IpConfig, Route, Version};

/// Where the agent listens, unless the network configuration says otherwise.
pub const AGENT_SOCKET: &str = "/run/keelway/agent.sock";
/// Where deletions wait for an agent that is away, unless the network configuration says otherwise.
pub const SPOOL_DIR: &str = "/var/lib/keelway/agent/deleted";
