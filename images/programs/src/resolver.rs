//! A stub resolver: /etc/resolv.conf, /etc/hosts, and questions to DNS servers by UDP and TCP.
//!
//! Our programs are static, and the C library's resolver is not made for that: it loads parts of itself at run time.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

/// How a question is asked.
#[derive(Debug, Clone)]
pub struct Manner {
    pub port: u16,
    pub tcp: bool,
    /// Take a truncated answer as it is instead of asking again by TCP.
    pub ignore_truncation: bool,
    /// The EDNS buffer size in bytes; None asks without EDNS.
    pub edns_size: Option<u16>,
    pub recursion: bool,
    pub timeout: Duration,
    pub tries: u32,
}

impl Default for Manner {
    fn default() -> Manner {
        Manner {
            port: 53,
            tcp: false,
            ignore_truncation: false,
            edns_size: Some(1232),
            recursion: true,
            timeout: Duration::from_secs(2),
            tries: 3,
        }
    }
}

/// An answer, its size in bytes, and how it came.
pub struct Answer {
    pub message: Message,
    pub size: usize,
    pub transport: &'static str,
}

impl Answer {
    /// Whether it holds records of what was asked for.
    pub fn found(&self) -> bool {
        self.message.metadata.response_code == ResponseCode::NoError
            && !self.message.answers.is_empty()
    }
}

/// What a resolver reads in /etc/resolv.conf (resolv.conf(5)).
#[derive(Debug, PartialEq)]
pub struct Config {
    pub servers: Vec<IpAddr>,
    search: Vec<String>,
    ndots: usize,
}

impl Config {
    /// The machine's, or the pod's. Without the file there are no servers.
    pub fn of_system() -> Config {
        Config::parse(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
    }

    fn parse(text: &str) -> Config {
        let mut config = Config {
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
    pub fn candidates(&self, name: &str) -> Vec<String> {
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

/// The addresses of a host: what it is when it is an address, else from /etc/hosts, else from DNS with the search list.
pub fn addresses(host: &str, timeout: Duration) -> Result<Vec<IpAddr>> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return Ok(vec![address]);
    }
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    let known = addresses_in_hosts(&hosts, host);
    if !known.is_empty() {
        return Ok(known);
    }
    let config = Config::of_system();
    let manner = Manner {
        timeout: timeout.min(Manner::default().timeout),
        ..Manner::default()
    };
    let mut failure = None;
    for server in &config.servers {
        match addresses_from(&config, &manner, *server, host) {
            Ok(found) if found.is_empty() => bail!("bad address '{host}'"),
            Ok(found) => return Ok(found),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or_else(|| anyhow::anyhow!("/etc/resolv.conf names no server")))
        .with_context(|| format!("bad address '{host}'"))
}

fn addresses_from(
    config: &Config,
    manner: &Manner,
    server: IpAddr,
    host: &str,
) -> Result<Vec<IpAddr>> {
    for name in config.candidates(host) {
        let name =
            Name::from_ascii(&name).with_context(|| format!("{name:?} is not a domain name"))?;
        let mut found = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            let answer = ask(manner, server, &name, kind)?;
            match answer.message.metadata.response_code {
                ResponseCode::NoError => {}
                ResponseCode::NXDomain => break,
                // Neither "no" nor an address: to go on to the next name of the search list could find another host.
                other => bail!("{server} answers {} for {name}", status(other)),
            }
            found.extend(
                answer
                    .message
                    .answers
                    .iter()
                    .filter_map(|record| match &record.data {
                        RData::A(address) => Some(IpAddr::V4(address.0)),
                        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
                        _ => None,
                    }),
            );
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

fn addresses_in_hosts(hosts: &str, host: &str) -> Vec<IpAddr> {
    hosts
        .lines()
        .filter_map(|line| {
            let mut words = line.split('#').next()?.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words
                .any(|name| name.eq_ignore_ascii_case(host))
                .then_some(address)
        })
        .collect()
}

/// Asks one server one question.
pub fn ask(manner: &Manner, server: IpAddr, name: &Name, kind: RecordType) -> Result<Answer> {
    let server = SocketAddr::new(server, manner.port);
    let mut query = Message::new(random_id()?, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = manner.recursion;
    query.add_query(Query::query(name.clone(), kind));
    if let Some(size) = manner.edns_size {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        query.edns = Some(edns);
    }
    let bytes = query
        .to_vec()
        .context("the question does not fit a message")?;
    let parsed = |reply: &[u8]| {
        Message::from_vec(reply).with_context(|| format!("{server} answers with no DNS message"))
    };
    if !manner.tcp {
        let reply = ask_udp(manner, server, &bytes)?;
        let message = parsed(&reply)?;
        if !message.metadata.truncation || manner.ignore_truncation {
            return Ok(Answer {
                message,
                size: reply.len(),
                transport: "UDP",
            });
        }
    }
    let reply = ask_tcp(manner, server, &bytes)
        .with_context(|| format!("no answer from {server} by TCP"))?;
    Ok(Answer {
        message: parsed(&reply)?,
        size: reply.len(),
        transport: "TCP",
    })
}

fn ask_udp(manner: &Manner, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let mut reason = None;
    for _ in 0..manner.tries {
        // A new socket each time: a late answer to the last attempt cannot be taken for this one's.
        let socket = UdpSocket::bind(any)?;
        socket
            .connect(server)
            .with_context(|| format!("cannot reach {server}"))?;
        socket.set_read_timeout(Some(manner.timeout))?;
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
        manner.tries,
        manner.timeout.as_secs(),
        reason.unwrap_or_default()
    )
}

fn ask_tcp(manner: &Manner, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, manner.timeout)?;
    stream.set_read_timeout(Some(manner.timeout))?;
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
fn random_id() -> Result<u16> {
    let mut bytes = [0; 2];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(u16::from_be_bytes(bytes))
}

/// A response code by the mnemonic of RFC 1035 and 2136.
pub fn status(code: ResponseCode) -> String {
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

    #[test]
    fn the_search_list_comes_first_below_ndots() {
        let config = Config::parse(
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

    #[test]
    fn hosts_are_found_by_any_of_their_names() {
        let hosts = "127.0.0.1 localhost\n10.0.0.7\tweb.example web # the web\n# 10.0.0.8 gone\n";
        assert_eq!(
            addresses_in_hosts(hosts, "WEB"),
            ["10.0.0.7".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(addresses_in_hosts(hosts, "the"), [] as [IpAddr; 0]);
        assert_eq!(addresses_in_hosts(hosts, "gone"), [] as [IpAddr; 0]);
    }

    #[test]
    fn addresses_are_themselves() {
        let timeout = Duration::from_secs(1);
        assert_eq!(
            addresses("10.96.0.10", timeout).unwrap(),
            ["10.96.0.10".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(
            addresses("[fd00::1]", timeout).unwrap(),
            ["fd00::1".parse::<IpAddr>().unwrap()]
        );
    }
}
