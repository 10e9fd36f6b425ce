//! Objects of the API as they arrive, in the parts that the network path needs. What is not named here is passed over unread, and texts
//! are borrowed from the answer: of a list of 10,000 Services with their slices, reading whole objects took most of an agent's start.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

/// A text that is copied only where its JSON has escapes, or is gone before it.
#[derive(Debug)]
pub(crate) struct Text<'a>(Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Text<'_> {
    fn as_ref(&self) -> &str {
        self
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrow<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for Borrow<'a> {
            type Value = Text<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text)))
            }
        }

        deserializer.deserialize_str(Borrow(PhantomData))
    }
}

/// Labels or annotations: those that something here asks for.
#[derive(Debug, Default)]
pub(crate) struct Marks<'a>(Vec<(&'static str, Text<'a>)>);

impl Marks<'_> {
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| &**value)
    }
}

const MARKS: [&str; 7] = [
    crate::BALANCING_ANNOTATION,
    crate::DSR_ANNOTATION,
    crate::service::PROXY_NAME_LABEL,
    crate::endpoints::HEADLESS_LABEL,
    crate::endpoints::LAST_CHANGE_ANNOTATION,
    crate::endpoints::SERVICE_NAME_LABEL,
    crate::node::ZONE_LABEL,
];

impl<'de: 'a, 'a> Deserialize<'de> for Marks<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pick<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for Pick<'a> {
            type Value = Marks<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Marks::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut marks = Marks::default();
                while let Some(name) = map.next_key::<Text<'de>>()? {
                    match MARKS.into_iter().find(|known| *known == &*name) {
                        Some(known) => marks.0.push((known, map.next_value()?)),
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(marks)
            }
        }

        deserializer.deserialize_any(Pick(PhantomData))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Meta<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub namespace: Option<Text<'a>>,
    pub resource_version: Option<Text<'a>>,
    pub labels: Marks<'a>,
    pub annotations: Marks<'a>,
    pub deletion_timestamp: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Service<'a> {
    #[serde(borrow, default)]
    pub metadata: Meta<'a>,
    pub spec: Option<ServiceSpec<'a>>,
    pub status: Option<ServiceStatus<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceSpec<'a> {
    #[serde(borrow, rename = "type")]
    pub type_: Option<Text<'a>>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<Text<'a>>,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<Text<'a>>>,
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<Vec<Text<'a>>>,
    pub external_name: Option<Text<'a>>,
    pub load_balancer_source_ranges: Option<Vec<Text<'a>>>,
    pub ports: Option<Vec<ServicePort<'a>>>,
    pub publish_not_ready_addresses: Option<bool>,
    pub traffic_distribution: Option<Text<'a>>,
    pub session_affinity: Option<Text<'a>>,
    pub session_affinity_config: Option<SessionAffinityConfig>,
    pub internal_traffic_policy: Option<Text<'a>>,
    pub external_traffic_policy: Option<Text<'a>>,
    pub health_check_node_port: Option<i32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServicePort<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub protocol: Option<Text<'a>>,
    #[serde(default)]
    pub port: i32,
    pub node_port: Option<i32>,
    pub app_protocol: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIp>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClientIp {
    pub timeout_seconds: Option<i32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceStatus<'a> {
    #[serde(borrow)]
    pub load_balancer: Option<LoadBalancer<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct LoadBalancer<'a> {
    #[serde(borrow)]
    pub ingress: Option<Vec<Ingress<'a>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Ingress<'a> {
    #[serde(borrow)]
    pub ip: Option<Text<'a>>,
    #[serde(rename = "ipMode")]
    pub ip_mode: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EndpointSlice<'a> {
    #[serde(borrow, default)]
    pub metadata: Meta<'a>,
    pub address_type: Option<Text<'a>>,
    pub endpoints: Option<Vec<Endpoint<'a>>>,
    pub ports: Option<Vec<EndpointPort<'a>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Endpoint<'a> {
    #[serde(borrow)]
    pub addresses: Option<Vec<Text<'a>>>,
    pub conditions: Option<EndpointConditions>,
    pub node_name: Option<Text<'a>>,
    pub zone: Option<Text<'a>>,
    pub hostname: Option<Text<'a>>,
    pub target_ref: Option<ObjectReference<'a>>,
    pub hints: Option<EndpointHints<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct EndpointConditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ObjectReference<'a> {
    #[serde(borrow)]
    pub kind: Option<Text<'a>>,
    pub namespace: Option<Text<'a>>,
    pub name: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EndpointHints<'a> {
    #[serde(borrow)]
    pub for_zones: Option<Vec<Named<'a>>>,
    pub for_nodes: Option<Vec<Named<'a>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Named<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EndpointPort<'a> {
    #[serde(borrow)]
    pub name: Option<Text<'a>>,
    pub protocol: Option<Text<'a>>,
    pub port: Option<i32>,
    pub app_protocol: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Node<'a> {
    #[serde(borrow, default)]
    pub metadata: Meta<'a>,
    pub spec: Option<NodeSpec<'a>>,
    pub status: Option<NodeStatus<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NodeSpec<'a> {
    #[serde(borrow, rename = "podCIDR")]
    pub pod_cidr: Option<Text<'a>>,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<Text<'a>>>,
    pub taints: Option<Vec<Taint<'a>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Taint<'a> {
    #[serde(borrow)]
    pub key: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NodeStatus<'a> {
    #[serde(borrow)]
    pub addresses: Option<Vec<NodeAddress<'a>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NodeAddress<'a> {
    #[serde(borrow, rename = "type")]
    pub type_: Option<Text<'a>>,
    #[serde(borrow)]
    pub address: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Pod<'a> {
    #[serde(borrow, default)]
    pub metadata: Meta<'a>,
    pub spec: Option<PodSpec<'a>>,
    pub status: Option<PodStatus<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodSpec<'a> {
    #[serde(borrow)]
    pub node_name: Option<Text<'a>>,
    pub host_network: Option<bool>,
    #[serde(borrow)]
    pub dns_policy: Option<Text<'a>>,
    #[serde(borrow)]
    pub dns_config: Option<PodDnsConfig<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodDnsConfig<'a> {
    #[serde(borrow)]
    pub searches: Option<Vec<Text<'a>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct PodStatus<'a> {
    #[serde(borrow)]
    pub phase: Option<Text<'a>>,
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp<'a>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct PodIp<'a> {
    #[serde(borrow)]
    pub ip: Option<Text<'a>>,
}
