//! The records of the specification: a question, the code, and the data of its answer, in any order.

use std::collections::BTreeSet;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, RData, RecordType};

use crate::subject::Subject;

/// One question. `section` is where the specification (or the RFC) says so.
pub struct Row {
    section: &'static str,
    name: &'static str,
    rtype: RecordType,
    expected: Expected,
}

enum Expected {
    /// Exactly these.
    Data(&'static [&'static str]),
    /// So many records, whose data begin and end so: what lies between is the implementation's to choose.
    Like(usize, &'static str, &'static str),
    /// No such data, with an SOA.
    NoData,
    /// No such name, with an SOA.
    NoName,
}

use Expected::{Data, Like, NoData, NoName};
use RecordType::{A, AAAA, CNAME, PTR, SOA, SRV, TXT};

const fn row(
    section: &'static str,
    name: &'static str,
    rtype: RecordType,
    expected: Expected,
) -> Row {
    Row {
        section,
        name,
        rtype,
        expected,
    }
}

pub const ROWS: &[Row] = &[
    row("2.2", "dns-version.DOMAIN.", TXT, Data(&["1.1.0"])),
    // Services with an address.
    row(
        "2.3.1",
        "web.conformance.svc.DOMAIN.",
        A,
        Data(&["10.96.77.7"]),
    ),
    row("2.3.1", "web.conformance.svc.DOMAIN.", AAAA, NoData),
    row(
        "2.3.1",
        "WEB.Conformance.SVC.DOMAIN.",
        A,
        Data(&["10.96.77.7"]),
    ),
    row(
        "2.3.1",
        "dual.conformance.svc.DOMAIN.",
        A,
        Data(&["10.96.77.9"]),
    ),
    row(
        "2.3.1",
        "dual.conformance.svc.DOMAIN.",
        AAAA,
        Data(&["fd96::9"]),
    ),
    row(
        "2.3.2",
        "_http._tcp.web.conformance.svc.DOMAIN.",
        SRV,
        Like(1, "0 ", " 80 web.conformance.svc.DOMAIN."),
    ),
    row(
        "2.3.2",
        "_query._udp.web.conformance.svc.DOMAIN.",
        SRV,
        Like(1, "0 ", " 53 web.conformance.svc.DOMAIN."),
    ),
    row(
        "2.3.2",
        "_http._udp.web.conformance.svc.DOMAIN.",
        SRV,
        NoName,
    ),
    row(
        "2.3.2",
        "_none._tcp.plain.conformance.svc.DOMAIN.",
        SRV,
        NoName,
    ),
    row("2.3.2", "_http._tcp.web.conformance.svc.DOMAIN.", A, NoData),
    row(
        "2.3.3",
        "7.77.96.10.in-addr.arpa.",
        PTR,
        Data(&["web.conformance.svc.DOMAIN."]),
    ),
    row(
        "2.3.3",
        "9.77.96.10.in-addr.arpa.",
        PTR,
        Data(&["dual.conformance.svc.DOMAIN."]),
    ),
    row(
        "2.3.3",
        "9.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.d.f.ip6.arpa.",
        PTR,
        Data(&["dual.conformance.svc.DOMAIN."]),
    ),
    row("2.3.3", "7.77.96.10.in-addr.arpa.", A, NoData),
    // A port without a name has no SRV record, and neither has the protocol above it.
    row("2.3.2", "_tcp.plain.conformance.svc.DOMAIN.", SRV, NoName),
    // Headless Services.
    row(
        "2.4.1",
        "db.conformance.svc.DOMAIN.",
        A,
        Data(&["10.244.77.1", "10.244.77.2", "10.244.77.3", "10.244.77.5"]),
    ),
    row(
        "2.4.1",
        "db.conformance.svc.DOMAIN.",
        AAAA,
        Data(&["fd77::1"]),
    ),
    row(
        "2.4.1",
        "db-0.db.conformance.svc.DOMAIN.",
        A,
        Data(&["10.244.77.1", "10.244.77.5"]),
    ),
    row(
        "2.4.1",
        "db-0.db.conformance.svc.DOMAIN.",
        AAAA,
        Data(&["fd77::1"]),
    ),
    row(
        "2.4.1",
        "db-1.db.conformance.svc.DOMAIN.",
        A,
        Data(&["10.244.77.2"]),
    ),
    row("2.4.1", "db-1.db.conformance.svc.DOMAIN.", AAAA, NoData),
    row("2.4.1", "db-3.db.conformance.svc.DOMAIN.", A, NoName),
    row("2.4.1", "db-4.db.conformance.svc.DOMAIN.", A, NoName),
    row("2.4.1", "unready.conformance.svc.DOMAIN.", A, NoName),
    row(
        "2.4.1",
        "published.conformance.svc.DOMAIN.",
        A,
        Data(&["10.244.77.30"]),
    ),
    row(
        "2.4.1",
        "early.published.conformance.svc.DOMAIN.",
        A,
        Data(&["10.244.77.30"]),
    ),
    row(
        "2.4.2",
        "_sql._tcp.db.conformance.svc.DOMAIN.",
        SRV,
        Like(3, "0 ", ".db.conformance.svc.DOMAIN."),
    ),
    row(
        "2.4.2",
        "_admin._tcp.db.conformance.svc.DOMAIN.",
        SRV,
        Like(3, "0 ", ".db.conformance.svc.DOMAIN."),
    ),
    row(
        "2.4.2",
        "_sql._tcp.unready.conformance.svc.DOMAIN.",
        SRV,
        NoName,
    ),
    row(
        "2.4.2",
        "_sql._tcp.published.conformance.svc.DOMAIN.",
        SRV,
        Like(1, "0 ", " 5432 early.published.conformance.svc.DOMAIN."),
    ),
    row(
        "2.4.3",
        "2.77.244.10.in-addr.arpa.",
        PTR,
        Data(&["db-1.db.conformance.svc.DOMAIN."]),
    ),
    row(
        "2.4.3",
        "1.77.244.10.in-addr.arpa.",
        PTR,
        Data(&["db-0.db.conformance.svc.DOMAIN."]),
    ),
    row(
        "2.4.3",
        "5.77.244.10.in-addr.arpa.",
        PTR,
        Data(&["db-0.db.conformance.svc.DOMAIN."]),
    ),
    // Without a hostname the endpoint has a name that the implementation chose.
    row(
        "2.4.3",
        "3.77.244.10.in-addr.arpa.",
        PTR,
        Like(1, "", ".db.conformance.svc.DOMAIN."),
    ),
    row(
        "2.4.3",
        "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.7.7.d.f.ip6.arpa.",
        PTR,
        Data(&["db-0.db.conformance.svc.DOMAIN."]),
    ),
    row(
        "2.4.3",
        "30.77.244.10.in-addr.arpa.",
        PTR,
        Data(&["early.published.conformance.svc.DOMAIN."]),
    ),
    row("2.4.3", "4.77.244.10.in-addr.arpa.", PTR, NoName),
    row("2.4.3", "6.77.244.10.in-addr.arpa.", PTR, NoName),
    row("2.4.3", "20.77.244.10.in-addr.arpa.", PTR, NoName),
    // External names.
    row(
        "2.5",
        "outside.conformance.svc.DOMAIN.",
        CNAME,
        Data(&["www.example.org."]),
    ),
    row(
        "2.5",
        "inside.conformance.svc.DOMAIN.",
        CNAME,
        Data(&["web.conformance.svc.DOMAIN."]),
    ),
    row(
        "2.5",
        "inside.conformance.svc.DOMAIN.",
        A,
        Data(&["web.conformance.svc.DOMAIN.", "10.96.77.7"]),
    ),
    row(
        "2.5",
        "inside.conformance.svc.DOMAIN.",
        AAAA,
        Like(1, "web.conformance.svc.DOMAIN.", ""),
    ),
    // What there is not, and what is only above something (RFC 8020, RFC 2308).
    row("RFC 8020", "DOMAIN.", A, NoData),
    row("RFC 8020", "svc.DOMAIN.", A, NoData),
    row("RFC 8020", "conformance.svc.DOMAIN.", A, NoData),
    row("RFC 8020", "_tcp.web.conformance.svc.DOMAIN.", A, NoData),
    row("RFC 8020", "_tcp.db.conformance.svc.DOMAIN.", SRV, NoData),
    row("RFC 2308", "absent.conformance.svc.DOMAIN.", A, NoName),
    row("RFC 2308", "absent.DOMAIN.", A, NoName),
    row("RFC 2308", "web.absent.svc.DOMAIN.", A, NoName),
    row("RFC 2308", "below.web.conformance.svc.DOMAIN.", A, NoName),
    row(
        "RFC 2308",
        "www.example.org.conformance.svc.DOMAIN.",
        A,
        NoName,
    ),
    row(
        "RFC 2308",
        "www.example.org.conformance.svc.DOMAIN.",
        AAAA,
        NoName,
    ),
    row(
        "RFC 2308",
        "web.conformance.svc.DOMAIN.conformance.svc.DOMAIN.",
        A,
        NoName,
    ),
    row(
        "RFC 1034",
        "DOMAIN.",
        SOA,
        Like(1, "ns.dns.DOMAIN. hostmaster.DOMAIN. ", ""),
    ),
];

impl Row {
    pub fn check(&self, subject: &Subject) -> Result<(), String> {
        let name = subject.name(self.name);
        let failed = |what: String| format!("{} {name} {}: {what}", self.section, self.rtype);
        let reply = subject.resolve(self.name, self.rtype).map_err(failed)?;
        let code = reply.metadata.response_code;
        let data: BTreeSet<String> = reply
            .answers
            .iter()
            .map(|record| match &record.data {
                RData::TXT(text) => text
                    .txt_data
                    .iter()
                    .map(|part| String::from_utf8_lossy(part))
                    .collect(),
                other => other.to_string(),
            })
            .collect();
        let said = || format!("{code}, {data:?}, and {:?}", reply.authorities);
        let owners_right = reply
            .answers
            .first()
            .is_none_or(|record| Name::from_ascii(&name).is_ok_and(|asked| asked == record.name));
        if !owners_right {
            return Err(failed(format!(
                "the answer is about another name: {}",
                said()
            )));
        }
        if !reply.metadata.authoritative {
            return Err(failed("it is not said with authority".into()));
        }
        let soa = || {
            reply
                .authorities
                .iter()
                .any(|record| record.record_type() == SOA)
        };
        let right = match &self.expected {
            Data(expected) => {
                let expected: BTreeSet<String> =
                    expected.iter().map(|text| subject.name(text)).collect();
                code == ResponseCode::NoError
                    && data == expected
                    && reply.answers.len() == expected.len()
            }
            Like(count, begin, end) => {
                let (begin, end) = (subject.name(begin), subject.name(end));
                code == ResponseCode::NoError
                    && reply.answers.len() == *count
                    && data
                        .iter()
                        .all(|one| one.starts_with(&begin) && one.ends_with(&end))
            }
            NoData => code == ResponseCode::NoError && data.is_empty() && soa(),
            NoName => code == ResponseCode::NXDomain && data.is_empty() && soa(),
        };
        if right { Ok(()) } else { Err(failed(said())) }
    }
}
