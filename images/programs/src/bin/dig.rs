//! dig: asks a DNS server and prints what it answers, with the arguments and the output people know from BIND's program.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};

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
    port: u16,
    name: String,
    kind: RecordType,
    short: bool,
    search: bool,
    tcp: bool,
    ignore_truncation: bool,
    edns_size: Option<u16>,
    recursion: bool,
    timeout: Duration,
    tries: u32,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            server: None,
            port: 53,
            name: ".".into(),
            kind: RecordType::A,
            short: false,
            search: false,
            tcp: false,
            ignore_truncation: false,
            edns_size: Some(1232),
            recursion: true,
            timeout: Duration::from_secs(2),
            tries: 3,
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
            request.port = value()?
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
        "tcp" | "vc" => request.tcp = true,
        "ignore" => request.ignore_truncation = true,
        "noedns" => request.edns_size = None,
        "bufsize" => {
            request.edns_size = Some(u16::try_from(number()?).context("+bufsize is at most 65535")?)
        }
        "norec" | "norecurse" => request.recursion = false,
        "time" | "timeout" => request.timeout = Duration::from_secs(u64::from(number()?.max(1))),
        "tries" => request.tries = number()?.max(1),
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

/// What a resolver reads in /etc/resolv.conf (resolv.conf(5)).
#[derive(Debug, PartialEq)]
struct ResolverConfig {
    servers: Vec<IpAddr>,
    search: Vec<String>,
    ndots: usize,
}

impl ResolverConfig {
    fn parse(text: &str) -> ResolverConfig {
        let mut config = ResolverConfig {
            servers: Vec::new(),
            search: Vec::new(),
            ndots: 1,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => config
                    .servers
                    .extend(words.next().and_then(|word| word.parse::<IpAddr>().ok())),
                Some("search") => config.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    let ndots = words.find_map(|word| word.strip_prefix("ndots:")?.parse().ok());
                    config.ndots = ndots.unwrap_or(config.ndots);
                }
                _ => {}
            }
        }
        config
    }

    /// The names to ask for, in order: the search list first when the name has fewer dots than ndots.
    fn candidates(&self, name: &str) -> Vec<String> {
        if name.ends_with('.') {
            return vec![name.to_owned()];
        }
        let absolute = format!("{name}.");
        let mut searched: Vec<String> = self
            .search
            .iter()
            .map(|suffix| format!("{name}.{}.", suffix.trim_matches('.')))
            .collect();
        if name.matches('.').count() >= self.ndots {
            searched.insert(0, absolute);
        } else {
            searched.push(absolute);
        }
        searched
    }
}

fn look_up(request: &Request) -> Result<()> {
    let config =
        ResolverConfig::parse(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    let address = request
        .server
        .or(config.servers.first().copied())
        .context("/etc/resolv.conf names no server; give one with @ADDRESS")?;
    let server = SocketAddr::new(address, request.port);
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
        let (answer, size, transport) = ask(request, server, &name)?;
        let found =
            answer.metadata.response_code == ResponseCode::NoError && !answer.answers.is_empty();
        last = Some((answer, size, transport, started.elapsed()));
        if found {
            break;
        }
    }
    let (answer, size, transport, took) = last.context("there is a name to ask for")?;
    let mut out = std::io::stdout().lock();
    if request.short {
        for record in &answer.answers {
            writeln!(out, "{}", record.data)?;
        }
    } else {
        print_full(&mut out, &answer)?;
        writeln!(out, ";; Query time: {} usec", took.as_micros())?;
        writeln!(out, ";; SERVER: {server} ({transport})")?;
        writeln!(out, ";; MSG SIZE  rcvd: {size}")?;
    }
    Ok(())
}

fn ask(
    request: &Request,
    server: SocketAddr,
    name: &Name,
) -> Result<(Message, usize, &'static str)> {
    let mut query = Message::new(rand_id()?, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = request.recursion;
    query.add_query(Query::query(name.clone(), request.kind));
    if let Some(size) = request.edns_size {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        query.edns = Some(edns);
    }
    let bytes = query
        .to_vec()
        .context("the question does not fit a message")?;
    if !request.tcp {
        let reply = ask_udp(request, server, &bytes)?;
        let answer = Message::from_vec(&reply).context("the answer is not a DNS message")?;
        if !answer.metadata.truncation || request.ignore_truncation {
            return Ok((answer, reply.len(), "UDP"));
        }
        if !request.short {
            println!(";; Truncated, asking again by TCP.");
        }
    }
    let reply = ask_tcp(request, server, &bytes)
        .with_context(|| format!("no answer from {server} by TCP"))?;
    let answer = Message::from_vec(&reply).context("the answer is not a DNS message")?;
    Ok((answer, reply.len(), "TCP"))
}

fn ask_udp(request: &Request, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let mut reason = None;
    for _ in 0..request.tries {
        // A new socket each time: a late answer to the last attempt cannot be taken for this one's.
        let socket = UdpSocket::bind(any)?;
        socket
            .connect(server)
            .with_context(|| format!("cannot reach {server}"))?;
        socket.set_read_timeout(Some(request.timeout))?;
        let mut reply = vec![0; 65_535];
        match socket.send(query).and_then(|_| socket.recv(&mut reply)) {
            Ok(size) if size >= 2 && reply[..2] == query[..2] => {
                reply.truncate(size);
                return Ok(reply);
            }
            Ok(_) => reason = Some("an answer to another question".to_owned()),
            Err(error) => reason = Some(error.to_string()),
        }
    }
    bail!(
        "no answer from {server} by UDP in {} attempts of {} s: {}",
        request.tries,
        request.timeout.as_secs(),
        reason.unwrap_or_default()
    )
}

fn ask_tcp(request: &Request, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, request.timeout)?;
    stream.set_read_timeout(Some(request.timeout))?;
    let mut framed = u16::try_from(query.len())?.to_be_bytes().to_vec();
    framed.extend_from_slice(query);
    stream.write_all(&framed)?;
    let mut size = [0; 2];
    stream.read_exact(&mut size)?;
    let mut reply = vec![0; usize::from(u16::from_be_bytes(size))];
    stream.read_exact(&mut reply)?;
    Ok(reply)
}

/// Query ids are there to make forged answers hard, so they come from the kernel.
fn rand_id() -> Result<u16> {
    let mut bytes = [0; 2];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(u16::from_be_bytes(bytes))
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
        status(metadata.response_code),
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

/// A response code by the mnemonic of RFC 1035 and 2136.
fn status(code: ResponseCode) -> String {
    match code {
        ResponseCode::NoError => "NOERROR".into(),
        ResponseCode::FormErr => "FORMERR".into(),
        ResponseCode::ServFail => "SERVFAIL".into(),
        ResponseCode::NXDomain => "NXDOMAIN".into(),
        ResponseCode::NotImp => "NOTIMP".into(),
        ResponseCode::Refused => "REFUSED".into(),
        other => format!("RCODE{}", u16::from(other)),
    }
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
        assert_eq!((request.port, request.kind), (5353, RecordType::SRV));
        assert_eq!(request.name, "hello.default.svc.cluster.local");
        assert!(request.short && request.tcp && !request.search);
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

    #[test]
    fn the_search_list_comes_first_below_ndots() {
        let config = ResolverConfig::parse(
            "# pods\nnameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local\noptions timeout:1 ndots:5\n",
        );
        assert_eq!(config.servers, ["10.96.0.10".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            config.candidates("hello"),
            [
                "hello.default.svc.cluster.local.",
                "hello.svc.cluster.local.",
                "hello."
            ]
        );
        assert_eq!(config.candidates("a.b.c.d.e.f")[0], "a.b.c.d.e.f.");
        assert_eq!(config.candidates("hello."), ["hello."]);
    }
}
