//! Messages of other servers: read once, checked, and taken apart into what is served again.

use hickory_proto::op::Message;

use crate::answer::{Rcode, Section, Writer};
use crate::query::{HEADER_BYTES, rtype, skip_name};

/// An answer of another server, without its header, question and OPT record.
#[derive(Clone, Debug)]
pub struct Reply {
    pub rcode: Rcode,
    /// The server says that it has validated the answer (the AD bit).
    pub authentic: bool,
    pub kind: Kind,
    /// There is more, but the server could not be made to say it.
    truncated: bool,
    /// The sections, one after another, as they stood behind the question.
    wire: Box<[u8]>,
    records: Box<[Mark]>,
    /// Records of each section, and where it ends in `wire`.
    counts: [u16; 3],
    ends: [usize; 3],
    /// Bytes that stood before `wire` in the message, which compression pointers count from.
    start: usize,
}

/// What an answer says, and for how many seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Data(u32),
    /// No such name, or no data of this type, with an SOA record that says how long (RFC 2308).
    Denial(u32),
    /// The server could not tell.
    Failure,
    /// A denial without SOA, say: good for those who wait, for nobody later (RFC 2308, 5).
    Uncacheable,
}

/// Where a record stands in `wire`.
#[derive(Clone, Copy, Debug)]
struct Mark {
    start: u16,
    ttl_at: u16,
    end: u16,
    rtype: u16,
}

/// Why a message can't be an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReply {
    #[error("is cut off or malformed")]
    Malformed,
    #[error("answers another question")]
    OtherQuestion,
    #[error("spells the name differently from the question")]
    OtherSpelling,
}

/// Whether `message` answers the question, which is in wire format as it was sent; then its question is checked to the letter.
pub fn belongs(message: &[u8], id: [u8; 2], question: &[u8]) -> Result<(), BadReply> {
    let end = HEADER_BYTES + question.len();
    if message.len() < HEADER_BYTES || message[..2] != id || message[2] & 0x80 == 0 {
        return Err(BadReply::OtherQuestion);
    }
    // Servers that fail early may leave the question out (RFC 1035 does not say); then there is nothing to believe but that.
    let asked = u16::from_be_bytes([message[4], message[5]]);
    if asked == 0 && !matches!(Rcode::of(message), Rcode::NoError | Rcode::NxDomain) {
        return Ok(());
    }
    let theirs = message
        .get(HEADER_BYTES..end)
        .ok_or(BadReply::OtherQuestion)?;
    if asked != 1 || !theirs.eq_ignore_ascii_case(question) {
        return Err(BadReply::OtherQuestion);
    }
    if theirs == question {
        Ok(())
    } else {
        Err(BadReply::OtherSpelling)
    }
}

/// Whether a message says that it is not all there is.
pub fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 0x02 != 0)
}

const FIXED_BYTES: usize = 10;

impl Reply {
    /// Reads a message that answers a question of `question_bytes` for records of type `asked`.
    pub fn read(message: &[u8], question_bytes: usize, asked: u16) -> Result<Self, BadReply> {
        match Self::walk(message, question_bytes, asked)? {
            Some(reply) => Ok(reply),
            // An OPT record in the middle: written anew without it, so that pointers behind it are right.
            None => {
                let mut parsed = Message::from_vec(message).map_err(|_| BadReply::Malformed)?;
                parsed.edns = None;
                let message = parsed.to_vec().map_err(|_| BadReply::Malformed)?;
                Self::walk(&message, question_bytes, asked)?.ok_or(BadReply::Malformed)
            }
        }
    }

    fn walk(message: &[u8], question_bytes: usize, asked: u16) -> Result<Option<Self>, BadReply> {
        let header = message.get(..HEADER_BYTES).ok_or(BadReply::Malformed)?;
        let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let mut rcode = Rcode::of(message);
        let start = if count(4) == 0 {
            HEADER_BYTES
        } else {
            HEADER_BYTES + question_bytes
        };
        let body = message.get(start..).ok_or(BadReply::Malformed)?;
        let mut counts = [count(6), count(8), count(10)];
        let mut ends = [0; 3];
        let mut records = Vec::new();
        let (mut at, mut opt_end) = (0, None);
        let (mut ttl_min, mut has_data, mut soa_ttl) = (u32::MAX, false, None);
        for section in 0..counts.len() {
            let mut left_out = 0;
            for _ in 0..counts[section] {
                if opt_end.is_some() {
                    return Ok(None);
                }
                let rest = body.get(at..).ok_or(BadReply::Malformed)?;
                let name_bytes = skip_name(rest).ok_or(BadReply::Malformed)?;
                let fixed = rest
                    .get(name_bytes..name_bytes + FIXED_BYTES)
                    .ok_or(BadReply::Malformed)?;
                let number = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
                let ttl = u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
                // The sign bit set means zero (RFC 2181, 8).
                let ttl = if ttl > i32::MAX as u32 { 0 } else { ttl };
                let end = at + name_bytes + FIXED_BYTES + usize::from(number(8));
                let data = body
                    .get(at + name_bytes + FIXED_BYTES..end)
                    .ok_or(BadReply::Malformed)?;
                let kind = number(0);
                if kind == rtype::OPT {
                    opt_end = Some(end);
                    // The upper bits of a code of which the header has the lower ones only (RFC 6891, 6.1.3): an error in any case.
                    if fixed[4] != 0 {
                        rcode = Rcode::ServFail;
                    }
                    left_out += 1;
                    continue;
                }
                if section == 0 {
                    ttl_min = ttl_min.min(ttl);
                    has_data |= kind == asked || asked == rtype::ANY;
                }
                if section == 1 && kind == rtype::SOA && data.len() >= 4 {
                    let minimum: [u8; 4] = data[data.len() - 4..].try_into().unwrap_or_default();
                    soa_ttl = Some(ttl.min(u32::from_be_bytes(minimum)));
                }
                let small = |number: usize| u16::try_from(number).map_err(|_| BadReply::Malformed);
                records.push(Mark {
                    start: small(at)?,
                    ttl_at: small(at + name_bytes + 4)?,
                    end: small(end)?,
                    rtype: kind,
                });
                at = end;
            }
            counts[section] -= left_out;
            ends[section] = at;
        }
        let truncated = is_truncated(message);
        let kind = match rcode {
            _ if truncated => Kind::Uncacheable,
            Rcode::NoError if has_data => Kind::Data(ttl_min),
            Rcode::NoError | Rcode::NxDomain => match soa_ttl {
                Some(ttl) => Kind::Denial(ttl.min(ttl_min)),
                None => Kind::Uncacheable,
            },
            Rcode::ServFail | Rcode::Refused | Rcode::NotImp | Rcode::FormErr => Kind::Failure,
            _ => Kind::Uncacheable,
        };
        Ok(Some(Self {
            rcode,
            authentic: header[3] & 0x20 != 0,
            kind,
            truncated,
            wire: body[..at].into(),
            records: records.into(),
            counts,
            ends,
            start,
        }))
    }

    pub fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Bytes it takes in memory, apart from itself.
    pub fn bytes(&self) -> usize {
        self.wire.len() + self.records.len() * size_of::<Mark>()
    }

    /// Writes the sections behind the question. `ttl` makes the TTL that is told from the one that was.
    pub(crate) fn write(&self, writer: &mut Writer<'_>, turn: usize, ttl: impl Fn(u32) -> u32) {
        if self.truncated {
            writer.truncate();
        }
        let answer = &self.wire[..self.ends[0]];
        if answer.len() > writer.room() {
            // Whole records as far as they go: some clients use them and never come back by TCP.
            let room = writer.room();
            let fitting = self.records[..usize::from(self.counts[0])]
                .iter()
                .take_while(|mark| usize::from(mark.end) <= room);
            let count = fitting.clone().count();
            let end = fitting.last().map_or(0, |mark| usize::from(mark.end));
            if let Some(at) = writer.copy(Section::Answer, count as u16, &self.wire[..end]) {
                self.mend(writer, at, 0..count, &ttl);
            }
            writer.truncate();
            return;
        }
        let [answers, authorities, additionals] = self.counts.map(usize::from);
        if let Some(at) = writer.copy(Section::Answer, answers as u16, answer) {
            self.mend(writer, at, 0..answers, &ttl);
            self.rotate(writer, at, turn);
        }
        let end = answers + authorities;
        let authority = &self.wire[self.ends[0]..self.ends[1]];
        let Some(at) = writer.copy(Section::Authority, authorities as u16, authority) else {
            // A denial without its proof would be taken for less than it is.
            if answers == 0 {
                writer.truncate();
            }
            return;
        };
        self.mend(writer, at - self.ends[0], answers..end, &ttl);
        let additional = &self.wire[self.ends[1]..self.ends[2]];
        if let Some(at) = writer.copy(Section::Additional, additionals as u16, additional) {
            self.mend(writer, at - self.ends[1], end..end + additionals, &ttl);
        }
    }

    /// Writes the TTLs of some records, whose section's first byte of `wire` stands at `at`.
    fn mend(
        &self,
        writer: &mut Writer<'_>,
        at: usize,
        records: std::ops::Range<usize>,
        ttl: &impl Fn(u32) -> u32,
    ) {
        let written = writer.written();
        for mark in &self.records[records] {
            let place = at + usize::from(mark.ttl_at);
            if let Some(bytes) = written.get_mut(place..place + 4) {
                tell(bytes, ttl);
            }
        }
    }

    /// Takes another of several addresses to the front with each turn. Only where nothing can point to what moves.
    fn rotate(&self, writer: &mut Writer<'_>, at: usize, turn: usize) {
        let answers = &self.records[..usize::from(self.counts[0])];
        let Some(last) = answers.last() else { return };
        let length = last.end - last.start;
        let is_alike = |mark: &&Mark| {
            matches!(mark.rtype, rtype::A | rtype::AAAA)
                && mark.rtype == last.rtype
                && mark.end - mark.start == length
                && self.wire[usize::from(mark.start)] >= 0xc0
        };
        let count = answers.iter().rev().take_while(is_alike).count();
        if count < 2 {
            return;
        }
        let first = usize::from(answers[answers.len() - count].start);
        let range = at + first..at + usize::from(last.end);
        if let Some(block) = writer.written().get_mut(range) {
            block.rotate_left(turn % count * usize::from(length));
        }
    }

    /// The whole answer as a message about `question`, for those who take it apart. `ttl` makes the TTL that is told from the one
    /// that was.
    pub fn to_message(
        &self,
        question: &[u8],
        ttl: impl Fn(u32) -> u32,
    ) -> Result<Message, BadReply> {
        const TRUNCATED: u8 = 0x02;
        let mut wire = vec![0; HEADER_BYTES];
        wire[2] = 0x80 | if self.truncated { TRUNCATED } else { 0 };
        wire[3] = self.rcode as u8 & 0x0f;
        if self.start > HEADER_BYTES {
            wire[5] = 1;
            wire.extend_from_slice(question);
        }
        let start = wire.len();
        wire.extend_from_slice(&self.wire);
        for mark in &self.records {
            let place = start + usize::from(mark.ttl_at);
            if let Some(bytes) = wire.get_mut(place..place + 4) {
                tell(bytes, &ttl);
            }
        }
        for (count, at) in self.counts.iter().zip([6, 8, 10]) {
            wire[at..at + 2].copy_from_slice(&count.to_be_bytes());
        }
        Message::from_vec(&wire).map_err(|_| BadReply::Malformed)
    }
}

/// Makes the TTL that is told from the one that was, in place: four bytes.
fn tell(bytes: &mut [u8], ttl: &impl Fn(u32) -> u32) {
    if let Ok(was) = <[u8; 4]>::try_from(&*bytes) {
        bytes.copy_from_slice(&ttl(u32::from_be_bytes(was)).to_be_bytes());
    }
}
