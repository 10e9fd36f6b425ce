//! What a DNS server of the node says back: by which rules it answers for the cluster's names, so that the agent can answer alike, or that
//! nobody else must.
//!
//! One that says nothing, being of an earlier version or no DNS server, is not spoken for.

use std::net::IpAddr;

use super::object::Reader;
use super::{BadFrame, frame_bytes};

/// By what a server answers for names of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The cluster's domains, as text.
    pub origins: Vec<String>,
    /// Time to live of records, and of "no data".
    pub ttl_s: u32,
    /// The server's bound on UDP answers, which it tells to clients.
    pub udp_bytes_max: u16,
    /// Answers say that recursion is available.
    pub recursion: bool,
    /// Endpoints without a hostname are called by their pod's name.
    pub endpoint_pod_names: bool,
}

/// What a server says of its answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Whoever is asked at one of these addresses, port 53, may answer by these rules.
    Answer {
        rules: Rules,
        addresses: Vec<IpAddr>,
    },
    /// There is more to its answers than rules can say.
    Refuse,
}

const ANSWER: u8 = 64;
const REFUSE: u8 = 65;

const RECURSION: u8 = 1;
const POD_NAMES: u8 = 2;
const V6: u8 = 1;

/// Addresses and domains that are told at most, each.
const COUNT_MAX: usize = 255;

impl Offer {
    /// Adds the offer's frame to `out`. One with more addresses or domains than can be told, or a domain that is too long, is a refusal.
    pub fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([0; 4]);
        match self {
            Self::Answer { rules, addresses } if tellable(rules, addresses) => {
                let flag = |set, bit| if set { bit } else { 0 };
                out.push(ANSWER);
                out.push(
                    flag(rules.recursion, RECURSION) | flag(rules.endpoint_pod_names, POD_NAMES),
                );
                out.extend(rules.ttl_s.to_le_bytes());
                out.extend(rules.udp_bytes_max.to_le_bytes());
                out.push(rules.origins.len() as u8);
                for origin in &rules.origins {
                    super::object::put_text(out, origin);
                }
                for address in addresses {
                    out.push(flag(address.is_ipv6(), V6));
                    super::object::put_address(out, *address);
                }
            }
            _ => out.push(REFUSE),
        }
        let bytes = (out.len() - start - 4) as u32;
        out[start..start + 4].copy_from_slice(&bytes.to_le_bytes());
    }

    /// Reads what a frame holds, its length left out.
    pub fn read(frame: &[u8]) -> Result<Self, BadFrame> {
        let mut reader = Reader::new(frame);
        match reader.byte()? {
            ANSWER => {}
            REFUSE => {
                reader.end()?;
                return Ok(Self::Refuse);
            }
            other => return Err(BadFrame::Tag(other)),
        }
        let flags = reader.byte()?;
        let mut rules = Rules {
            origins: Vec::new(),
            ttl_s: u32::from_le_bytes(reader.array()?),
            udp_bytes_max: u16::from_le_bytes(reader.array()?),
            recursion: flags & RECURSION != 0,
            endpoint_pod_names: flags & POD_NAMES != 0,
        };
        for _ in 0..reader.byte()? {
            rules.origins.push(reader.text()?.to_owned());
        }
        let mut addresses = Vec::new();
        while !reader.is_empty() {
            let family = reader.byte()?;
            addresses.push(reader.address(family)?);
        }
        Ok(Self::Answer { rules, addresses })
    }
}

/// The length of the offer's frame whose first four bytes these are: they are small.
pub fn offer_bytes(head: [u8; 4]) -> Result<usize, BadFrame> {
    const OFFER_BYTES_MAX: usize = 1 << 17;
    match frame_bytes(head)? {
        bytes if bytes <= OFFER_BYTES_MAX => Ok(bytes),
        bytes => Err(BadFrame::Long(bytes)),
    }
}

fn tellable(rules: &Rules, addresses: &[IpAddr]) -> bool {
    rules.origins.len() <= COUNT_MAX
        && addresses.len() <= COUNT_MAX
        && rules.origins.iter().all(|origin| origin.len() <= COUNT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            origins: vec!["cluster.local.".into(), "corp.example.".into()],
            ttl_s: 30,
            udp_bytes_max: 1232,
            recursion: true,
            endpoint_pod_names: false,
        }
    }

    fn through(offer: &Offer) -> Offer {
        let mut frame = Vec::new();
        offer.put(&mut frame);
        let (head, rest) = frame.split_first_chunk().expect("a length");
        assert_eq!(offer_bytes(*head), Ok(rest.len()));
        for cut in 0..rest.len() {
            assert_ne!(
                Offer::read(&rest[..cut]).as_ref(),
                Ok(offer),
                "cut at {cut}"
            );
        }
        Offer::read(rest).expect("an offer")
    }

    #[test]
    fn an_offer_comes_through_as_it_was() {
        let answer = Offer::Answer {
            rules: rules(),
            addresses: vec![[10, 244, 1, 2].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 2].into()],
        };
        assert_eq!(through(&answer), answer);
        assert_eq!(through(&Offer::Refuse), Offer::Refuse);
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let long = Offer::Answer {
            rules: Rules {
                origins: vec!["a".repeat(256)],
                ..rules()
            },
            addresses: Vec::new(),
        };
        assert_eq!(through(&long), Offer::Refuse);
        assert_eq!(Offer::read(&[REFUSE, 0]), Err(BadFrame::Rest(1)));
        assert_eq!(Offer::read(&[1]), Err(BadFrame::Tag(1)));
        assert!(offer_bytes([0, 0, 0, 1]).is_err());
    }
}
