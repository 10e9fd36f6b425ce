//! Packets of either family from one description.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dataplane_abi::{HAIRPIN_V4, HAIRPIN_V6, HOST_VETH_MAC};
use ipnetwork::IpNetwork;
use keelway_agent::dataplane::ServiceBackends;
use keelway_tests::packets::{
    self,
    tcp_flag::{ACK, RST},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
}

/// A part of a fragmented datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    First,
    Later,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The address, in this family: IPv6 has the IPv4 ones at the end of fd00::/96, and its own for what has a meaning.
    pub fn ip(self, v4: &str) -> IpAddr {
        let v4: Ipv4Addr = v4.parse().unwrap();
        match self {
            Self::V4 => v4.into(),
            Self::V6 if v4.is_unspecified() => Ipv6Addr::UNSPECIFIED.into(),
            Self::V6 if v4.octets() == HAIRPIN_V4 => Ipv6Addr::from(HAIRPIN_V6).into(),
            Self::V6 => {
                let [a, b, c, d] = v4.octets();
                let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, high, low).into()
            }
        }
    }

    /// The same with a port.
    pub fn at(self, v4: &str) -> SocketAddr {
        let (ip, port) = v4.split_once(':').unwrap();
        SocketAddr::new(self.ip(ip), port.parse().unwrap())
    }

    /// A range of addresses, with as many bits more in IPv6 as its addresses have.
    pub fn range(self, v4: &str) -> IpNetwork {
        let v4: IpNetwork = v4.parse().unwrap();
        let len = match self {
            Self::V4 => v4.prefix(),
            Self::V6 => v4.prefix() + 96,
        };
        IpNetwork::new(self.ip(&v4.network().to_string()), len).unwrap()
    }

    /// An address with a port as the builders of packets want it.
    pub fn text(self, v4: &str) -> String {
        self.at(v4).to_string()
    }

    /// Where the transport header lies.
    pub fn l4(self) -> usize {
        match self {
            Self::V4 => 34,
            Self::V6 => 54,
        }
    }

    pub fn backends(self, active: &[&str], terminating: &[&str]) -> ServiceBackends {
        let list = |texts: &[&str]| texts.iter().map(|text| self.at(text)).collect();
        ServiceBackends {
            active: list(active),
            terminating: list(terminating),
            ..ServiceBackends::default()
        }
    }

    pub fn tcp(self, src: &str, dst: &str, flags: u8, payload: &[u8]) -> Vec<u8> {
        packets::tcp(&self.text(src), &self.text(dst), flags, payload)
    }

    pub fn udp(self, src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
        packets::udp(&self.text(src), &self.text(dst), payload)
    }

    pub fn sctp(self, src: &str, dst: &str, chunk: u8, value: &[u8]) -> Vec<u8> {
        packets::sctp(&self.text(src), &self.text(dst), chunk, value)
    }

    pub fn icmp(self, src: &str, dst: &str, kind: u8, body: &[u8]) -> Vec<u8> {
        packets::icmp(&self.text(src), &self.text(dst), kind, 0, body)
    }

    /// ICMP types of an echo's request and reply.
    pub fn echo_kinds(self) -> [u8; 2] {
        match self {
            Self::V4 => [8, 0],
            Self::V6 => [128, 129],
        }
    }

    pub fn echo(self, src: &str, dst: &str) -> Vec<u8> {
        self.icmp(src, dst, self.echo_kinds()[0], &[0; 12])
    }

    /// Sender and receiver of a packet, as the builders want them.
    fn ends(self, packet: &[u8]) -> [String; 2] {
        let octets = |at: usize| match self {
            Self::V4 => {
                let octets: [u8; 4] = packet[26 + 4 * at..30 + 4 * at].try_into().unwrap();
                IpAddr::from(octets)
            }
            Self::V6 => {
                let octets: [u8; 16] = packet[22 + 16 * at..38 + 16 * at].try_into().unwrap();
                IpAddr::from(octets)
            }
        };
        [0, 1].map(|at| SocketAddr::new(octets(at), 0).to_string())
    }

    fn error(self, from: &str, to: &str, about: &[u8]) -> Vec<u8> {
        // Unused; the headers; eight bytes more.
        let quoted = &about[14..self.l4() + 8];
        let body = [&[0; 4][..], quoted].concat();
        match self {
            Self::V4 => packets::icmp(from, to, 3, 3, &body),
            Self::V6 => packets::icmp(from, to, 1, 4, &body),
        }
    }

    /// An ICMP port unreachable from an address about a packet, to its sender.
    pub fn port_unreachable(self, from: &str, about: &[u8]) -> Vec<u8> {
        let [sender, _] = self.ends(about);
        self.error(&self.text(from), &sender, about)
    }

    /// What the programs answer to a datagram that they refuse.
    pub fn refusal(self, datagram: &[u8]) -> Vec<u8> {
        let [sender, receiver] = self.ends(datagram);
        self.as_programs_write(self.error(&receiver, &sender, datagram))
    }

    /// What they answer to a packet that is longer than its way takes, with so much as they quote.
    pub fn too_big(self, about: &[u8], mtu: u16) -> Vec<u8> {
        let [sender, from] = self.ends(about);
        let mtu = [&[0; 2][..], &mtu.to_be_bytes()].concat();
        self.as_programs_write(match self {
            Self::V4 => packets::icmp(&from, &sender, 3, 4, &[&mtu, &about[14..82]].concat()),
            Self::V6 => packets::icmp(&from, &sender, 2, 0, &[&mtu, &about[14..94]].concat()),
        })
    }

    /// What they answer to a segment with SYN alone and no data, as RFC 9293 has it.
    pub fn reset(self, src: &str, dst: &str) -> Vec<u8> {
        let mut packet = self.tcp(src, dst, RST | ACK, b"");
        let l4 = self.l4();
        // Sequence number, the acknowledgement of the builders' 0x01020304, the window.
        packet[l4 + 4..l4 + 8].fill(0);
        packet[l4 + 8..l4 + 12].copy_from_slice(&[1, 2, 3, 5]);
        packet[l4 + 14..l4 + 16].fill(0);
        let mut packet = self.as_programs_write(packet);
        packet[l4 + 16..l4 + 18].fill(0);
        let len = (packet.len() - l4) as u32;
        let addresses = match self {
            Self::V4 => 26..34,
            Self::V6 => 22..54,
        };
        let pseudo = 6 + len + u32::from(!sum(&packet[addresses], 0));
        let field = sum(&packet[l4..], pseudo);
        packet[l4 + 16..l4 + 18].copy_from_slice(&field.to_be_bytes());
        packet
    }

    /// Their IPv4 headers have no identification, and "don't fragment".
    fn as_programs_write(self, mut packet: Vec<u8>) -> Vec<u8> {
        if self == Self::V4 {
            packet[18..22].copy_from_slice(&[0, 0, 0x40, 0]);
            fix_header(&mut packet);
        }
        packet
    }

    /// A part of a datagram from 10.0.0.11:4000 to the Service.
    pub fn fragment(self, part: Fragment, id: u8) -> Vec<u8> {
        let mut packet = self.udp("10.0.0.11:4000", "10.96.0.1:80", &[7; 64]);
        match self {
            Self::V4 => {
                packet[19] = id;
                match part {
                    Fragment::First => packet[20] = 0x20,
                    Fragment::Later => packet[21] = 9,
                }
                fix_header(&mut packet);
            }
            Self::V6 => {
                let offset = match part {
                    Fragment::First => [0, 1],
                    Fragment::Later => [0, 72],
                };
                let header = [17, 0, offset[0], offset[1], 0, 0, 0, id];
                packet.splice(54..54, header);
                packet[19] += 8;
                packet[20] = 44;
            }
        }
        packet
    }

    /// A datagram with the checksum of another.
    pub fn with_checksum_of(self, mut packet: Vec<u8>, other: &[u8]) -> Vec<u8> {
        let field = self.l4() + 6..self.l4() + 8;
        packet[field.clone()].copy_from_slice(&other[field]);
        packet
    }
}

/// A packet as it goes by the service veth pair: in the kernel's eyes it is for the host.
pub fn into_the_host(mut packet: Vec<u8>) -> Vec<u8> {
    for at in [0, 6] {
        packet[at..at + 6].copy_from_slice(&HOST_VETH_MAC);
    }
    packet
}

pub fn with_byte(mut packet: Vec<u8>, offset: usize, value: u8) -> Vec<u8> {
    packet[offset] = value;
    packet
}

/// Makes the sum of an IPv4 header right.
pub fn fix_header(packet: &mut [u8]) {
    packet[24..26].fill(0);
    let end = 14 + 4 * usize::from(packet[14] & 15);
    let field = sum(&packet[14..end], 0);
    packet[24..26].copy_from_slice(&field.to_be_bytes());
}

fn sum(bytes: &[u8], initial: u32) -> u16 {
    let mut total: u32 = initial
        + bytes
            .chunks(2)
            .map(|pair| (pair[0] as u32) << 8 | pair.get(1).map_or(0, |b| *b as u32))
            .sum::<u32>();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}
