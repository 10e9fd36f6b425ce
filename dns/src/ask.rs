//! `keelway-dns query`: asks a server and prints its answer.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hickory_proto::op::{Edns, Message, Query};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

#[derive(Debug, clap::Args)]
pub struct Ask {
    /// Name to look up; always absolute, no search path is applied.
    name: String,
    /// Record type: A, AAAA, SRV, PTR, TXT, SOA, ...
    #[arg(long = "type", short = 't', default_value = "A")]
    rtype: RecordType,
    /// Server to ask, as ADDRESS or ADDRESS:PORT; the first one of /etc/resolv.conf by default.
    #[arg(long, short = 's')]
    server: Option<String>,
    /// Ask over TCP at once (otherwise only when the UDP answer is truncated).
    #[arg(long)]
    tcp: bool,
    /// Also ask the server why: which block, zone and rule, and where the records come from.
    #[arg(long)]
    explain: bool,
    /// Port of the server's /explain.
    #[arg(long, default_value_t = 8181)]
    explain_port: u16,
    /// Seconds to wait for an answer.
    #[arg(long, default_value_t = 5)]
    timeout: u64,
}

const DNS_PORT: u16 = 53;
const UDP_BYTES: u16 = 1232;

impl Ask {
    /// Asks and returns the answer to print.
    pub async fn run(&self) -> anyhow::Result<impl fmt::Display> {
        let server = self.server()?;
        let name = Name::from_ascii(format!("{}.", self.name.trim_end_matches('.')))
            .with_context(|| format!("{:?} is not a name", self.name))?;
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(name, self.rtype));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_BYTES);
        query.set_edns(edns);
        let wire = query.to_vec()?;
        let begun = Instant::now();
        let patience = Duration::from_secs(self.timeout);
        let reply = timeout(patience, exchange(server, &wire, self.tcp))
            .await
            .with_context(|| format!("{server} did not answer within {} s", self.timeout))?
            .with_context(|| format!("asking {server}"))?;
        let message = Message::from_vec(&reply)
            .with_context(|| format!("{server} sent an unreadable answer"))?;
        if message.metadata.id != query.metadata.id {
            bail!("{server} answered another query");
        }
        let why = if self.explain {
            let asked = timeout(patience, self.why(server.ip()));
            asked
                .await
                .context("the server did not explain in time")??
        } else {
            String::new()
        };
        Ok(Answer {
            why,
            message,
            server,
            took: begun.elapsed(),
            bytes: reply.len(),
        })
    }

    /// Asks a server of ours for its reasons.
    async fn why(&self, server: IpAddr) -> anyhow::Result<String> {
        let address = SocketAddr::from((server, self.explain_port));
        let asking = || {
            format!(
                "asking {address} for its reasons (a server of Keelway's, and its --health port?)"
            )
        };
        let mut stream = TcpStream::connect(address).await.with_context(asking)?;
        let request = format!(
            "GET /explain?name={}&type={} HTTP/1.0\r\nHost: {address}\r\n\r\n",
            self.name, self.rtype
        );
        stream
            .write_all(request.as_bytes())
            .await
            .with_context(asking)?;
        let mut response = String::new();
        stream
            .read_to_string(&mut response)
            .await
            .with_context(asking)?;
        let (head, body) = response.split_once("\r\n\r\n").with_context(asking)?;
        if !head
            .lines()
            .next()
            .is_some_and(|line| line.contains(" 200 "))
        {
            bail!("{address}: {body}");
        }
        Ok(body.to_owned())
    }

    fn server(&self) -> anyhow::Result<SocketAddr> {
        let Some(text) = &self.server else {
            let conf = std::fs::read_to_string("/etc/resolv.conf")
                .context("reading /etc/resolv.conf; or --server")?;
            let mut words = conf
                .lines()
                .filter_map(|line| line.strip_prefix("nameserver"));
            let first = words.next().map_or("", str::trim);
            let address: IpAddr = if first.is_empty() {
                Ipv4Addr::LOCALHOST.into()
            } else {
                first.parse()?
            };
            return Ok((address, DNS_PORT).into());
        };
        let with_port = text
            .parse()
            .or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, DNS_PORT).into()));
        with_port.with_context(|| format!("--server {text:?} is not ADDRESS or ADDRESS:PORT"))
    }
}

async fn exchange(server: SocketAddr, wire: &[u8], tcp: bool) -> anyhow::Result<Vec<u8>> {
    const TRUNCATED: u8 = 0x02;
    if !tcp {
        let any = if server.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(server).await?;
        socket.send(wire).await?;
        let mut reply = vec![0; usize::from(u16::MAX)];
        let bytes = socket.recv(&mut reply).await?;
        reply.truncate(bytes);
        if reply.get(2).is_some_and(|flags| flags & TRUNCATED == 0) {
            return Ok(reply);
        }
    }
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = u16::try_from(wire.len())?.to_be_bytes().to_vec();
    framed.extend(wire);
    stream.write_all(&framed).await?;
    let mut reply = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut reply).await?;
    Ok(reply)
}

struct Answer {
    why: String,
    message: Message,
    server: SocketAddr,
    took: Duration,
    bytes: usize,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.why.lines() {
            writeln!(f, "; {line}")?;
        }
        writeln!(f, ";; {}", self.message.metadata.response_code)?;
        let sections = [
            ("ANSWER", &self.message.answers),
            ("AUTHORITY", &self.message.authorities),
            ("ADDITIONAL", &self.message.additionals),
        ];
        for (title, records) in sections
            .into_iter()
            .filter(|(_, records)| !records.is_empty())
        {
            writeln!(f, ";; {title}")?;
            for record in records {
                writeln!(f, "{record}")?;
            }
        }
        let Self {
            server,
            took,
            bytes,
            ..
        } = self;
        write!(
            f,
            ";; {server}, {bytes} bytes, {:.2} ms",
            took.as_secs_f64() * 1000.0
        )
    }
}
