//! What is asked, and the upstream that knows every name.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;

use anyhow::Result;

use super::load::Questions;

/// What is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    Cluster,
    SearchPath,
    Cached,
    Uncached,
}

impl Workload {
    pub const ALL: [Self; 4] = [
        Self::Cluster,
        Self::SearchPath,
        Self::Cached,
        Self::Uncached,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::SearchPath => "nxdomain-search",
            Self::Cached => "outside-cached",
            Self::Uncached => "outside-uncached",
        }
    }

    /// The names that are asked for, in turn; none where every question has one of its own.
    pub fn names(self, services: usize) -> Vec<String> {
        match self {
            // Not in order, so that neighbours in memory do not follow each other.
            Self::Cluster => (0..services.min(20_000))
                .map(|i| service_name(i * 7919 % services))
                .collect(),
            Self::SearchPath => (0..1000)
                .map(|i| format!("www.site-{i}.example.ns-{}.svc.cluster.local", i % 50))
                .collect(),
            Self::Cached => (0..100)
                .map(|i| format!("cached-{i}.example.org"))
                .collect(),
            Self::Uncached => Vec::new(),
        }
    }

    pub fn questions(self, services: usize) -> Questions {
        match self {
            Self::Uncached => Questions {
                wires: vec![question("u00000000.once.example.org")],
                // Behind the header, the length and the letter.
                unique: Some(14),
            },
            _ => Questions {
                wires: self
                    .names(services)
                    .iter()
                    .map(|name| question(name))
                    .collect(),
                unique: None,
            },
        }
    }
}

pub fn service_name(i: usize) -> String {
    format!("svc-{i}.ns-{}.svc.cluster.local", i % 50)
}

pub fn question(name: &str) -> Vec<u8> {
    let mut wire = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        wire.push(label.len() as u8);
        wire.extend(label.bytes());
    }
    wire.extend([0, 0, 1, 0, 1]);
    wire
}

/// An upstream that knows every name: it answers as fast as anything can, so that the figure is the server's.
pub fn upstream() -> Result<SocketAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = socket.local_addr()?;
    thread::spawn(move || {
        let mut message = [0; 1500];
        while let Ok((bytes, peer)) = socket.recv_from(&mut message) {
            // The question ends with its type and class, before any OPT record.
            let name_end = message[12..bytes].iter().position(|byte| *byte == 0);
            let Some(end) = name_end.map(|at| 12 + at + 5).filter(|end| *end <= bytes) else {
                continue;
            };
            let mut reply = message[..end].to_vec();
            reply[2] = 0x81;
            reply[3] = 0x80;
            reply[7] = 1;
            reply[11] = 0;
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1]);
            let _ = socket.send_to(&reply, peer);
        }
    });
    Ok(address)
}
