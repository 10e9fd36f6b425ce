//! Objects as bytes: what names are made of, and nothing else.

use std::net::IpAddr;
use std::sync::Arc;

use super::BadFrame;
use crate::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Object, ObjectKey, Protocol, Service,
    ServiceKey, ServicePort, ServiceType, SliceKey, TargetRef,
};

const V6: u8 = 1;
const READY: u8 = 2;
const SERVING: u8 = 4;
const TERMINATING: u8 = 8;
const HOSTNAME: u8 = 16;
const TARGET: u8 = 32;

const HEADLESS: u8 = 1;
const NOT_READY_TOO: u8 = 2;
const EXTERNAL: u8 = 4;

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names of the API have 253 bytes at most, and so have domains; of an error the beginning is what counts.
    let mut end = text.len().min(255);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.push(end as u8);
    out.extend_from_slice(&text.as_bytes()[..end]);
}

pub(super) fn put_key(out: &mut Vec<u8>, key: &ObjectKey) {
    put_text(out, &key.namespace);
    put_text(out, &key.name);
}

pub(super) fn put_address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => out.extend(v4.octets()),
        IpAddr::V6(v6) => out.extend(v6.octets()),
    }
}

/// Adds an object; false for kinds that are not shared.
pub(super) fn put(out: &mut Vec<u8>, object: &Object) -> bool {
    match object {
        Object::Service(service) => {
            put_key(out, &service.key);
            put_service(out, service);
        }
        Object::EndpointSlice(slice) => {
            put_key(out, &slice.key);
            put_text(out, slice.service.as_ref().map_or("", |key| &key.name));
            put_slice(out, slice);
        }
        Object::Node(_) | Object::Pod(_) => return false,
    }
    true
}

fn put_service(out: &mut Vec<u8>, service: &Service) {
    out.push(
        flag(service.headless, HEADLESS)
            | flag(service.publish_not_ready, NOT_READY_TOO)
            | flag(service.external_name.is_some(), EXTERNAL),
    );
    if let Some(name) = &service.external_name {
        put_text(out, name);
    }
    // Two at most, one of each family.
    let addresses = &service.cluster_ips[..service.cluster_ips.len().min(255)];
    out.push(addresses.len() as u8);
    for address in addresses {
        out.push(flag(address.is_ipv6(), V6));
        put_address(out, *address);
    }
    for port in &service.ports {
        put_text(out, &port.name);
        out.push(port.protocol.number());
        out.extend(port.port.to_le_bytes());
    }
}

/// A Service as few bytes, without its key.
pub fn pack_service(service: &Service) -> Box<[u8]> {
    let mut out = Vec::new();
    put_service(&mut out, service);
    out.into()
}

/// The Service that [`pack_service`] has packed; `None` when these are not its bytes.
pub fn unpack_service(key: ServiceKey, packed: &[u8]) -> Option<Service> {
    service(&mut Reader::new(packed), key).ok()
}

/// A slice as few bytes, without its key and its Service's.
pub fn pack_slice(slice: &EndpointSlice) -> Box<[u8]> {
    let mut out = Vec::new();
    put_slice(&mut out, slice);
    out.into()
}

fn put_slice(out: &mut Vec<u8>, slice: &EndpointSlice) {
    // The API allows a hundred.
    let ports = &slice.ports[..slice.ports.len().min(255)];
    out.push(ports.len() as u8);
    for port in ports {
        put_text(out, &port.name);
        out.push(port.protocol.number());
        out.extend(port.port.to_le_bytes());
    }
    for endpoint in &slice.endpoints {
        let Conditions {
            ready,
            serving,
            terminating,
        } = endpoint.conditions;
        out.push(
            flag(endpoint.address.is_ipv6(), V6)
                | flag(ready, READY)
                | flag(serving, SERVING)
                | flag(terminating, TERMINATING)
                | flag(endpoint.hostname.is_some(), HOSTNAME)
                | flag(endpoint.target.is_some(), TARGET),
        );
        put_address(out, endpoint.address);
        if let Some(hostname) = &endpoint.hostname {
            put_text(out, hostname);
        }
        if let Some(target) = &endpoint.target {
            put_text(out, &target.kind);
            put_text(out, &target.key.name);
        }
    }
}

/// The slice that [`pack_slice`] has packed; `None` when these are not its bytes.
pub fn unpack_slice(key: SliceKey, service: &ServiceKey, packed: &[u8]) -> Option<EndpointSlice> {
    slice_of(&mut Reader::new(packed), key, Some(service.clone())).ok()
}

pub(super) fn slice(reader: &mut Reader<'_>, key: SliceKey) -> Result<EndpointSlice, BadFrame> {
    let name = reader.text()?;
    let service = (!name.is_empty()).then(|| ServiceKey {
        namespace: key.namespace.clone(),
        name: name.into(),
    });
    slice_of(reader, key, service)
}

fn slice_of(
    reader: &mut Reader<'_>,
    key: SliceKey,
    service: Option<ServiceKey>,
) -> Result<EndpointSlice, BadFrame> {
    let mut ports = Vec::new();
    for _ in 0..reader.byte()? {
        ports.push(EndpointPort {
            name: reader.shared_text()?,
            protocol: reader.protocol()?,
            port: u16::from_le_bytes(reader.array()?),
            app_protocol: None,
        });
    }
    let mut endpoints = Vec::new();
    while !reader.is_empty() {
        let flags = reader.byte()?;
        let address = reader.address(flags)?;
        let hostname = match flags & HOSTNAME {
            0 => None,
            _ => Some(reader.shared_text()?),
        };
        let target = match flags & TARGET {
            0 => None,
            _ => Some(TargetRef {
                kind: reader.shared_text()?,
                key: ObjectKey {
                    // A pod is in its Service's namespace.
                    namespace: key.namespace.clone(),
                    name: reader.shared_text()?,
                },
            }),
        };
        endpoints.push(Endpoint {
            address,
            conditions: Conditions {
                ready: flags & READY != 0,
                serving: flags & SERVING != 0,
                terminating: flags & TERMINATING != 0,
            },
            node_name: None,
            zone: None,
            hostname,
            target,
            for_zones: Vec::new(),
            for_nodes: Vec::new(),
        });
    }
    Ok(EndpointSlice {
        key,
        service,
        // For whoever is told by this, names are all that there is.
        headless: false,
        ports,
        endpoints,
        refused: Vec::new(),
        last_change: None,
    })
}

pub(super) fn service(reader: &mut Reader<'_>, key: ServiceKey) -> Result<Service, BadFrame> {
    let flags = reader.byte()?;
    let external_name = match flags & EXTERNAL {
        0 => None,
        _ => Some(reader.shared_text()?),
    };
    let mut cluster_ips = Vec::new();
    for _ in 0..reader.byte()? {
        let family = reader.byte()?;
        cluster_ips.push(reader.address(family)?);
    }
    let mut ports = Vec::new();
    while !reader.is_empty() {
        ports.push(ServicePort {
            name: reader.shared_text()?,
            protocol: reader.protocol()?,
            port: u16::from_le_bytes(reader.array()?),
            node_port: None,
            app_protocol: None,
        });
    }
    Ok(Service {
        service_type: match external_name {
            Some(_) => ServiceType::ExternalName,
            None => ServiceType::ClusterIp,
        },
        cluster_ips,
        headless: flags & HEADLESS != 0,
        external_name,
        ports,
        publish_not_ready: flags & NOT_READY_TOO != 0,
        ..Service::named(key)
    })
}

/// Reads what was put.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// That everything has been read.
    pub fn end(&self) -> Result<(), BadFrame> {
        match self.0.len() {
            0 => Ok(()),
            rest => Err(BadFrame::Rest(rest)),
        }
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], BadFrame> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(BadFrame::Short)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], BadFrame> {
        self.bytes(N)?.try_into().map_err(|_| BadFrame::Short)
    }

    pub fn byte(&mut self) -> Result<u8, BadFrame> {
        Ok(self.array::<1>()?[0])
    }

    pub fn text(&mut self) -> Result<&'a str, BadFrame> {
        let bytes = self.byte()?;
        let text = self.bytes(usize::from(bytes))?;
        std::str::from_utf8(text).map_err(|_| BadFrame::Text)
    }

    fn shared_text(&mut self) -> Result<Arc<str>, BadFrame> {
        self.text().map(Into::into)
    }

    pub fn key(&mut self) -> Result<ObjectKey, BadFrame> {
        Ok(ObjectKey {
            namespace: self.shared_text()?,
            name: self.shared_text()?,
        })
    }

    pub fn address(&mut self, flags: u8) -> Result<IpAddr, BadFrame> {
        Ok(if flags & V6 == 0 {
            IpAddr::from(self.array::<4>()?)
        } else {
            IpAddr::from(self.array::<16>()?)
        })
    }

    fn protocol(&mut self) -> Result<Protocol, BadFrame> {
        match self.byte()? {
            6 => Ok(Protocol::Tcp),
            17 => Ok(Protocol::Udp),
            132 => Ok(Protocol::Sctp),
            other => Err(BadFrame::Tag(other)),
        }
    }
}
