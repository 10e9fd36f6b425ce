//! The packet filter of one namespace, as far as an agent must know it: which chains there are, what those do with packets that no rule
//! speaks of, and rules of ours in them. iptables, where it is nft's, is in the same tables.
//!
//! The messages are few and small, so they are written here (linux/netfilter/nf_tables.h).

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::NetlinkError;
use super::answer::{HEADER_LEN, messages};

/// A family of tables: NFPROTO_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family(u8);

impl Family {
    pub const INET: Self = Self(1);
    pub const IPV4: Self = Self(2);
    pub const IPV6: Self = Self(10);

    pub fn name(self) -> &'static str {
        match self {
            Self::INET => "inet",
            Self::IPV4 => "ip",
            Self::IPV6 => "ip6",
            _ => "other",
        }
    }

    /// Whether its chains see packets that are routed.
    fn is_routed(self) -> bool {
        [Self::INET, Self::IPV4, Self::IPV6].contains(&self)
    }
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub family: Family,
    pub table: String,
    pub name: String,
    /// It sees every packet that this machine forwards.
    pub forwards: bool,
    /// What no rule speaks of is dropped.
    pub drops: bool,
}

/// A rule of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OurRule {
    pub family: Family,
    pub table: String,
    pub chain: String,
    pub side: Side,
    handle: u64,
}

/// Which side of forwarded packets a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    From,
    To,
}

impl Side {
    /// What rules of ours are known by: nft shows it as their comment.
    fn comment(self) -> &'static str {
        match self {
            Side::From => "keelway: from pods",
            Side::To => "keelway: to pods",
        }
    }
}

const SUBSYSTEM: u16 = 10 << 8;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const GET_RULE: u16 = SUBSYSTEM | 7;
const DELETE_RULE: u16 = SUBSYSTEM | 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// nfgenmsg.
const FAMILY_LEN: usize = 4;
const NESTED: u16 = 1 << 15;
const HOOK_FORWARD: u32 = 2;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// A socket to the packet filter of the calling thread's network namespace.
pub struct Nftables {
    socket: Socket,
    sequence: u32,
}

impl Nftables {
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || -> io::Result<Self> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Self {
                socket,
                sequence: 0,
            })
        };
        open().map_err(|source| NetlinkError::new("open a socket to the packet filter", source))
    }

    /// All chains, hooked or not.
    pub fn chains(&mut self) -> Result<Vec<Chain>, NetlinkError> {
        let answers = self
            .dump(GET_CHAIN, NEW_CHAIN)
            .map_err(|source| NetlinkError::new("list chains of the packet filter", source))?;
        Ok(answers
            .iter()
            .filter_map(|(family, attributes)| read_chain(*family, attributes))
            .collect())
    }

    /// Rules of ours, in whatever chains.
    pub fn our_rules(&mut self) -> Result<Vec<OurRule>, NetlinkError> {
        let answers = self
            .dump(GET_RULE, NEW_RULE)
            .map_err(|source| NetlinkError::new("list rules of the packet filter", source))?;
        Ok(answers
            .iter()
            .filter_map(|(family, attributes)| read_our_rule(*family, attributes))
            .collect())
    }

    /// Lets everything pass a chain that comes from, or goes to, interfaces whose names begin like this, before the chain's other rules
    /// are asked.
    pub fn let_pass(
        &mut self,
        chain: &Chain,
        side: Side,
        interfaces: &str,
    ) -> Result<(), NetlinkError> {
        let mut rule = Attributes::default();
        rule.text(1, &chain.table);
        rule.text(2, &chain.name);
        rule.nest(4, |expressions| {
            let key = match side {
                Side::From => 6_u32,
                Side::To => 7,
            };
            expressions.expression("meta", |meta| {
                meta.number(1, 1);
                meta.number(2, key);
            });
            expressions.expression("cmp", |cmp| {
                cmp.number(1, 1);
                cmp.number(2, 0);
                // Without the byte that ends a name: any may follow.
                cmp.nest(3, |data| data.bytes(1, interfaces.as_bytes()));
            });
            expressions.expression("counter", |_| {});
            expressions.expression("immediate", |verdict| {
                verdict.number(1, 0);
                verdict.nest(2, |data| data.nest(2, |code| code.number(1, ACCEPT)));
            });
        });
        rule.bytes(7, &user_data(side));
        let operation = format!(
            "add a rule to chain {} of table {} {}",
            chain.name,
            chain.family.name(),
            chain.table
        );
        self.change(NEW_RULE, NLM_F_CREATE, chain.family, rule)
            .map_err(|source| NetlinkError::new(operation, source))
    }

    /// Removes a rule of ours.
    pub fn remove(&mut self, rule: &OurRule) -> Result<(), NetlinkError> {
        let mut named = Attributes::default();
        named.text(1, &rule.table);
        named.text(2, &rule.chain);
        named.bytes(3, &rule.handle.to_be_bytes());
        self.change(DELETE_RULE, 0, rule.family, named)
            .map_err(|source| {
                NetlinkError::new(format!("remove a rule from chain {}", rule.chain), source)
            })
    }

    /// Changes come in transactions, also one alone.
    fn change(
        &mut self,
        kind: u16,
        flags: u16,
        family: Family,
        attributes: Attributes,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        self.message(&mut bytes, BATCH_BEGIN, 0, Family(0), 10, &[]);
        self.message(
            &mut bytes,
            kind,
            NLM_F_ACK | flags,
            family,
            0,
            &attributes.0,
        );
        let awaited = self.sequence;
        self.message(&mut bytes, BATCH_END, 0, Family(0), 10, &[]);
        self.socket.send(&bytes, 0)?;
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            for answer in messages(&received) {
                if answer.kind != NLMSG_ERROR {
                    continue;
                }
                match answer.error() {
                    0 if answer.sequence == awaited => return Ok(()),
                    0 => {}
                    errno => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }

    fn dump(&mut self, ask: u16, wanted: u16) -> io::Result<Vec<(Family, Vec<u8>)>> {
        let mut bytes = Vec::new();
        self.message(&mut bytes, ask, NLM_F_DUMP, Family(0), 0, &[]);
        self.socket.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            for answer in messages(&received) {
                if answer.sequence != self.sequence {
                    continue;
                }
                if answer.flags & NLM_F_DUMP_INTR != 0 {
                    // What is looked at again in a few seconds need not be whole now.
                    tracing::debug!("the packet filter changed while it was read");
                }
                match answer.kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => return Err(io::Error::from_raw_os_error(answer.error())),
                    kind if kind == wanted => {
                        if let Some((family, attributes)) = answer.body.split_at_checked(FAMILY_LEN)
                        {
                            found.push((Family(family[0]), attributes.to_vec()));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn message(
        &mut self,
        bytes: &mut Vec<u8>,
        kind: u16,
        flags: u16,
        family: Family,
        resource: u16,
        attributes: &[u8],
    ) {
        self.sequence = self.sequence.wrapping_add(1);
        let length = (HEADER_LEN + FAMILY_LEN + attributes.len()) as u32;
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        // The kernel knows the sender by the socket.
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend([family.0, 0]);
        bytes.extend(resource.to_be_bytes());
        bytes.extend(attributes);
    }
}

/// Attributes being written.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        // Values are names and numbers, far from this limit.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat());
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(kind | NESTED, &inner.0);
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Self)) {
        self.nest(1, |element| {
            element.text(1, name);
            element.nest(2, fill);
        });
    }
}

/// Attributes being read. What is cut off ends them.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *bytes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]) & !NESTED;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|four| u32::from_be_bytes(*four))
}

fn read_chain(family: Family, bytes: &[u8]) -> Option<Chain> {
    let hook = attribute(bytes, 4).and_then(|hook| number(attribute(hook, 1)?));
    let forwards = family.is_routed() && hook == Some(HOOK_FORWARD);
    Some(Chain {
        family,
        table: text(attribute(bytes, 1)?),
        name: text(attribute(bytes, 3)?),
        forwards,
        drops: hook.is_some() && attribute(bytes, 5).and_then(number) == Some(DROP),
    })
}

fn read_our_rule(family: Family, bytes: &[u8]) -> Option<OurRule> {
    let written = attribute(bytes, 7)?;
    let side = [Side::From, Side::To]
        .into_iter()
        .find(|side| user_data(*side) == written)?;
    Some(OurRule {
        side,
        family,
        table: text(attribute(bytes, 1)?),
        chain: text(attribute(bytes, 2)?),
        handle: u64::from_be_bytes(*attribute(bytes, 3)?.first_chunk()?),
    })
}

/// A comment as nft writes it: kind 0, length, text.
fn user_data(side: Side) -> Vec<u8> {
    let text = [side.comment().as_bytes(), &[0]].concat();
    [&[0, text.len() as u8], text.as_slice()].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_chain_is_read_as_it_is_written() {
        let mut written = Attributes::default();
        written.text(1, "filter");
        written.text(3, "FORWARD");
        written.nest(4, |hook| {
            hook.number(1, HOOK_FORWARD);
            hook.number(2, 0);
        });
        written.number(5, DROP);
        let chain = read_chain(Family::IPV4, &written.0).expect("a chain");
        assert!(chain.forwards && chain.drops);
        assert_eq!(
            (chain.table.as_str(), chain.name.as_str()),
            ("filter", "FORWARD")
        );
        // A bridge's packets are not routed here.
        assert!(!read_chain(Family(7), &written.0).expect("a chain").forwards);
    }

    #[test]
    fn only_rules_with_our_comment_are_ours() {
        let rule = |words: &[u8]| {
            let mut written = Attributes::default();
            written.text(1, "filter");
            written.text(2, "FORWARD");
            written.bytes(3, &7_u64.to_be_bytes());
            written.bytes(7, words);
            read_our_rule(Family::INET, &written.0)
        };
        let ours = rule(&user_data(Side::To)).expect("ours");
        assert_eq!((ours.handle, ours.side), (7, Side::To));
        assert_eq!(rule(b"\0\x08another\0"), None);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_to_its_end(bytes: Vec<u8>) {
            for answer in messages(&bytes) {
                let _ = (answer.error(), answer.flags, answer.sequence, answer.kind);
                let _ = read_chain(Family::IPV4, answer.body);
                let _ = read_our_rule(Family::IPV4, answer.body);
            }
            let _ = read_chain(Family::IPV4, &bytes);
        }
    }
}
