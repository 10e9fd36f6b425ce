//! What the kernel answers by netlink, for families whose messages are written here.

/// Of a message: its length, type and flags, its number, and whom it is for.
pub const HEADER_LEN: usize = 16;

/// A message of the kernel.
pub struct Answer<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub body: &'a [u8],
}

impl Answer<'_> {
    /// The error number that it begins with; 0 is success.
    pub fn error(&self) -> i32 {
        self.body.first_chunk().map_or(libc::EBADMSG, |code| {
            i32::from_ne_bytes(*code).saturating_neg()
        })
    }
}

/// The messages in what was received.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<HEADER_LEN>()?;
        let word = |at: usize| {
            let mut four = [0; 4];
            four.copy_from_slice(&header[at..at + 4]);
            u32::from_ne_bytes(four)
        };
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let length = word(0) as usize;
        let answer = Answer {
            kind: half(4),
            flags: half(6),
            sequence: word(8),
            body: bytes.get(HEADER_LEN..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(answer)
    })
}
