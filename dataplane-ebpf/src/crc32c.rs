//! CRC32c (RFC 9260, appendix A) and its incremental update. It is linear: what a change of a message does to it depends on the change
//! and on how many bytes follow, never on the bytes themselves. So a port is changed without reading what a packet carries.
//!
//! Remainders are polynomials over two elements, the coefficient of x^0 in the highest bit, as the CRC has them.

/// x^32 + x^28 + .. + 1 without its first term (Castagnoli's).
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Lengths are 16 bits, taken in four steps of four: each step costs eight lookups, each bit of a step doubles its tables.
const STEPS: usize = 4;
const STEP_VALUES: usize = 16;
/// A remainder is multiplied four bits at a time.
const NIBBLES: usize = 8;
const NIBBLE_VALUES: usize = 16;

/// What the products of one factor with each nibble of another come to, which add up.
type Products = [[u32; NIBBLE_VALUES]; NIBBLES];

/// Products with x^(8 * n * 16^step), at `[step][n]`: what n * 16^step bytes that follow multiply with. Tables, since the verifier of
/// Linux 6.18 looks at both values of each mask that is all ones or none, as bits that are taken one by one make them.
static FOLLOWED: [[Products; STEP_VALUES]; STEPS] = followed();

/// What the CRC at the end of a message of `len` bytes changes by when its first four bytes, as a word of memory on a little-endian
/// machine, change by `difference` (the one exclusive-or the other). Of `len` 16 bits count: a bound that the caller checked would
/// make the compiler leave out the mask below, and the verifier knows of the mask alone.
#[inline(always)]
pub fn change(difference: u32, len: u32) -> u32 {
    let mut remainder = difference;
    let mut step = 0;
    while step < STEPS {
        let value = len >> (4 * step) & (STEP_VALUES as u32 - 1);
        remainder = product(remainder, &FOLLOWED[step][value as usize]);
        step += 1;
    }
    remainder
}

#[inline(always)]
const fn product(a: u32, products: &Products) -> u32 {
    let (mut sum, mut nibble) = (0, 0);
    while nibble < NIBBLES {
        let value = a >> (4 * nibble) & (NIBBLE_VALUES as u32 - 1);
        sum ^= products[nibble][value as usize];
        nibble += 1;
    }
    sum
}

/// The products of a factor.
const fn products(factor: u32) -> Products {
    let mut products = [[0; NIBBLE_VALUES]; NIBBLES];
    // From x^0, the highest bit, on.
    let (mut bit, mut times) = (32, factor);
    while bit > 0 {
        bit -= 1;
        let (nibble, mask) = (bit / 4, 1 << (bit % 4));
        let mut value = 0;
        while value < NIBBLE_VALUES {
            if value & mask != 0 {
                products[nibble][value] ^= times;
            }
            value += 1;
        }
        times = times >> 1 ^ if times & 1 == 0 { 0 } else { POLYNOMIAL };
    }
    products
}

const fn followed() -> [[Products; STEP_VALUES]; STEPS] {
    // x^0, and x^8.
    const ONE: u32 = 1 << 31;
    let mut unit = ONE >> 8;
    let mut tables = [[[[0; NIBBLE_VALUES]; NIBBLES]; STEP_VALUES]; STEPS];
    let mut step = 0;
    while step < STEPS {
        let by_unit = products(unit);
        let (mut value, mut power) = (0, ONE);
        while value < STEP_VALUES {
            tables[step][value] = products(power);
            power = product(power, &by_unit);
            value += 1;
        }
        // Sixteen times.
        unit = power;
        step += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::crc32c;

    #[test]
    fn the_sum_of_a_known_message_is_known() {
        // The check value of the CRC catalogues for "CRC-32/ISCSI".
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn no_change_changes_nothing() {
        assert_eq!(change(0, 1500), 0);
    }

    proptest! {
        #[test]
        fn a_changed_sum_is_the_one_computed_anew(
            first: [u8; 4], rest in prop::collection::vec(any::<u8>(), 0..2000), new: [u8; 4],
        ) {
            let before = [&first[..], &rest].concat();
            let after = [&new[..], &rest].concat();
            let difference = u32::from_le_bytes(first) ^ u32::from_le_bytes(new);
            let changed = crc32c(&before) ^ change(difference, before.len() as u32);
            prop_assert_eq!(changed, crc32c(&after));
        }
    }

    #[test]
    fn the_longest_message_has_its_change() {
        let mut message = std::vec![7; 65_535];
        let before = crc32c(&message);
        message[..4].copy_from_slice(&[1, 2, 3, 4]);
        let difference = u32::from_le_bytes([7; 4]) ^ u32::from_le_bytes([1, 2, 3, 4]);
        assert_eq!(before ^ change(difference, 65_535), crc32c(&message));
    }
}
