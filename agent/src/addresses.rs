//! Addresses of this node's pods: who has which, kept on disk.
//!
//! [`Pool`] decides and is pure; [`AddressFile`] keeps it. An allocation is named by the interface that the host has for
//! it, whose name follows from container and interface name: it can be found again without the file.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use ipnetwork::Ipv4Network;
use keelway_cni::Attachment;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// An address in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    pub address: Ipv4Addr,
    /// Name of the host's side of the pod's veth.
    pub host_interface: String,
    /// Absent for one that was found on the node and is in no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// Namespace and name of the pod, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// Why no address could be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("this node has no IPv4 pod range yet (Node.spec.podCIDRs is empty)")]
    NoRange,
    #[error("all {0} pod addresses of this node are in use")]
    Exhausted(u64),
}

/// The addresses of this node's pod ranges, and who has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    ranges: Vec<Ipv4Network>,
    by_interface: BTreeMap<String, Allocation>,
    by_address: HashMap<Ipv4Addr, String>,
    /// The search goes on after the last address given, so that an address rests as long as possible.
    last: Option<Ipv4Addr>,
}

/// Prefix of the host's side of pod veths; 12 hexadecimal digits follow.
const HOST_INTERFACE_PREFIX: &str = "kw";

/// The name of the host's interface for an attachment.
pub fn host_interface(attachment: &Attachment) -> String {
    let digest = Sha256::digest(attachment.to_string());
    format!("{HOST_INTERFACE_PREFIX}{}", hex::encode(&digest[..6]))
}

/// Whether an interface's name is one that [`host_interface`] gives.
pub fn is_host_interface(name: &str) -> bool {
    name.strip_prefix(HOST_INTERFACE_PREFIX)
        .is_some_and(|digits| {
            digits.len() == 12 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        })
}

impl Pool {
    /// Sets the ranges that addresses are taken from. Addresses given from other ranges stay with their pods.
    pub fn set_ranges(&mut self, ranges: Vec<Ipv4Network>) {
        self.ranges = ranges;
    }

    pub fn ranges(&self) -> &[Ipv4Network] {
        &self.ranges
    }

    /// How many addresses there are to give, used ones included.
    pub fn capacity(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| usable(*range).map_or(0, |(first, last)| u64::from(last - first) + 1))
            .sum()
    }

    pub fn get(&self, host_interface: &str) -> Option<&Allocation> {
        self.by_interface.get(host_interface)
    }

    /// All allocations, ordered by interface.
    pub fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.by_interface.values()
    }

    /// Gives an address to an attachment: the one that it has, else one that is free.
    pub fn allocate(
        &mut self,
        attachment: &Attachment,
        pod: Option<String>,
    ) -> Result<Allocation, PoolError> {
        let host_interface = host_interface(attachment);
        if let Some(had) = self.by_interface.get_mut(&host_interface) {
            had.attachment = Some(attachment.clone());
            had.pod = pod;
            return Ok(had.clone());
        }
        let address = self.free_address()?;
        let allocation = Allocation {
            address,
            host_interface,
            attachment: Some(attachment.clone()),
            pod,
        };
        self.last = Some(address);
        self.insert(allocation.clone());
        Ok(allocation)
    }

    /// Takes an address back.
    pub fn release(&mut self, host_interface: &str) -> Option<Allocation> {
        let allocation = self.by_interface.remove(host_interface)?;
        self.by_address.remove(&allocation.address);
        Some(allocation)
    }

    /// Takes in what is found on the node: an interface with an address that no allocation names. Refused when the
    /// address is another's.
    pub fn adopt(&mut self, host_interface: &str, address: Ipv4Addr) -> bool {
        if self.by_interface.contains_key(host_interface) || self.by_address.contains_key(&address)
        {
            return false;
        }
        self.insert(Allocation {
            address,
            host_interface: host_interface.into(),
            attachment: None,
            pod: None,
        });
        true
    }

    fn insert(&mut self, allocation: Allocation) {
        self.by_address
            .insert(allocation.address, allocation.host_interface.clone());
        self.by_interface
            .insert(allocation.host_interface.clone(), allocation);
    }

    fn free_address(&self) -> Result<Ipv4Addr, PoolError> {
        let spans: Vec<(u32, u32)> = self
            .ranges
            .iter()
            .filter_map(|range| usable(*range))
            .collect();
        if spans.is_empty() {
            return Err(PoolError::NoRange);
        }
        let last = self.last.map(u32::from);
        let start = spans
            .iter()
            .position(|(first, end)| last.is_some_and(|last| (*first..=*end).contains(&last)))
            .unwrap_or(0);
        // From after the last one to the end of its range, through the others, and around to where it began.
        let after = last.filter(|last| (spans[start].0..=spans[start].1).contains(last));
        let head = after.map_or(spans[start].0, |last| last + 1)..=spans[start].1;
        let others = spans[start + 1..]
            .iter()
            .chain(&spans[..start])
            .flat_map(|(first, end)| *first..=*end);
        let tail = spans[start].0..=after.unwrap_or(spans[start].0);
        head.chain(others)
            .chain(tail)
            .map(Ipv4Addr::from)
            .find(|address| !self.by_address.contains_key(address))
            .ok_or_else(|| PoolError::Exhausted(self.capacity()))
    }
}

/// First and last address of a range that pods can have: not its first and last, which some hosts take for its
/// network and broadcast address.
fn usable(range: Ipv4Network) -> Option<(u32, u32)> {
    let (first, last) = (u32::from(range.network()), u32::from(range.broadcast()));
    match range.prefix() {
        32 => Some((first, last)),
        31 => Some((first, last)),
        _ => Some((first + 1, last - 1)),
    }
}

/// The file that a [`Pool`] survives in.
#[derive(Clone, Debug)]
pub struct AddressFile {
    path: PathBuf,
}

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Content { path: PathBuf, reason: String },
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    last: Option<Ipv4Addr>,
    allocations: Vec<Allocation>,
}

const CONTENT_VERSION: u32 = 1;

impl AddressFile {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join("addresses.json"),
        }
    }

    /// The pool of an earlier agent, without ranges; an empty one if there was none.
    pub fn load(&self) -> Result<Pool, FileError> {
        let bad = |reason: String| FileError::Content {
            path: self.path.clone(),
            reason,
        };
        let json = match fs::read(&self.path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Pool::default()),
            Err(source) => {
                return Err(FileError::Io {
                    path: self.path.clone(),
                    source,
                });
            }
        };
        let content: Content =
            serde_json::from_slice(&json).map_err(|error| bad(error.to_string()))?;
        if content.version != CONTENT_VERSION {
            return Err(bad(format!(
                "version {} is not {CONTENT_VERSION}",
                content.version
            )));
        }
        let mut pool = Pool {
            last: content.last,
            ..Pool::default()
        };
        for allocation in content.allocations {
            if pool.by_interface.contains_key(&allocation.host_interface) {
                return Err(bad(format!(
                    "interface {} is there twice",
                    allocation.host_interface
                )));
            }
            if pool.by_address.contains_key(&allocation.address) {
                return Err(bad(format!(
                    "address {} is there twice",
                    allocation.address
                )));
            }
            pool.insert(allocation);
        }
        Ok(pool)
    }

    /// Keeps a file that cannot be read, under another name, for people to look at.
    pub fn set_aside(&self) -> Result<PathBuf, FileError> {
        let aside = self.path.with_extension("json.unreadable");
        fs::rename(&self.path, &aside).map_err(|source| FileError::Io {
            path: self.path.clone(),
            source,
        })?;
        Ok(aside)
    }

    /// Writes the pool: when this returns, it survives a power cut.
    pub fn save(&self, pool: &Pool) -> Result<(), FileError> {
        let content = Content {
            version: CONTENT_VERSION,
            last: pool.last,
            allocations: pool.allocations().cloned().collect(),
        };
        let write = || -> io::Result<()> {
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(dir)?;
            let partial = self.path.with_extension("json.new");
            let mut file = File::create(&partial)?;
            file.write_all(&serde_json::to_vec_pretty(&content)?)?;
            file.sync_all()?;
            fs::rename(&partial, &self.path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|source| FileError::Io {
            path: self.path.clone(),
            source,
        })
    }
}
