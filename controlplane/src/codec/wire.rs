//! The protobuf wire format: fields of a message, read and written.

/// A message that ends too early or has a malformed field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the protobuf message is malformed")]
pub struct Malformed;

/// Value is one field's content.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    pub fn bytes(self) -> Result<&'a [u8], Malformed> {
        if let Self::Bytes(bytes) = self {
            Ok(bytes)
        } else {
            Err(Malformed)
        }
    }
    pub fn text(self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Malformed)
    }
    pub fn varint(self) -> Result<u64, Malformed> {
        if let Self::Varint(n) = self {
            Ok(n)
        } else {
            Err(Malformed)
        }
    }
    /// int32 and int64 alike: negative ones are ten bytes of two's complement.
    pub fn int(self) -> Result<i64, Malformed> {
        self.varint().map(|n| n as i64)
    }
    pub fn double(self) -> Result<f64, Malformed> {
        if let Self::Fixed64(bits) = self {
            Ok(f64::from_bits(bits))
        } else {
            Err(Malformed)
        }
    }
}

/// Reader walks the fields of a message.
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    /// The next field's number and content.
    pub fn next(&mut self) -> Result<Option<(u32, Value<'a>)>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| Malformed)?;
        if number == 0 {
            return Err(Malformed);
        }
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(
                self.take(8)?.try_into().map_err(|_| Malformed)?,
            )),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Malformed)?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(
                self.take(4)?.try_into().map_err(|_| Malformed)?,
            )),
            // Groups have no place in Kubernetes' messages.
            _ => return Err(Malformed),
        };
        Ok(Some((number, value)))
    }

    /// The varints of a packed field.
    pub fn packed(mut self) -> Result<Vec<u64>, Malformed> {
        let mut out = Vec::new();
        while !self.rest.is_empty() {
            out.push(self.varint()?);
        }
        Ok(out)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let (byte, rest) = self.rest.split_first().ok_or(Malformed)?;
            self.rest = rest;
            if shift == 63 && *byte > 1 {
                return Err(Malformed);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }
}

/// Writer appends fields to a message.
#[derive(Default)]
pub struct Writer {
    pub out: Vec<u8>,
}

impl Writer {
    fn raw_varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.out.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.out.push(n as u8);
    }
    pub fn varint(&mut self, number: u16, n: u64) {
        self.raw_varint(u64::from(number) << 3);
        self.raw_varint(n);
    }
    pub fn double(&mut self, number: u16, n: f64) {
        self.raw_varint(u64::from(number) << 3 | 1);
        self.out.extend_from_slice(&n.to_bits().to_le_bytes());
    }
    pub fn bytes(&mut self, number: u16, bytes: &[u8]) {
        self.prefix(number, bytes.len());
        self.out.extend_from_slice(bytes);
    }
    /// What stands before so many bytes of a field.
    pub fn prefix(&mut self, number: u16, length: usize) {
        self.raw_varint(u64::from(number) << 3 | 2);
        self.raw_varint(length as u64);
    }
    /// How much [`Writer::bytes`] writes.
    pub fn bytes_length(number: u16, length: usize) -> usize {
        let varint = |n: u64| n.checked_ilog2().unwrap_or(0) as usize / 7 + 1;
        varint(u64::from(number) << 3) + varint(length as u64) + length
    }
    /// A nested message, written in place by `fill`, with its length put before it afterwards: nothing is allocated, and
    /// each byte moves at most once per level.
    pub fn nested<T>(&mut self, number: u16, fill: impl FnOnce(&mut Writer) -> T) -> T {
        self.raw_varint(u64::from(number) << 3 | 2);
        let start = self.out.len();
        let filled = fill(self);
        let length = self.out.len() - start;
        self.raw_varint(length as u64);
        let prefix = self.out.len() - start - length;
        self.out[start..].rotate_right(prefix);
        filled
    }
    /// A nested message, written by `fill`.
    pub fn message(&mut self, number: u16, fill: impl FnOnce(&mut Writer)) {
        let mut inner = Writer::default();
        fill(&mut inner);
        self.bytes(number, &inner.out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut w = Writer::default();
        w.varint(1, 300);
        w.varint(2, -1i64 as u64);
        w.double(3, 1.5);
        w.bytes(200, b"abc");
        w.nested(5, |w| w.varint(1, 0));
        let mut r = Reader::new(&w.out);
        assert_eq!(r.next().unwrap().unwrap(), (1, Value::Varint(300)));
        assert_eq!(r.next().unwrap().unwrap().1.int(), Ok(-1));
        assert_eq!(r.next().unwrap().unwrap().1.double(), Ok(1.5));
        assert_eq!(r.next().unwrap().unwrap(), (200, Value::Bytes(b"abc")));
        assert_eq!(r.next().unwrap().unwrap(), (5, Value::Bytes(&[8, 0])));
        assert_eq!(r.next(), Ok(None));
        assert_eq!(Reader::new(&[1, 0x80, 1]).packed(), Ok(vec![1, 128]));
    }

    #[test]
    fn lengths_are_known_before_anything_is_written() {
        for length in [0, 1, 127, 128, 16_383, 16_384, 70_000] {
            for number in [1, 15, 16, 2047, 2048] {
                let mut w = Writer::default();
                w.bytes(number, &vec![7; length]);
                assert_eq!(w.out.len(), Writer::bytes_length(number, length));
            }
        }
    }

    #[test]
    fn what_ends_too_early_or_overflows_is_refused() {
        for bad in [
            &[0x08][..],
            &[0x0a, 5, 1],
            &[0x80],
            &[0x0b],
            &[0x00, 0x00],
            &[0x09, 1],
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
        ] {
            assert_eq!(Reader::new(bad).next(), Err(Malformed), "{bad:?}");
        }
    }
}
