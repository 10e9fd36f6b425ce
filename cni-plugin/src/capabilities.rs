//! What a runtime asks for beyond an interface: ports of the host, a bandwidth, addresses, a MAC address, name resolution.
//!
//! Conventions: <https://www.cni.dev/docs/conventions/>. A capability reaches a plugin as `runtimeConfig`; addresses and the MAC
//! address also come as CNI_ARGS (`IP=`, `MAC=`) or as `args.cni.ips`, as older runtimes pass them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::result::Dns;
use crate::{CniError, Code};

/// What an attachment shall have. Empty for most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// Addresses that the pod shall have; at most one of each family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

/// A port of the node that leads to one of the pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: PortProtocol,
    /// The node's address that it is on; all of them, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    Tcp,
    Udp,
    Sctp,
}

/// Limits of a pod's traffic, as the runtime states them; 0 is no limit. Ingress is towards the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Bits per second.
    #[serde(default, alias = "IngressRate")]
    pub ingress_rate: u64,
    /// Bits.
    #[serde(default, alias = "IngressBurst")]
    pub ingress_burst: u64,
    #[serde(default, alias = "EgressRate")]
    pub egress_rate: u64,
    #[serde(default, alias = "EgressBurst")]
    pub egress_burst: u64,
}

/// A MAC address of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a MAC address");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        // The lowest bit makes it a group's; no interface takes that, nor all zeros.
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(format!("{text:?} is not the MAC address of an interface"));
        }
        Ok(Self(bytes))
    }
}

/// `runtimeConfig` and `args` of a configuration, unchecked.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RawRuntimeConfig {
    port_mappings: Vec<RawPortMapping>,
    bandwidth: Option<Bandwidth>,
    ips: Vec<String>,
    mac: Option<String>,
    dns: Option<RawDns>,
}

/// containerd writes the names of these fields, of bandwidth's and of name resolution's with a capital: Go does not tell them apart.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPortMapping {
    #[serde(alias = "HostPort")]
    host_port: i64,
    #[serde(alias = "ContainerPort")]
    container_port: i64,
    #[serde(alias = "Protocol")]
    protocol: String,
    #[serde(rename = "hostIP", alias = "HostIP")]
    host_ip: String,
}

/// The capability's names differ from those of a result.
#[derive(Deserialize, Default)]
#[serde(default)]
struct RawDns {
    #[serde(alias = "Servers", deserialize_with = "list")]
    servers: Vec<String>,
    #[serde(alias = "Searches", deserialize_with = "list")]
    searches: Vec<String>,
    #[serde(alias = "Options", deserialize_with = "list")]
    options: Vec<String>,
}

/// A list; null is an empty one, as Go writes it.
fn list<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl RawRuntimeConfig {
    /// What name resolution the runtime wants said in the result.
    pub(crate) fn dns(&self) -> Option<Dns> {
        self.dns.as_ref().map(|dns| Dns {
            nameservers: dns.servers.clone(),
            domain: None,
            search: dns.searches.clone(),
            options: dns.options.clone(),
        })
    }
}

impl Capabilities {
    /// Checks what is asked for. `cni_args` and `conf_args` are the older ways to ask.
    pub(crate) fn parse(
        raw: &RawRuntimeConfig,
        cni_args: &BTreeMap<String, String>,
        conf_args: Option<&Value>,
    ) -> Result<Self, CniError> {
        let port_mappings = raw
            .port_mappings
            .iter()
            // Runtimes also name ports that want no port of the host.
            .filter(|one| one.host_port != 0)
            .map(port_mapping)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            port_mappings,
            bandwidth: raw.bandwidth.map(bandwidth).transpose()?,
            ips: ips(raw, cni_args, conf_args)?,
            mac: match (&raw.mac, cni_args.get("MAC")) {
                (Some(text), _) | (None, Some(text)) if !text.is_empty() => {
                    Some(text.parse().map_err(|why: String| invalid("mac", why))?)
                }
                _ => None,
            },
        })
    }
}

fn invalid(what: &str, why: impl fmt::Display) -> CniError {
    CniError::new(Code::InvalidConfig, format!("{what}: {why}"))
}

fn port_mapping(raw: &RawPortMapping) -> Result<PortMapping, CniError> {
    let port = |name: &str, number: i64| {
        u16::try_from(number)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| invalid("portMappings", format!("{name} {number} is not a port")))
    };
    let protocol = match raw.protocol.to_ascii_lowercase().as_str() {
        "tcp" | "" => PortProtocol::Tcp,
        "udp" => PortProtocol::Udp,
        "sctp" => PortProtocol::Sctp,
        other => {
            return Err(CniError::new(
                Code::UnsupportedField,
                format!(
                    "portMappings: protocol {other:?} is not supported (tcp, udp and sctp are)"
                ),
            ));
        }
    };
    let host_ip =
        match raw.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                invalid("portMappings", format!("hostIP {text:?} is not an address"))
            })?),
        };
    Ok(PortMapping {
        host_port: port("hostPort", raw.host_port)?,
        container_port: port("containerPort", raw.container_port)?,
        protocol,
        host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
    })
}

fn bandwidth(raw: Bandwidth) -> Result<Bandwidth, CniError> {
    for (name, rate, burst) in [
        ("ingress", raw.ingress_rate, raw.ingress_burst),
        ("egress", raw.egress_rate, raw.egress_burst),
    ] {
        if rate == 0 && burst != 0 {
            return Err(invalid(
                "bandwidth",
                format!("{name}Burst without {name}Rate"),
            ));
        }
        if rate != 0 && rate < 8 {
            return Err(invalid(
                "bandwidth",
                format!("{name}Rate of {rate} bits per second is below one byte"),
            ));
        }
    }
    Ok(raw)
}

/// An address, whatever prefix length is written behind it: a pod's own range is a single address here.
fn ips(
    raw: &RawRuntimeConfig,
    cni_args: &BTreeMap<String, String>,
    conf_args: Option<&Value>,
) -> Result<Vec<IpAddr>, CniError> {
    let old_style = conf_args
        .and_then(|args| args.pointer("/cni/ips"))
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|ip| ip.as_str().unwrap_or_default());
    let in_variable = cni_args.get("IP").map(String::as_str).unwrap_or_default();
    let texts: Vec<&str> = if raw.ips.is_empty() {
        old_style
            .chain(in_variable.split(',').filter(|text| !text.is_empty()))
            .collect()
    } else {
        raw.ips.iter().map(String::as_str).collect()
    };
    let mut found: Vec<IpAddr> = Vec::new();
    for text in texts {
        let network: IpNetwork = text
            .trim()
            .parse()
            .map_err(|_| invalid("ips", format!("{text:?} is not an address")))?;
        let ip = network.ip();
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
            return Err(invalid("ips", format!("{ip} cannot be a pod's address")));
        }
        if found.iter().any(|had| had.is_ipv4() == ip.is_ipv4()) {
            return Err(invalid(
                "ips",
                "more than one address of one family is asked for",
            ));
        }
        found.push(ip);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(config: Value, args: &[(&str, &str)]) -> Result<Capabilities, CniError> {
        let args = args
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let raw = serde_json::from_value(config["runtimeConfig"].clone()).expect("its shape");
        Capabilities::parse(&raw, &args, config.get("args"))
    }

    #[test]
    fn everything_that_a_runtime_passes_is_understood() {
        let all = parse(
            serde_json::json!({"runtimeConfig": {
                "portMappings": [
                    {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "0.0.0.0"},
                    {"hostPort": 0, "containerPort": 81, "protocol": "sctp"},
                    {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "198.18.0.1"},
                ],
                "bandwidth": {"ingressRate": 8000, "ingressBurst": 16000},
                "ips": ["10.244.1.9/24", "fd00::9"],
                "mac": "02:00:00:00:00:09",
            }}),
            &[("IP", "10.244.1.8"), ("MAC", "02:00:00:00:00:08")],
        )
        .expect("capabilities");
        assert_eq!(all.port_mappings.len(), 2);
        assert_eq!(all.port_mappings[0].host_ip, None);
        assert_eq!(
            all.bandwidth
                .map(|limit| (limit.ingress_rate, limit.egress_rate)),
            Some((8000, 0))
        );
        assert_eq!(
            all.ips,
            ["10.244.1.9", "fd00::9"].map(|ip| ip.parse::<IpAddr>().expect("ip"))
        );
        assert_eq!(
            all.mac.map(|mac| mac.to_string()).as_deref(),
            Some("02:00:00:00:00:09")
        );
    }

    #[test]
    fn containerds_spelling_is_understood() {
        let config = serde_json::json!({"runtimeConfig": {
            "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}],
            "dns": {"Servers": ["10.96.0.10"], "Searches": null, "Options": ["ndots:5"]},
        }});
        let found = parse(config.clone(), &[]).expect("capabilities");
        assert_eq!(
            found.port_mappings,
            [PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: PortProtocol::Tcp,
                host_ip: None
            }]
        );
        let raw: RawRuntimeConfig =
            serde_json::from_value(config["runtimeConfig"].clone()).expect("its shape");
        let dns = raw.dns().expect("name resolution");
        assert_eq!(
            (dns.nameservers.len(), dns.search.len(), dns.options.len()),
            (1, 0, 1)
        );
    }

    #[test]
    fn older_ways_to_ask_count_when_the_newer_one_is_silent() {
        let found = parse(
            serde_json::json!({"runtimeConfig": {}, "args": {"cni": {"ips": ["10.0.0.1"]}}}),
            &[("IP", "fd00::1"), ("MAC", "02-00-00-00-00-08")],
        )
        .expect("capabilities");
        assert_eq!(found.ips.len(), 2);
        assert_eq!(found.mac, Some(Mac([2, 0, 0, 0, 0, 8])));
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        let wrong = |runtime: Value| {
            let error =
                parse(serde_json::json!({"runtimeConfig": runtime}), &[]).expect_err("refused");
            (u32::from(error.code), error.msg)
        };
        for (runtime, code, word) in [
            (
                serde_json::json!({"ips": ["10.0.0.1", "10.0.0.2"]}),
                7,
                "one family",
            ),
            (
                serde_json::json!({"ips": ["127.0.0.1"]}),
                7,
                "cannot be a pod's",
            ),
            (serde_json::json!({"ips": ["x"]}), 7, "not an address"),
            (
                serde_json::json!({"mac": "03:00:00:00:00:01"}),
                7,
                "of an interface",
            ),
            (serde_json::json!({"mac": "02:00:00:00:00"}), 7, "not a MAC"),
            (
                serde_json::json!({"bandwidth": {"egressBurst": 1}}),
                7,
                "egressBurst without",
            ),
            (
                serde_json::json!({"portMappings": [{"hostPort": 70000, "containerPort": 1}]}),
                7,
                "70000",
            ),
            (
                serde_json::json!({"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "dccp"}]}),
                2,
                "dccp",
            ),
        ] {
            let (got, text) = wrong(runtime.clone());
            assert!(
                got == code && text.contains(word),
                "{runtime}: {got} {text}"
            );
        }
    }
}
