//! The result of an ADD, and how each version of the specification writes it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{CniError, Code};

/// A version of the specification that this plugin speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Version; 4] = [
        Version::V0_3_1,
        Version::V0_4_0,
        Version::V1_0_0,
        Version::V1_1_0,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Version::V0_3_1 => "0.3.1",
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    pub interfaces: Vec<Interface>,
    pub ips: Vec<IpConfig>,
    pub routes: Vec<Route>,
    /// As the runtime or the configuration has it; the agent leaves it empty.
    #[serde(default)]
    pub dns: Dns,
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

/// Name resolution of a container: for the runtime, which writes its resolv.conf.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl AddResult {
    /// The result as the version writes it. After other plugins of a chain it is theirs with ours added: their interfaces come
    /// first, so that their addresses go on pointing to them, and what of theirs is not known here is kept.
    pub fn render(&self, version: Version, previous: Option<&Map<String, Value>>) -> Value {
        let mut all = previous.cloned().unwrap_or_default();
        let had = list(&all, "interfaces").len();
        let interfaces = self
            .interfaces
            .iter()
            .map(|one| render_interface(one, version));
        let ips = self.ips.iter().map(|ip| {
            let mut out = json!({
                "address": ip.address.to_string(), "gateway": ip.gateway, "interface": ip.interface + had,
            });
            // Dropped in 1.0.0: the address itself tells.
            if version < Version::V1_0_0 {
                out["version"] = json!(if ip.address.is_ipv4() { "4" } else { "6" });
            }
            out
        });
        let routes = self.routes.iter().map(|route| match route.gw {
            Some(gw) => json!({"dst": route.dst.to_string(), "gw": gw}),
            None => json!({"dst": route.dst.to_string()}),
        });
        let added: [(&str, Vec<Value>); 3] = [
            ("interfaces", interfaces.collect()),
            ("ips", ips.collect()),
            ("routes", routes.collect()),
        ];
        all.insert("cniVersion".into(), version.name().into());
        for (key, more) in added {
            let mut entries = list(&all, key).to_vec();
            entries.extend(more);
            all.insert(key.into(), entries.into());
        }
        if self.dns != Dns::default() || !all.contains_key("dns") {
            all.insert("dns".into(), json!(self.dns));
        }
        all.into()
    }
}

fn list<'a>(result: &'a Map<String, Value>, key: &str) -> &'a [Value] {
    result
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
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
