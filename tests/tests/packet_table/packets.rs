//! Packets of the table, and what the programs make of those that they refuse.

use std::net::Ipv4Addr;

use dataplane_abi::HOST_VETH_MAC;
use keelway_agent::dataplane::ServiceBackends;
use keelway_tests::packets::{
    icmp,
    tcp_flag::{ACK, RST},
};
pub use keelway_tests::packets::{tcp, udp};

/// Where the transport header lies.
const L4: usize = 34;

/// A part of a fragmented datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    First,
    Later,
}

pub fn backends(active: &[&str], terminating: &[&str]) -> ServiceBackends {
    let list = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    ServiceBackends {
        active: list(active),
        terminating: list(terminating),
        ..ServiceBackends::default()
    }
}

pub fn echo(src: &str, dst: &str) -> Vec<u8> {
    icmp(src, dst, 8, 0, &[0; 12])
}

/// Sender and receiver of a packet, as the builders want them.
fn ends(packet: &[u8]) -> [String; 2] {
    [26, 30].map(|at| {
        let octets: [u8; 4] = packet[at..at + 4].try_into().unwrap();
        format!("{}:0", Ipv4Addr::from(octets))
    })
}

fn error(from: &str, to: &str, about: &[u8]) -> Vec<u8> {
    // Unused; the headers; eight bytes more.
    let body = [&[0; 4][..], &about[14..L4 + 8]].concat();
    icmp(from, to, 3, 3, &body)
}

/// An ICMP port unreachable from an address about a packet, to its sender.
pub fn port_unreachable(from: &str, about: &[u8]) -> Vec<u8> {
    let [sender, _] = ends(about);
    error(from, &sender, about)
}

/// What the programs answer to a datagram that they refuse.
pub fn refusal(datagram: &[u8]) -> Vec<u8> {
    let [sender, receiver] = ends(datagram);
    as_programs_write(error(&receiver, &sender, datagram))
}

/// What they answer to a segment with SYN alone and no data, as RFC 9293 has it.
pub fn reset(src: &str, dst: &str) -> Vec<u8> {
    let mut packet = tcp(src, dst, RST | ACK, b"");
    // Sequence number, the acknowledgement of the builders' 0x01020304, the window.
    packet[L4 + 4..L4 + 8].fill(0);
    packet[L4 + 8..L4 + 12].copy_from_slice(&[1, 2, 3, 5]);
    packet[L4 + 14..L4 + 16].fill(0);
    let mut packet = as_programs_write(packet);
    packet[L4 + 16..L4 + 18].fill(0);
    let len = (packet.len() - L4) as u32;
    let pseudo = 6 + len + u32::from(!sum(&packet[26..34], 0));
    let field = sum(&packet[L4..], pseudo);
    packet[L4 + 16..L4 + 18].copy_from_slice(&field.to_be_bytes());
    packet
}

/// Their headers have no identification, and "don't fragment".
fn as_programs_write(mut packet: Vec<u8>) -> Vec<u8> {
    packet[18..22].copy_from_slice(&[0, 0, 0x40, 0]);
    fix_header(&mut packet);
    packet
}

/// A part of a datagram from 10.0.0.11:4000 to the Service.
pub fn fragment(part: Fragment, id: u8) -> Vec<u8> {
    let mut packet = udp("10.0.0.11:4000", "10.96.0.1:80", &[7; 64]);
    packet[19] = id;
    match part {
        Fragment::First => packet[20] = 0x20,
        Fragment::Later => packet[21] = 9,
    }
    fix_header(&mut packet);
    packet
}

/// A datagram with the checksum of another.
pub fn with_checksum_of(mut packet: Vec<u8>, other: &[u8]) -> Vec<u8> {
    packet[L4 + 6..L4 + 8].copy_from_slice(&other[L4 + 6..L4 + 8]);
    packet
}

pub fn with_byte(mut packet: Vec<u8>, offset: usize, value: u8) -> Vec<u8> {
    packet[offset] = value;
    packet
}

/// A packet as it goes by the service veth pair: in the kernel's eyes it is for the host.
pub fn into_the_host(mut packet: Vec<u8>) -> Vec<u8> {
    for at in [0, 6] {
        packet[at..at + 6].copy_from_slice(&HOST_VETH_MAC);
    }
    packet
}

fn fix_header(packet: &mut [u8]) {
    packet[24..26].fill(0);
    let field = sum(&packet[14..34], 0);
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
