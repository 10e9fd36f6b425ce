//! Frames with questions, and what is right about those with answers.

use std::net::IpAddr;

use proptest::prelude::*;

use crate::{CLIENT, CLIENT_V6, SERVER, SERVER_V6};

fn sum(bytes: &[u8]) -> u32 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    words.sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// An Ethernet frame with a datagram to port 53.
pub fn datagram(from: IpAddr, to: IpAddr, payload: &[u8]) -> Vec<u8> {
    let udp = (payload.len() as u16 + 8).to_be_bytes();
    let mut packet = vec![2; 12];
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([8, 0, 0x45, 0]);
            packet.extend((payload.len() as u16 + 28).to_be_bytes());
            packet.extend([0, 1, 0, 0, 64, 17, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            packet.extend(udp);
            packet.extend([17, 64]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        _ => panic!("two families"),
    }
    packet.extend([0x9c, 0x40, 0, 53]);
    packet.extend(udp);
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

/// The payload of an answer whose headers are right.
pub fn opened(packet: &[u8], v6: bool) -> Result<&[u8], TestCaseError> {
    let udp = if v6 {
        prop_assert_eq!(&packet[22..38], &SERVER_V6.octets());
        prop_assert_eq!(&packet[38..54], &CLIENT_V6.octets());
        let mut pseudo = sum(&packet[22..54]) + 17 + (packet.len() as u32 - 54);
        pseudo += sum(&packet[54..]);
        prop_assert_eq!(folded(pseudo), 0xffff, "the checksum");
        prop_assert_eq!(&packet[18..20], &(packet.len() as u16 - 54).to_be_bytes());
        &packet[54..]
    } else {
        prop_assert_eq!(&packet[26..30], &SERVER.octets());
        prop_assert_eq!(&packet[30..34], &CLIENT.octets());
        prop_assert_eq!(folded(sum(&packet[14..34])), 0xffff, "the checksum");
        prop_assert_eq!(&packet[16..18], &(packet.len() as u16 - 14).to_be_bytes());
        &packet[34..]
    };
    prop_assert_eq!(&udp[..4], &[0, 53, 0x9c, 0x40]);
    prop_assert_eq!(&udp[4..6], &(udp.len() as u16).to_be_bytes());
    Ok(&udp[8..])
}
