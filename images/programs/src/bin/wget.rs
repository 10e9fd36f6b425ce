//! wget: fetches one document by HTTP. Debian's busybox applet has no timeout, and dies of the option that sets one.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use keelway_image_programs::resolver;

#[derive(Parser)]
#[command(about = "Fetches one document by HTTP")]
struct Flags {
    /// Print nothing but the document
    #[arg(short = 'q', long)]
    quiet: bool,
    /// Where to write the document; - is standard output [default: the last part of the path]
    #[arg(short = 'O', long = "output-document", value_name = "FILE")]
    output: Option<String>,
    /// Seconds to wait for the name, the connection, and each part of the answer
    #[arg(short = 'T', long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    /// How often to try when there is no connection
    #[arg(short = 't', long, value_name = "COUNT", default_value_t = 1)]
    tries: u32,
    /// Print the answer's headers to standard error
    #[arg(short = 'S', long)]
    server_response: bool,
    /// Only see whether the document is there
    #[arg(long)]
    spider: bool,
    /// A line for the request's head
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Post this
    #[arg(long, value_name = "TEXT")]
    post_data: Option<String>,
    url: String,
}

fn main() -> ExitCode {
    match fetch(&Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wget: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Host, port and path of an HTTP URL.
#[derive(Debug, PartialEq)]
struct Target {
    host: String,
    port: u16,
    path: String,
}

impl Target {
    fn parse(url: &str) -> Result<Target> {
        let rest = match url.split_once("://") {
            Some(("http", rest)) => rest,
            Some((scheme, _)) => bail!("this small wget speaks http only, not {scheme}"),
            None => url,
        };
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        // The colons of an IPv6 address stand in brackets.
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (
                host,
                port.parse()
                    .with_context(|| format!("{port:?} is not a port"))?,
            ),
            _ => (authority, 80),
        };
        if host.is_empty() {
            bail!("{url:?} names no host");
        }
        Ok(Target {
            host: host.to_owned(),
            port,
            path: path.to_owned(),
        })
    }

    fn file_name(&self) -> &str {
        let path = self.path.split(['?', '#']).next().unwrap_or_default();
        match path.rsplit('/').next() {
            Some("") | None => "index.html",
            Some(name) => name,
        }
    }
}

fn fetch(flags: &Flags) -> Result<()> {
    let target = Target::parse(&flags.url)?;
    let timeout = Duration::from_secs(flags.timeout.max(1));
    let mut stream = connect(&target, flags.tries, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream
        .write_all(request(flags, &target).as_bytes())
        .context("cannot send the request")?;

    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader).context("error getting response")?;
    if flags.server_response {
        eprint!("{head}");
    }
    let status_line = head.lines().next().unwrap_or_default();
    let status: u16 = status_line
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    if !(200..300).contains(&status) {
        bail!("server returned error: {}", status_line.trim_end());
    }
    if flags.spider {
        return Ok(());
    }
    let mut out: Box<dyn Write> = match flags.output.as_deref() {
        Some("-") => Box::new(std::io::stdout().lock()),
        other => {
            let name = other.unwrap_or_else(|| target.file_name());
            Box::new(std::fs::File::create(name).with_context(|| format!("cannot write {name}"))?)
        }
    };
    let written = match length(&head) {
        Some(length) => {
            let copied = std::io::copy(&mut reader.take(length), &mut out)?;
            if copied < length {
                bail!("connection closed prematurely: {copied} of {length} bytes");
            }
            copied
        }
        None => std::io::copy(&mut reader, &mut out)?,
    };
    out.flush()?;
    if !flags.quiet {
        eprintln!("{} bytes from {}", written, flags.url);
    }
    Ok(())
}

fn connect(target: &Target, tries: u32, timeout: Duration) -> Result<TcpStream> {
    let addresses = resolver::addresses(&target.host, timeout)?;
    let mut failure = None;
    for _ in 0..tries.max(1) {
        for address in &addresses {
            match TcpStream::connect_timeout(&SocketAddr::new(*address, target.port), timeout) {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = Some((address, error)),
            }
        }
    }
    let (address, error) = failure.context("a host has an address")?;
    Err(error).with_context(|| format!("can't connect to remote host ({address})"))
}

/// HTTP/1.0, so that the answer ends with the connection and is in one piece.
fn request(flags: &Flags, target: &Target) -> String {
    let method = match (&flags.post_data, flags.spider) {
        (Some(_), _) => "POST",
        (None, true) => "HEAD",
        (None, false) => "GET",
    };
    let host = match target.port {
        80 => target.host.clone(),
        port => format!("{}:{port}", target.host),
    };
    let mut text = format!(
        "{method} {} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: Wget\r\nConnection: close\r\n",
        target.path
    );
    for header in &flags.header {
        text += &format!("{header}\r\n");
    }
    if let Some(data) = &flags.post_data {
        text += "Content-Type: application/x-www-form-urlencoded\r\n";
        text += &format!("Content-Length: {}\r\n\r\n{data}", data.len());
    } else {
        text += "\r\n";
    }
    text
}

fn read_head(reader: &mut impl BufRead) -> Result<String> {
    let mut head = String::new();
    loop {
        let start = head.len();
        if reader.read_line(&mut head)? == 0 {
            bail!("the server closed the connection");
        }
        if matches!(&head[start..], "\r\n" | "\n") {
            return Ok(head);
        }
    }
}

fn length(head: &str) -> Option<u64> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?
        .1
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let target = |host: &str, port, path: &str| Target {
            host: host.into(),
            port,
            path: path.into(),
        };
        for (url, expected) in [
            ("http://hello/", target("hello", 80, "/")),
            ("hello", target("hello", 80, "/")),
            (
                "http://10.96.0.7:8080/a?b=c",
                target("10.96.0.7", 8080, "/a?b=c"),
            ),
            ("http://[fd00::1]/x", target("[fd00::1]", 80, "/x")),
            ("http://[fd00::1]:81/x", target("[fd00::1]", 81, "/x")),
        ] {
            assert_eq!(Target::parse(url).unwrap(), expected, "{url}");
        }
        for url in ["https://hello/", "http:///x", "http://hello:x/"] {
            assert!(Target::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_document_without_a_name_is_an_index() {
        assert_eq!(
            Target::parse("http://hello/").unwrap().file_name(),
            "index.html"
        );
        assert_eq!(
            Target::parse("http://hello/a/b.txt?c=/d")
                .unwrap()
                .file_name(),
            "b.txt"
        );
    }
}
