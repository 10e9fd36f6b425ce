//! The result of an ADD, and how each version of the specification writes it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{CniError, Code};

/// A version of the specification that this plugin speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Version; 3] = [Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    pub fn name(self) -> &'static str {
        match self {
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Version {
    type Err = CniError;

    fn from_str(text: &str) -> Result<Self, CniError> {
        Self::ALL
            .into_iter()
            .find(|version| version.name() == text)
            .ok_or_else(|| {
                let supported = Self::ALL.map(Version::name).join(", ");
                CniError::new(
                    Code::IncompatibleVersion,
                    format!("cniVersion {text:?} is not supported"),
                )
                .with_details(format!("supported: {supported}"))
            })
    }
}

/// What an ADD made, independent of version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    pub interfaces: Vec<Interface>,
    pub ips: Vec<IpConfig>,
    pub routes: Vec<Route>,
}

/// An interface that an ADD made; one in the container has the path of its network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    pub mac: String,
    pub mtu: u32,
    pub sandbox: Option<String>,
}

/// An address that an ADD gave to the interface with this index in [`AddResult::interfaces`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    pub address: IpNetwork,
    pub gateway: IpAddr,
    pub interface: usize,
}

/// A route that an ADD made in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub dst: IpNetwork,
    pub gw: Option<IpAddr>,
}

impl AddResult {
    /// The result as the version writes it.
    pub fn render(&self, version: Version) -> Value {
        let interfaces: Vec<Value> = self
            .interfaces
            .iter()
            .map(|one| render_interface(one, version))
            .collect();
        let ips: Vec<Value> = self
            .ips
            .iter()
            .map(|ip| {
                let mut out = json!({
                    "address": ip.address.to_string(), "gateway": ip.gateway, "interface": ip.interface,
                });
                // Dropped in 1.0.0: the address itself tells.
                if version == Version::V0_4_0 {
                    out["version"] = json!(if ip.address.is_ipv4() { "4" } else { "6" });
                }
                out
            })
            .collect();
        let routes: Vec<Value> = self
            .routes
            .iter()
            .map(|route| match route.gw {
                Some(gw) => json!({"dst": route.dst.to_string(), "gw": gw}),
                None => json!({"dst": route.dst.to_string()}),
            })
            .collect();
        json!({
            "cniVersion": version.name(), "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {},
        })
    }
}

fn render_interface(interface: &Interface, version: Version) -> Value {
    let mut out = json!({"name": interface.name, "mac": interface.mac});
    if version >= Version::V1_1_0 {
        out["mtu"] = json!(interface.mtu);
    }
    if let Some(sandbox) = &interface.sandbox {
        out["sandbox"] = json!(sandbox);
    }
    out
}
