//! dig: asks a DNS server and prints what it answers, with the arguments and the output people know from BIND's program.
#![forbid(unsafe_code)]

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hickory_proto::op::{Message, MessageType};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};
use keelway_image_programs::resolver::{self, Config, Manner};

const USAGE: &str = "\
usage: dig [@SERVER] [-p PORT] [-x ADDRESS] [NAME] [TYPE] [+OPTION]...
  TYPE       A (default), AAAA, SRV, PTR, TXT, CNAME, SOA, NS, MX, ANY
  @SERVER    address of the server; the first of /etc/resolv.conf when absent
  -x         ask for the name of an address
  +short     print the data of the answers only
  +search    follow the search list of /etc/resolv.conf, and its ndots
  +tcp       ask by TCP        +ignore    do not ask again by TCP when an answer is truncated
  +noedns    ask without EDNS  +bufsize=N EDNS buffer size (1232)
  +norec     do not ask for recursion
  +time=S    seconds to wait (2)         +tries=N   attempts by UDP (3)
Exit status: 0 when a server answered, whatever the answer; 9 when none did; 1 for wrong usage.";

struct Request {
    server: Option<IpAddr>,
    name: String,
    kind: RecordType,
    short: bool,
    search: bool,
    manner: Manner,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            server: None,
            name: ".".into(),
            kind: RecordType::A,
            short: false,
            search: false,
            manner: Manner::default(),
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments
        .iter()
        .any(|argument| argument == "-h" || argument == "--help")
    {
        // Whoever stopped reading has read enough.
        let _ = writeln!(std::io::stdout(), "{USAGE}");
        return ExitCode::SUCCESS;
    }
    let request = match parse(&arguments) {
        Ok(request) => request,
        Err(error) => {
            eprintln!("dig: {error:#}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match look_up(&request) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dig: {error:#}");
            ExitCode::from(9)
        }
    }
}

fn parse(arguments: &[String]) -> Result<Request> {
    let mut request = Request::default();
    let mut name_given = false;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || {
            rest.next()
                .with_context(|| format!("{argument} needs a value"))
        };
        if let Some(server) = argument.strip_prefix('@') {
            let server = server
                .parse()
                .with_context(|| format!("the server {server:?} is not an IP address"))?;
            request.server = Some(server);
        } else if let Some(option) = argument.strip_prefix('+') {
            apply_option(&mut request, option)?;
        } else if argument == "-p" {
            request.manner.port = value()?
                .parse()
                .context("the port is not a number up to 65535")?;
        } else if argument == "-x" {
            let address: IpAddr = value()?.parse().context("-x needs an IP address")?;
            request.name = reverse_name(address);
            request.kind = RecordType::PTR;
            name_given = true;
        } else if argument == "-t" {
            request.kind = record_type(value()?).with_context(|| "-t needs a record type")?;
        } else if argument.starts_with('-') {
            bail!("unknown argument {argument}");
        } else if argument.eq_ignore_ascii_case("in") {
            // The only class there is.
        } else if let (Some(kind), true) = (record_type(argument), name_given) {
            request.kind = kind;
        } else {
            request.name = argument.clone();
            name_given = true;
        }
    }
    Ok(request)
}

fn apply_option(request: &mut Request, option: &str) -> Result<()> {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let number = || {
        value
            .parse::<u32>()
            .with_context(|| format!("+{name}=N needs a number"))
    };
    match name {
        "short" => request.short = true,
        "search" => request.search = true,
        "nosearch" => request.search = false,
        "tcp" | "vc" => request.manner.tcp = true,
        "ignore" => request.manner.ignore_truncation = true,
        "noedns" => request.manner.edns_size = None,
        "bufsize" => {
            request.manner.edns_size =
                Some(u16::try_from(number()?).context("+bufsize is at most 65535")?)
        }
        "norec" | "norecurse" => request.manner.recursion = false,
        "time" | "timeout" => {
            request.manner.timeout = Duration::from_secs(u64::from(number()?.max(1)))
        }
        "tries" => request.manner.tries = number()?.max(1),
        _ => bail!("unknown option +{option}"),
    }
    Ok(())
}

fn record_type(text: &str) -> Option<RecordType> {
    RecordType::from_str(&text.to_ascii_uppercase()).ok()
}

fn reverse_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa.")
        }
        IpAddr::V6(address) => {
            let nibbles: Vec<String> = address
                .octets()
                .iter()
                .rev()
                .flat_map(|byte| [format!("{:x}", byte & 15), format!("{:x}", byte >> 4)])
                .collect();
            format!("{}.ip6.arpa.", nibbles.join("."))
        }
    }
}

fn look_up(request: &Request) -> Result<()> {
    let config = Config::of_system();
    let server = request
        .server
        .or(config.servers.first().copied())
        .context("/etc/resolv.conf names no server; give one with @ADDRESS")?;
    let names = if request.search {
        config.candidates(&request.name)
    } else {
        vec![format!("{}.", request.name.trim_end_matches('.'))]
    };
    let mut last = None;
    for name in &names {
        let name =
            Name::from_ascii(name).with_context(|| format!("{name:?} is not a domain name"))?;
        let started = Instant::now();
        let answer = resolver::ask(&request.manner, server, &name, request.kind)?;
        let found = answer.found();
        last = Some((answer, started.elapsed()));
        if found {
            break;
        }
    }
    let (answer, took) = last.context("there is a name to ask for")?;
    let mut out = std::io::stdout().lock();
    if request.short {
        for record in &answer.message.answers {
            writeln!(out, "{}", record.data)?;
        }
    } else {
        print_full(&mut out, &answer.message)?;
        let server = SocketAddr::new(server, request.manner.port);
        writeln!(out, ";; Query time: {} usec", took.as_micros())?;
        writeln!(out, ";; SERVER: {server} ({})", answer.transport)?;
        writeln!(out, ";; MSG SIZE  rcvd: {}", answer.size)?;
    }
    Ok(())
}

fn print_full(out: &mut impl Write, answer: &Message) -> Result<()> {
    let metadata = &answer.metadata;
    let flags: Vec<&str> = [
        (metadata.message_type == MessageType::Response, "qr"),
        (metadata.authoritative, "aa"),
        (metadata.truncation, "tc"),
        (metadata.recursion_desired, "rd"),
        (metadata.recursion_available, "ra"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect();
    writeln!(
        out,
        ";; ->>HEADER<<- opcode: QUERY, status: {}, id: {}",
        resolver::status(metadata.response_code),
        metadata.id
    )?;
    writeln!(
        out,
        ";; flags: {}; QUERY: {}, ANSWER: {}, AUTHORITY: {}, ADDITIONAL: {}",
        flags.join(" "),
        answer.queries.len(),
        answer.answers.len(),
        answer.authorities.len(),
        answer.additionals.len() + usize::from(answer.edns.is_some())
    )?;
    if let Some(edns) = &answer.edns {
        writeln!(
            out,
            "; EDNS: version: {}, udp: {}",
            edns.version(),
            edns.max_payload()
        )?;
    }
    writeln!(out, ";; QUESTION SECTION:")?;
    for query in &answer.queries {
        writeln!(
            out,
            ";{}\t\t{}\t{}",
            query.name(),
            DNSClass::IN,
            query.query_type()
        )?;
    }
    for (title, records) in [
        ("ANSWER", &answer.answers),
        ("AUTHORITY", &answer.authorities),
        ("ADDITIONAL", &answer.additionals),
    ] {
        print_section(out, title, records)?;
    }
    writeln!(out)?;
    Ok(())
}

fn print_section(out: &mut impl Write, title: &str, records: &[Record]) -> Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n;; {title} SECTION:")?;
    for record in records {
        writeln!(
            out,
            "{}\t{}\t{}\t{}\t{}",
            record.name,
            record.ttl,
            record.dns_class,
            record.record_type(),
            record.data
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Request {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        parse(&words).unwrap()
    }

    #[test]
    fn arguments_are_read_as_digs() {
        let request = parsed("@10.96.0.10 -p 5353 hello.default.svc.cluster.local SRV +short +tcp");
        assert_eq!(request.server, Some("10.96.0.10".parse().unwrap()));
        assert_eq!((request.manner.port, request.kind), (5353, RecordType::SRV));
        assert_eq!(request.name, "hello.default.svc.cluster.local");
        assert!(request.short && request.manner.tcp && !request.search);
    }

    #[test]
    fn a_name_that_looks_like_a_type_is_a_name_when_it_comes_first() {
        let request = parsed("mx aaaa");
        assert_eq!(
            (request.name.as_str(), request.kind),
            ("mx", RecordType::AAAA)
        );
    }

    #[test]
    fn addresses_are_reversed() {
        assert_eq!(parsed("-x 10.96.0.10").name, "10.0.96.10.in-addr.arpa.");
        let name = parsed("-x fd00::1").name;
        assert!(
            name.starts_with("1.0.0.0.") && name.ends_with(".0.0.d.f.ip6.arpa."),
            "{name}"
        );
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (line, expected) in [
            ("@dns.example a", "not an IP address"),
            ("hello +frobnicate", "+frobnicate"),
            ("-p", "-p needs a value"),
            ("hello -q", "-q"),
        ] {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let error = format!("{:#}", parse(&words).err().unwrap());
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
