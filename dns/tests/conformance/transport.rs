//! How a server answers, whatever it is asked: sizes, spelling, connections, and politeness towards what it does not do.

use std::collections::BTreeSet;

use hickory_proto::op::{Edns, Message, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, RecordType};

use crate::subject::Subject;

type Rule = fn(&Subject) -> Result<(), String>;

pub const RULES: &[(&str, Rule)] = &[
    ("the client's spelling comes back (0x20)", spelling),
    ("without EDNS an answer has 512 bytes at most", plain_size),
    ("with EDNS no more than the client takes", edns_size),
    ("EDNS is answered with EDNS, and not otherwise", edns_echo),
    (
        "an EDNS version that is not known is told so (BADVERS)",
        edns_version,
    ),
    ("TCP answers queries that come together", pipelining),
    ("names in answers are compressed", compression),
    (
        "the targets of SRV records come with their addresses",
        additional,
    ),
    (
        "every endpoint has a name that leads to it and back",
        endpoint_names,
    ),
    ("ANY gets little", any),
    ("another class is not answered with IN data", other_class),
    ("an operation that is not known is refused", other_operation),
    ("what is no query is not answered, or refused", garbage),
    ("RD comes back", recursion_desired),
];

const WEB: &str = "web.conformance.svc.DOMAIN.";
const SQL: &str = "_sql._tcp.db.conformance.svc.DOMAIN.";

fn ensure(right: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if right { Ok(()) } else { Err(what()) }
}

fn with_edns(mut query: Message, bytes: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(bytes);
    query.set_edns(edns);
    query
}

fn spelling(subject: &Subject) -> Result<(), String> {
    let query = subject.query("wEb.cOnFoRmAnCe.SvC.DOMAIN.", RecordType::A);
    let wire = query.to_vec().map_err(|error| error.to_string())?;
    let reply = subject.udp(&wire)?;
    // Header, then the question to the letter.
    ensure(reply[12..wire.len()] == wire[12..], || {
        "the question was spelt anew".into()
    })
}

fn plain_size(subject: &Subject) -> Result<(), String> {
    let query = subject.query(SQL, RecordType::SRV);
    let reply = subject.udp(&query.to_vec().map_err(|error| error.to_string())?)?;
    ensure(reply.len() <= 512, || format!("{} bytes", reply.len()))
}

fn edns_size(subject: &Subject) -> Result<(), String> {
    for bytes in [512, 600, 1232, 4096, 65_535] {
        let query = with_edns(subject.query(SQL, RecordType::SRV), bytes);
        let reply = subject.udp(&query.to_vec().map_err(|error| error.to_string())?)?;
        ensure(reply.len() <= usize::from(bytes), || {
            format!("{} bytes for {bytes}", reply.len())
        })?;
        let message = Message::from_vec(&reply).map_err(|error| error.to_string())?;
        let count = message.answers.len();
        ensure(message.metadata.truncation || count == 3, || {
            format!("{count} of 3 records, and no TC")
        })?;
    }
    Ok(())
}

fn edns_echo(subject: &Subject) -> Result<(), String> {
    let plain = subject.ask(&subject.query(WEB, RecordType::A))?;
    ensure(plain.edns.is_none(), || {
        "an OPT record that was not asked for".into()
    })?;
    let reply = subject.ask(&with_edns(subject.query(WEB, RecordType::A), 1232))?;
    ensure(reply.edns.is_some(), || "no OPT record".into())
}

fn edns_version(subject: &Subject) -> Result<(), String> {
    let mut query = with_edns(subject.query(WEB, RecordType::A), 1232);
    if let Some(edns) = &mut query.edns {
        edns.set_version(1);
    }
    let reply = subject.ask(&query)?;
    let code = reply.metadata.response_code;
    ensure(
        matches!(code, ResponseCode::BADVERS | ResponseCode::BADSIG),
        || code.to_string(),
    )
}

fn pipelining(subject: &Subject) -> Result<(), String> {
    let names = [
        WEB,
        "db.conformance.svc.DOMAIN.",
        "absent.DOMAIN.",
        SQL,
        WEB,
    ];
    let queries: Vec<Message> = names
        .iter()
        .map(|name| subject.query(name, RecordType::A))
        .collect();
    let replies = subject.tcp(&queries)?;
    for (query, reply) in queries.iter().zip(&replies) {
        ensure(query.queries == reply.queries, || {
            "answers are mixed up".into()
        })?;
    }
    ensure(replies[1].answers.len() == 4, || {
        format!("{:?}", replies[1].answers)
    })
}

fn compression(subject: &Subject) -> Result<(), String> {
    let query = subject.query("db.conformance.svc.DOMAIN.", RecordType::A);
    let wire = query.to_vec().map_err(|error| error.to_string())?;
    let reply = subject.udp(&wire)?;
    // Four records of 16 bytes, when each begins with a pointer.
    ensure(reply.len() <= wire.len() + 4 * 16, || {
        format!("{} bytes", reply.len())
    })
}

fn additional(subject: &Subject) -> Result<(), String> {
    let reply = subject.resolve(SQL, RecordType::SRV)?;
    let targets: BTreeSet<String> = reply
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::SRV(srv) => Some(srv.target.to_string()),
            _ => None,
        })
        .collect();
    let owners: BTreeSet<String> = reply
        .additionals
        .iter()
        .map(|record| record.name.to_string())
        .collect();
    ensure(targets == owners, || {
        format!("targets {targets:?}, addresses of {owners:?}")
    })
}

/// The specification leaves the name of an endpoint without a hostname open, and asks that there is one (2.4.1, 2.4.3).
fn endpoint_names(subject: &Subject) -> Result<(), String> {
    let reply = subject.resolve("3.77.244.10.in-addr.arpa.", RecordType::PTR)?;
    let names: Vec<String> = reply
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::PTR(name) => Some(name.to_string()),
            _ => None,
        })
        .collect();
    let [name] = names.as_slice() else {
        return Err(format!("names of 10.244.77.3: {names:?}"));
    };
    let there = subject.resolve(name, RecordType::A)?;
    let addresses: Vec<String> = there
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect();
    ensure(addresses == ["10.244.77.3"], || {
        format!("{name}: {addresses:?}")
    })?;
    let targets = subject.resolve(SQL, RecordType::SRV)?;
    let named = targets
        .answers
        .iter()
        .any(|record| matches!(&record.data, RData::SRV(srv) if srv.target.to_string() == *name));
    ensure(named, || {
        format!("{name} is no target of {:?}", targets.answers)
    })
}

fn any(subject: &Subject) -> Result<(), String> {
    let reply = subject.ask(&subject.query("db.conformance.svc.DOMAIN.", RecordType::ANY))?;
    let code = reply.metadata.response_code;
    let polite = matches!(
        code,
        ResponseCode::NoError | ResponseCode::NotImp | ResponseCode::Refused
    );
    ensure(polite && reply.answers.len() <= 1, || {
        format!("{code}, {:?}", reply.answers)
    })
}

fn other_class(subject: &Subject) -> Result<(), String> {
    let mut query = subject.query(WEB, RecordType::A);
    query.queries[0].set_query_class(DNSClass::CH);
    let reply = subject.ask(&query)?;
    ensure(reply.answers.is_empty(), || format!("{:?}", reply.answers))
}

fn other_operation(subject: &Subject) -> Result<(), String> {
    let mut query = subject.query(WEB, RecordType::A);
    query.metadata.op_code = OpCode::Status;
    let wire = query.to_vec().map_err(|error| error.to_string())?;
    let reply = subject.udp(&wire)?;
    let code = reply.get(3).map_or(0, |flags| flags & 15);
    ensure(matches!(code, 1 | 4 | 5), || format!("code {code}"))
}

fn garbage(subject: &Subject) -> Result<(), String> {
    // Sent before a good query: whatever became of it, the next one is answered.
    let mut wire = subject
        .query(WEB, RecordType::A)
        .to_vec()
        .map_err(|error| error.to_string())?;
    wire.truncate(20);
    if let Ok(reply) = subject.udp(&wire) {
        let code = reply.get(3).map_or(0, |flags| flags & 15);
        ensure(code == 1, || format!("code {code}"))?;
    }
    subject.ask(&subject.query(WEB, RecordType::A)).map(drop)
}

fn recursion_desired(subject: &Subject) -> Result<(), String> {
    for desired in [true, false] {
        let mut query = subject.query(WEB, RecordType::A);
        query.metadata.recursion_desired = desired;
        let reply = subject.ask(&query)?;
        ensure(reply.metadata.recursion_desired == desired, || {
            format!("RD was {desired}")
        })?;
    }
    Ok(())
}
