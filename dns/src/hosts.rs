//! Names from a file in the format of /etc/hosts, or from the configuration.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::answer::{Policy, Rcode, Transport, Verdict, Writer, room};
use crate::name::{Name, in_any, in_any_or_all};
use crate::query::{Query, rtype};

/// A table of hosts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hosts {
    addresses: HashMap<Name, Vec<IpAddr>>,
    names: HashMap<Name, Vec<Name>>,
    pub ttl_s: u32,
    /// The zones that the table is about: all names, where none is named.
    pub zones: Vec<Name>,
    /// Names that are not in the table may exist elsewhere: in these zones; none for nowhere.
    pub fallthrough: Vec<Name>,
    pub reverse: bool,
}

/// Why a line is no entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line:?} is not ADDRESS NAME...")]
pub struct BadHost {
    line: String,
}

impl Hosts {
    /// An empty table, whose records have this TTL.
    pub fn new(ttl_s: u32) -> Self {
        Self {
            ttl_s,
            reverse: true,
            ..Self::default()
        }
    }

    /// Adds what the lines of a hosts file say.
    pub fn add_file(&mut self, text: &str) -> Result<(), BadHost> {
        for line in text.lines() {
            let entry = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = entry.split_whitespace().collect();
            if let [address, names @ ..] = &words[..] {
                self.add(address, names)?;
            }
        }
        Ok(())
    }

    /// Adds the names of an address.
    pub fn add(&mut self, address: &str, names: &[&str]) -> Result<(), BadHost> {
        let bad = || BadHost {
            line: [&[address], names].concat().join(" "),
        };
        // Files have scopes on link-local addresses; a resolver could not use them.
        let address = address.split('%').next().unwrap_or_default();
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        if names.is_empty() {
            return Err(bad());
        }
        for name in names {
            let name = Name::parse(name).map_err(|_| bad())?;
            let addresses = self.addresses.entry(name.clone()).or_default();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
            let names = self.names.entry(Name::reverse(address)).or_default();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Ok(())
    }

    /// Every name of the table.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.addresses.keys()
    }

    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Whether the table is about a name.
    pub fn is_about(&self, name: &[u8]) -> bool {
        in_any_or_all(name, &self.zones)
    }

    /// Answers a query about a name of the table. One that can be nowhere else fails: "no" would need an SOA, which a table has not, to
    /// say for how long. Reversed addresses that are not in the table are others' in any case.
    pub fn answer(
        &self,
        policy: &Policy,
        query: &Query<'_>,
        transport: Transport,
        out: &mut [u8],
    ) -> Verdict {
        let is_about = self.is_about(query.name());
        if !is_about && query.rtype != rtype::PTR {
            return Verdict::Elsewhere;
        }
        let room = room(query, policy, transport, out);
        let mut writer = Writer::start(query, policy, &mut out[..room]);
        writer.authoritative = true;
        if query.rtype == rtype::PTR
            && self.reverse
            && let Some(names) = self.names.get(query.name())
        {
            for name in names {
                writer.raw(rtype::PTR, self.ttl_s, name.wire());
            }
            return writer.finish(Rcode::NoError);
        }
        let addresses = self.addresses.get(query.name()).filter(|_| is_about);
        if let Some(addresses) = addresses {
            for address in addresses {
                match (address, query.rtype) {
                    (IpAddr::V4(v4), rtype::A) => writer.raw(rtype::A, self.ttl_s, &v4.octets()),
                    (IpAddr::V6(v6), rtype::AAAA) => {
                        writer.raw(rtype::AAAA, self.ttl_s, &v6.octets());
                    }
                    _ => {}
                }
            }
            return writer.finish(Rcode::NoError);
        }
        if query.rtype == rtype::PTR || in_any(query.name(), &self.fallthrough) {
            Verdict::Elsewhere
        } else {
            writer.finish(Rcode::ServFail)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_file_is_read_with_its_comments_and_scopes() {
        let mut hosts = Hosts::default();
        let text =
            "# all of them\n127.0.0.1 localhost me # here\nfe80::1%eth0 link\n\n::1 localhost\n";
        hosts.add_file(text).expect("a hosts file");
        assert_eq!(hosts.len(), 3);
        let name = Name::parse("LOCALHOST").expect("a name");
        assert_eq!(hosts.addresses[&name].len(), 2);
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let mut hosts = Hosts::default();
        let error = hosts
            .add_file("10.0.0.1 ok\nten.0.0.1 name\n")
            .expect_err("no address");
        assert!(error.to_string().contains("ten.0.0.1 name"), "{error}");
        assert!(hosts.add_file("10.0.0.1\n").is_err());
    }
}
