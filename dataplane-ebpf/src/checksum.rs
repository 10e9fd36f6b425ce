//! The Internet checksum and its incremental update (RFC 1071, RFC 1624), over words as they lie in memory: a ones'
//! complement sum is independent of byte order as long as it is stored as its words were read.

/// A sum of words, folded to 32 bits.
#[inline(always)]
const fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// A sum folded to 16 bits.
#[inline(always)]
const fn fold16(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What the sum of a packet grows by when the `old` words in it become the `new` ones.
#[inline(always)]
pub const fn difference<const N: usize>(old: [u32; N], new: [u32; N]) -> u32 {
    let mut sum = 0u64;
    let mut index = 0;
    while index < N {
        sum += !old[index] as u64 + new[index] as u64;
        index += 1;
    }
    fold32(sum)
}

/// The checksum field after what it covers grew by `difference`.
#[inline(always)]
pub const fn updated(field: u16, difference: u32) -> u16 {
    !fold16(fold32(!field as u64 + difference as u64))
}

/// The checksum over 16-bit words whose own field among them is zero.
#[inline(always)]
pub const fn over<const N: usize>(words: &[u16; N], initial: u32) -> u16 {
    let mut sum = initial as u64;
    let mut index = 0;
    while index < N {
        sum += words[index] as u64;
        index += 1;
    }
    !fold16(fold32(sum))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(bytes: &[u8; 20]) -> [u16; 10] {
        core::array::from_fn(|i| u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]))
    }

    #[test]
    fn the_checksum_of_a_known_header_is_known() {
        // The example header of RFC 1071's Wikipedia companion: 45 00 00 73 .. with checksum b861.
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(over(&words(&header), 0).to_ne_bytes(), [0xb8, 0x61]);
    }

    proptest! {
        #[test]
        fn an_updated_checksum_is_as_good_as_one_computed_anew(mut header: [u8; 20], old: [u8; 4], new: [u8; 4]) {
            header[10..12].fill(0);
            header[16..20].copy_from_slice(&old);
            // A header's first byte is never zero, so neither is its sum: the two zeros of ones' complement never meet.
            header[0] = 0x45;
            let before = over(&words(&header), 0);
            header[16..20].copy_from_slice(&new);
            let diff = difference([u32::from_ne_bytes(old)], [u32::from_ne_bytes(new)]);
            prop_assert_eq!(updated(before, diff), over(&words(&header), 0));
        }
    }
}
