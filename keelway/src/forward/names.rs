//! Names as the machine resolves them: its hosts file, its name servers. Read anew for each question, since a machine changes
//! networks, and images are pulled rarely.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use tokio::net::TcpStream;

/// Addresses of documentation (RFC 5737, RFC 3849), where nobody is, by which the cluster reaches the machine's name server.
pub const NAME_SERVERS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 53)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53)),
];
/// How long one address may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum NameError {
    #[error("{0:?} is no host and port")]
    Malformed(String),
    #[error("the machine's name servers are not known: {0}")]
    System(String),
    #[error("{host} is not known: {reason}")]
    Unknown { host: String, reason: String },
    #[error("cannot connect to {address}: {reason}")]
    Connect { address: SocketAddr, reason: String },
}

/// Connects to `host:port`, one address after the other.
///
/// # Errors
/// Why the last address did not accept.
pub async fn connect(host: &str, port: u16) -> Result<TcpStream, NameError> {
    let mut last = NameError::Unknown {
        host: host.to_owned(),
        reason: "it has no address".to_owned(),
    };
    for address in resolve(host).await? {
        let address = SocketAddr::new(address, port);
        let reason = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await
        {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {CONNECT_TIMEOUT:?}"),
        };
        last = NameError::Connect { address, reason };
    }
    Err(last)
}

/// The addresses of a host.
///
/// # Errors
/// What the machine's resolver says.
pub(crate) async fn resolve(host: &str) -> Result<Vec<IpAddr>, NameError> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse() {
        return Ok(vec![address]);
    }
    if is_local(host) {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    let system = |error: &dyn std::fmt::Display| NameError::System(error.to_string());
    let resolver = TokioResolver::builder_tokio().map_err(|error| system(&error))?;
    let resolver = resolver.build().map_err(|error| system(&error))?;
    let answer = resolver.lookup_ip(host).await;
    let answer = answer.map_err(|error| NameError::Unknown {
        host: host.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(answer.iter().collect())
}

/// The first of the machine's name servers.
///
/// # Errors
/// When none is known.
pub fn name_server() -> Result<SocketAddr, NameError> {
    let system = |reason: String| NameError::System(reason);
    let (config, _) = hickory_resolver::system_conf::read_system_conf()
        .map_err(|error| system(error.to_string()))?;
    let first = config.name_servers.first();
    let first = first.ok_or_else(|| system("there are none in resolv.conf".to_owned()))?;
    let port = first.connections.first().map_or(53, |how| how.port);
    Ok(SocketAddr::new(first.ip, port))
}

/// Whether a name is the machine's own by RFC 6761, which no name server is asked for.
fn is_local(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

/// Host and port of `host:port`; the host of an IPv6 address is in brackets.
///
/// # Errors
/// When it is not of that form.
pub fn authority(text: &str, port_default: Option<u16>) -> Result<(String, u16), NameError> {
    let malformed = || NameError::Malformed(text.to_owned());
    let authority: http::uri::Authority = text.parse().map_err(|_| malformed())?;
    let port = authority
        .port_u16()
        .or(port_default)
        .ok_or_else(malformed)?;
    if authority.host().is_empty() || authority.as_str().contains('@') {
        return Err(malformed());
    }
    Ok((authority.host().to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_a_host_and_a_port() {
        for (text, default, expected) in [
            ("a.example:443", None, Some(("a.example", 443))),
            ("[::1]:5000", None, Some(("[::1]", 5000))),
            ("a.example", Some(80), Some(("a.example", 80))),
            ("a.example", None, None),
            ("a.example:99999", None, None),
            ("user@a.example:1", None, None),
            (":443", None, None),
            ("", Some(80), None),
        ] {
            let got = authority(text, default).ok();
            let expected = expected.map(|(host, port)| (host.to_owned(), port));
            assert_eq!(got, expected, "{text}");
        }
    }

    #[tokio::test]
    async fn local_names_and_addresses_need_no_name_server() {
        for host in ["localhost", "registry.localhost", "Registry.LOCALHOST."] {
            let all = resolve(host).await.expect(host);
            assert!(all.iter().all(IpAddr::is_loopback), "{host}: {all:?}");
        }
        let v6 = resolve("[2001:2::1]").await.expect("an address");
        assert_eq!(v6, ["2001:2::1".parse::<IpAddr>().expect("an address")]);
    }
}
