//! The query log: a line for each answer, written beside those who answer, and left out when it can't keep up.

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use regex::Regex;
use tracing::Level;

use crate::answer::{Rcode, Transport};
use crate::name::{Name, in_any_or_all};
use crate::query::{Query, rtype};

/// Which answers have a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Classes {
    pub success: bool,
    /// "No such name" and "no such data".
    pub denial: bool,
    pub error: bool,
}

impl Classes {
    pub const NONE: Self = Self {
        success: false,
        denial: false,
        error: false,
    };
    pub const ALL: Self = Self {
        success: true,
        denial: true,
        error: true,
    };

    fn have(self, rcode: Rcode, answers: u16) -> bool {
        match rcode {
            Rcode::NoError if answers > 0 => self.success,
            Rcode::NoError | Rcode::NxDomain => self.denial,
            _ => self.error,
        }
    }
}

/// Which answers about some names have a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRule {
    /// Names of these zones; all, where none is named.
    pub zones: Vec<Name>,
    pub classes: Classes,
}

impl LogRule {
    /// A line for every answer.
    pub fn all() -> Self {
        Self {
            zones: Vec::new(),
            classes: Classes::ALL,
        }
    }
}

/// How failures are logged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ErrorRules {
    /// Failures that have a line for so many of them. The first that is about a failure decides.
    pub consolidated: Vec<Consolidate>,
}

/// Failures that are counted for a while from the first one on, and told of with their number then.
#[derive(Clone, Debug)]
pub struct Consolidate {
    /// Found in what is said of them here, or in how CoreDNS words the same.
    pub like: Regex,
    pub during: Duration,
    pub level: Level,
    /// The first one has a line at once, and the others one together.
    pub shows_first: bool,
}

impl PartialEq for Consolidate {
    fn eq(&self, other: &Self) -> bool {
        // Regular expressions are equal when they read alike.
        format!("{self:?}") == format!("{other:?}")
    }
}

/// What is logged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogRules {
    /// The first that is about a name decides.
    pub queries: Vec<LogRule>,
    /// Why queries could not be forwarded; `None` where nobody wants to know.
    pub errors: Option<ErrorRules>,
}

/// Lines that may wait for whoever reads standard output.
const LINES_MAX: usize = 4096;

fn writer() -> &'static SyncSender<String> {
    static WRITER: OnceLock<SyncSender<String>> = OnceLock::new();
    WRITER.get_or_init(|| {
        let (sender, lines) = sync_channel::<String>(LINES_MAX);
        thread::spawn(move || {
            for line in lines {
                // Nobody reads it any more: there is nobody to tell either.
                let _ = writeln!(std::io::stdout(), "{line}");
            }
        });
        sender
    })
}

impl LogRules {
    /// Whether any query has a line.
    pub fn is_on(&self) -> bool {
        let mut rules = self.queries.iter();
        rules.any(|rule| rule.classes != Classes::NONE)
    }

    /// Logs an answered query, in CoreDNS's format.
    pub fn line(
        &self,
        client: SocketAddr,
        transport: Transport,
        message: &[u8],
        reply: &[u8],
        took: Duration,
        unlogged: &Counter,
    ) {
        let rcode = Rcode::of(reply);
        let answers = reply
            .get(6..8)
            .map_or(0, |count| u16::from_be_bytes([count[0], count[1]]));
        let mut rules = self.queries.iter();
        // Most answers are of no class that anybody wants to see.
        if !rules.clone().any(|rule| rule.classes.have(rcode, answers)) {
            return;
        }
        let Ok(query) = Query::parse(message) else {
            return;
        };
        let rule = rules.find(|rule| in_any_or_all(query.name(), &rule.zones));
        if !rule.is_some_and(|rule| rule.classes.have(rcode, answers)) {
            return;
        }
        let transport = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        let line = format!(
            "[INFO] {client} - {id} \"{kind} IN {name} {transport} {asked} {dnssec} {room}\" {rcode} {flags} {told} {took:.9}s",
            id = u16::from_be_bytes(query.id),
            kind = type_name(query.rtype),
            name = Name::from_wire(query.name()),
            asked = message.len(),
            dnssec = query.dnssec_ok(),
            room = query.edns.map_or(512, |edns| edns.udp_bytes),
            rcode = rcode.name(),
            flags = flags(reply),
            told = reply.len(),
            took = took.as_secs_f64(),
        );
        if let Err(TrySendError::Full(_)) = writer().try_send(line) {
            unlogged.inc();
        }
    }
}

fn flags(reply: &[u8]) -> String {
    const FLAGS: [(usize, u8, &str); 6] = [
        (2, 0x80, "qr"),
        (2, 0x04, "aa"),
        (2, 0x02, "tc"),
        (2, 0x01, "rd"),
        (3, 0x80, "ra"),
        (3, 0x20, "ad"),
    ];
    let set = FLAGS
        .into_iter()
        .filter(|(at, bit, _)| reply[*at] & bit != 0);
    set.map(|(_, _, name)| name).collect::<Vec<_>>().join(",")
}

/// A record type by its name, or as RFC 3597 writes those without.
pub fn type_name(number: u16) -> String {
    let known = hickory_proto::rr::RecordType::from(number);
    match known {
        hickory_proto::rr::RecordType::Unknown(_) => format!("TYPE{number}"),
        _ if number == rtype::ANY => "ANY".into(),
        _ => known.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_tell_answers_denials_and_errors_apart() {
        let only = |success, denial, error| Classes {
            success,
            denial,
            error,
        };
        let cases = [
            (Rcode::NoError, 1, only(true, false, false)),
            (Rcode::NoError, 0, only(false, true, false)),
            (Rcode::NxDomain, 0, only(false, true, false)),
            (Rcode::ServFail, 0, only(false, false, true)),
            (Rcode::Refused, 0, only(false, false, true)),
        ];
        for (rcode, answers, class) in cases {
            assert!(
                class.have(rcode, answers) && Classes::ALL.have(rcode, answers),
                "{rcode:?}"
            );
            assert!(!Classes::NONE.have(rcode, answers));
        }
        assert!(!only(true, false, true).have(Rcode::NxDomain, 0));
    }

    #[test]
    fn flags_and_types_read_as_in_corednss_log() {
        assert_eq!(flags(&[0, 0, 0x85, 0x80]), "qr,aa,rd,ra");
        assert_eq!(flags(&[0, 0, 0x82, 0x20]), "qr,tc,ad");
        assert_eq!(type_name(rtype::AAAA), "AAAA");
        assert_eq!(type_name(rtype::ANY), "ANY");
        assert_eq!(type_name(65_300), "TYPE65300");
    }
}
