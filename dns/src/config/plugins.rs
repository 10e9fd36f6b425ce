//! What a Corefile means: its plugins, as far as there is a counterpart here. What has none is an error, never ignored, unless
//! leaving it out changes no answer.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnetwork::IpNetwork;
use regex::Regex;
use tracing::Level;

use super::corefile::{Block, Directive, SyntaxError, Word, read};
use super::files::Files;
use super::spec::{BlockSpec, ClusterSpec, Spec, everywhere};
use crate::log::{Classes, Consolidate, ErrorRules, LogRule};
use crate::name::Name;
use crate::zone::{Pods, ZoneSettings};

/// Plugins that have nothing to say here: loops are looked for and the file watched anyway.
const NO_EFFECT: &[&str] = &["loop", "reload", "cancel", "multisocket", "minimal"];

/// The resolver configuration of the process itself.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Reads a Corefile and everything that it refers to.
pub fn read_spec(path: &Path) -> Result<Spec, SyntaxError> {
    read_spec_of(path, &mut Files::default())
}

/// As [`read_spec`], and says which files that were, also where they have an error.
pub fn read_spec_of(path: &Path, files: &mut Files) -> Result<Spec, SyntaxError> {
    read_spec_on(path, Path::new(RESOLV_CONF), files)
}

/// As [`read_spec_of`], on a machine with another resolver configuration.
pub fn read_spec_on(
    path: &Path,
    resolv_conf: &Path,
    files: &mut Files,
) -> Result<Spec, SyntaxError> {
    let blocks = read(path, files)?;
    let mut spec = Spec {
        zone: ZoneSettings::of(Name::parse("cluster.local").expect("a constant name")),
        blocks: Vec::new(),
        port: None,
        http: Vec::new(),
        lameduck: None,
        warnings: Vec::new(),
    };
    let mut cluster_block: Option<Word> = None;
    for block in &blocks {
        let mut zones = Vec::new();
        for key in &block.keys {
            let (zone, port) = zone_key(key)?;
            if let (Some(other), Some(port)) = (spec.port, port)
                && other != port
            {
                return Err(key.bad(format!(
                    "another block is on port {other}, and one server has one port"
                )));
            }
            spec.port = spec.port.or(port);
            zones.extend(zone);
        }
        let mut reading = Reading {
            spec: &mut spec,
            block: BlockSpec::of(zones),
            transfer: None,
            path,
            resolv_conf,
            files,
        };
        reading.block(block)?;
        let block_spec = reading.block;
        if block_spec.cluster.is_some() {
            let key = block.keys[0].clone();
            if cluster_block.is_some() {
                return Err(
                    key.bad("kubernetes is in another block already; give it several zones there")
                );
            }
            cluster_block = Some(key);
        }
        spec.blocks.push(block_spec);
    }
    if spec.blocks.is_empty() {
        return Err(SyntaxError::Open {
            file: format!("{} has no block, and", path.display()),
        });
    }
    Ok(spec)
}

/// Zone and port of a block's key, as `example.org:53` or `10.0.0.0/8`.
fn zone_key(key: &Word) -> Result<(Vec<Name>, Option<u16>), SyntaxError> {
    let text = key.text.strip_prefix("dns://").unwrap_or(&key.text);
    if text.contains("://") {
        return Err(key.bad("only plain DNS is served"));
    }
    let (zone, port) = match text.rsplit_once(':') {
        Some((zone, port)) => match port.parse() {
            Ok(port) => (zone, Some(port)),
            Err(_) => return Err(key.bad("its port is not a number up to 65535")),
        },
        None => (text, None),
    };
    Ok((
        zone_names(key, if zone.is_empty() { "." } else { zone })?,
        port,
    ))
}

/// A zone by its name, or the reverse zone of a range.
pub(super) fn zone_names(word: &Word, text: &str) -> Result<Vec<Name>, SyntaxError> {
    if let Ok(range) = text.parse::<IpNetwork>()
        && text.contains('/')
    {
        let (bits, per_label, labels) = match range {
            IpNetwork::V4(_) => (range.prefix(), 8, 4),
            IpNetwork::V6(_) => (range.prefix(), 4, 32),
        };
        if bits % per_label != 0 {
            return Err(word.bad(format!(
                "its length is not a multiple of {per_label}, where reverse zones are cut"
            )));
        }
        let whole = Name::reverse(range.ip());
        let skip = usize::from(labels - bits / per_label);
        let wire = whole.and_ancestors().nth(skip).unwrap_or(&[0]);
        return Ok(vec![Name::from_wire(wire)]);
    }
    Name::parse(text)
        .map(|name| vec![name])
        .map_err(|error| word.bad(error.to_string()))
}

/// What is said of transfers: checked once the whole block is known.
struct TransferSpec {
    at: Word,
    zones: Vec<Word>,
    peers: Vec<IpNetwork>,
}

pub(super) struct Reading<'a> {
    pub(super) spec: &'a mut Spec,
    pub(super) block: BlockSpec,
    transfer: Option<TransferSpec>,
    pub(super) path: &'a Path,
    pub(super) resolv_conf: &'a Path,
    pub(super) files: &'a mut Files,
}

pub(super) fn number<T: std::str::FromStr>(word: &Word) -> Result<T, SyntaxError> {
    word.text
        .parse()
        .map_err(|_| word.bad("is not a number that fits here"))
}

/// A duration in Go's form, as 500ms or 1m30s; a bare number is seconds.
pub(super) fn duration(word: &Word) -> Result<Duration, SyntaxError> {
    if let Ok(seconds) = word.text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let bad = || word.bad("is not a duration such as 500ms or 1m30s");
    let mut rest = word.text.as_str();
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(bad)?;
        let value: f64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit_s = match &rest[..end] {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(bad()),
        };
        total += Duration::try_from_secs_f64(value * unit_s).map_err(|_| bad())?;
        rest = &rest[end..];
    }
    Ok(total)
}

pub(super) fn one<'w>(name: &Word, args: &'w [Word]) -> Result<&'w Word, SyntaxError> {
    match args {
        [word] => Ok(word),
        _ => Err(name.bad("takes one argument")),
    }
}

impl Reading<'_> {
    fn block(&mut self, block: &Block) -> Result<(), SyntaxError> {
        for directive in &block.directives {
            self.directive(directive)?;
        }
        let Some(transfer) = self.transfer.take() else {
            return Ok(());
        };
        let Some(cluster) = &mut self.block.cluster else {
            let reason = "is for the zone of kubernetes, which this block has not";
            return Err(transfer.at.bad(reason));
        };
        // Every zone of the cluster is transferred, or none.
        let zone = &self.spec.zone;
        let of_cluster = |name: &Name| zone.origins.contains(name) || zone.reverse.contains(name);
        for word in &transfer.zones {
            let names = zone_names(word, &word.text)?;
            if !names
                .iter()
                .all(|name| of_cluster(name) || self.block.zones.contains(name))
            {
                return Err(word.bad("is no zone of kubernetes"));
            }
        }
        cluster.transfer = transfer.peers;
        Ok(())
    }

    /// Tells of something that is not done, where that changes no answer.
    fn unused(&mut self, word: &Word, why: &str) {
        let warning = format!("{}: {} is not used: {why}", word.at, word.text);
        self.spec.warnings.push(warning);
    }

    /// An error where a word of a line, or of none, has more than it may.
    fn nothing_more(words: &[Word]) -> Result<(), SyntaxError> {
        match words.first() {
            None => Ok(()),
            Some(word) => Err(word.bad("is not known here")),
        }
    }

    fn directive(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        let Directive { name, args, lines } = directive;
        match name.text.as_str() {
            "kubernetes" => self.kubernetes(directive),
            "forward" => self.forward(directive),
            "cache" => self.cache(directive),
            "hosts" => self.hosts(directive),
            "rewrite" => self.rewrite(directive),
            "autopath" => self.autopath(name, args),
            "transfer" => self.transfer(directive),
            "log" => self.log(args, lines),
            "errors" => self.errors(args, lines),
            "bufsize" => {
                let bytes: usize = args.first().map_or(Ok(1232), number)?;
                if !(512..=4096).contains(&bytes) {
                    return Err(name.bad("is 512 to 4096 bytes"));
                }
                self.block.udp_bytes_max = bytes;
                Ok(())
            }
            "health" => {
                for line in lines {
                    match &line[..] {
                        [key, value] if key.text == "lameduck" => {
                            self.spec.lameduck = Some(duration(value)?);
                        }
                        _ => return Err(line[0].bad("health knows lameduck only")),
                    }
                }
                self.http(args, 8080)
            }
            "ready" => {
                for line in lines {
                    match &line[..] {
                        [key, how] if key.text == "monitor" && how.text == "until-ready" => {
                            self.unused(how, "readiness always means it");
                        }
                        [key, how] if key.text == "monitor" && how.text == "continuously" => {}
                        _ => return Err(line[0].bad("ready knows monitor until-ready, continuously only")),
                    }
                }
                self.http(args, 8181)
            }
            // Addresses are taken in turn, whatever is said.
            "loadbalance" => {
                let rest = match &args[..] {
                    [policy, rest @ ..] if policy.text == "round_robin" => rest,
                    rest => rest,
                };
                Self::nothing_more(rest)?;
                lines.iter().try_for_each(|line| Self::nothing_more(line))
            }
            "prometheus" => self.http(args, 9153),
            other if NO_EFFECT.contains(&other) => Ok(()),
            "bind" => Err(name.bad("say it by --listen")),
            _ => Err(name.bad(
                "this plugin is not supported; those that are: kubernetes, forward, cache, hosts, rewrite, autopath, \
                 transfer, log, errors, bufsize, health, ready, prometheus, loop, loadbalance, reload",
            )),
        }
    }

    fn http(&mut self, args: &[Word], port: u16) -> Result<(), SyntaxError> {
        let address = match args.first() {
            None => everywhere(port),
            Some(word) => {
                let named = match word.text.strip_prefix(':') {
                    Some(port) => port.parse().map(everywhere).ok(),
                    None => word.text.replace("localhost:", "127.0.0.1:").parse().ok(),
                };
                named.ok_or_else(|| word.bad("is not ADDRESS:PORT"))?
            }
        };
        if !self.spec.http.contains(&address) {
            self.spec.http.push(address);
        }
        Ok(())
    }

    pub(super) fn zones(&self, words: &[Word]) -> Result<Vec<Name>, SyntaxError> {
        let mut zones = Vec::new();
        for word in words {
            zones.extend(zone_names(word, &word.text)?);
        }
        Ok(zones)
    }

    pub(super) fn zones_or(
        &self,
        words: &[Word],
        otherwise: &[Name],
    ) -> Result<Vec<Name>, SyntaxError> {
        if words.is_empty() {
            Ok(otherwise.to_vec())
        } else {
            self.zones(words)
        }
    }

    fn kubernetes(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        let zones = self.zones_or(&directive.args, &self.block.zones)?;
        let (reverse, origins): (Vec<Name>, Vec<Name>) =
            zones.into_iter().partition(Name::is_reverse);
        if origins.is_empty() {
            return Err(directive.name.bad("needs a domain of the cluster"));
        }
        let mut cluster = ClusterSpec {
            ttl_s: 5,
            fallthrough: Vec::new(),
            transfer: Vec::new(),
        };
        let mut zone = ZoneSettings {
            origins,
            reverse,
            pods: Pods::Disabled,
            endpoint_pod_names: false,
        };
        for line in &directive.lines {
            let (key, values) = (&line[0], &line[1..]);
            match key.text.as_str() {
                "pods" => {
                    zone.pods = match one(key, values)?.text.as_str() {
                        "disabled" => Pods::Disabled,
                        "insecure" => Pods::Insecure,
                        "verified" => Pods::Verified,
                        _ => return Err(values[0].bad("is not disabled, insecure or verified")),
                    };
                }
                "ttl" => {
                    cluster.ttl_s = number(one(key, values)?)?;
                    if cluster.ttl_s > 3600 {
                        return Err(values[0].bad("is more than 3600 seconds"));
                    }
                }
                "fallthrough" => cluster.fallthrough = self.zones_or(values, &[Name::root()])?,
                "endpoint_pod_names" => zone.endpoint_pod_names = true,
                // How the API server is reached is this program's own affair.
                "endpoint" | "tls" | "kubeconfig" | "apiserver_qps" | "apiserver_burst"
                | "startup_timeout" => {
                    self.unused(key, "see --api-server and --kubeconfig");
                }
                _ => return Err(key.bad("this option of kubernetes is not supported")),
            }
        }
        self.block.cluster = Some(cluster);
        self.spec.zone = zone;
        Ok(())
    }

    fn transfer(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        let mut peers = Vec::new();
        for line in &directive.lines {
            if line[0].text != "to" {
                return Err(line[0].bad("transfer knows to only"));
            }
            for word in &line[1..] {
                if word.text == "*" {
                    let any = [IpAddr::from([0; 4]), IpAddr::from([0; 16])];
                    peers.extend(
                        any.map(|address| IpNetwork::new(address, 0).expect("a length of 0")),
                    );
                } else {
                    peers.push(
                        word.text
                            .parse()
                            .map_err(|_| word.bad("is not an address, a range or *"))?,
                    );
                }
            }
        }
        self.transfer = Some(TransferSpec {
            at: directive.name.clone(),
            zones: directive.args.clone(),
            peers,
        });
        Ok(())
    }
}

impl Reading<'_> {
    fn errors(&mut self, args: &[Word], lines: &[Vec<Word>]) -> Result<(), SyntaxError> {
        let rest = match args {
            [place, rest @ ..] if place.text == "stdout" => rest,
            rest => rest,
        };
        Self::nothing_more(rest)?;
        let mut rules = ErrorRules::default();
        for line in lines {
            match line[0].text.as_str() {
                "consolidate" => rules.consolidated.push(consolidate(line)?),
                "stacktrace" => self.unused(&line[0], "a panic is told of with its place"),
                _ => return Err(line[0].bad("errors knows consolidate and stacktrace only")),
            }
        }
        self.block.log.errors = Some(rules);
        Ok(())
    }

    /// `log [NAMES...] [FORMAT]`, with the classes in its braces.
    fn log(&mut self, args: &[Word], lines: &[Vec<Word>]) -> Result<(), SyntaxError> {
        let names = match args {
            [names @ .., format] if format.text.contains('{') => {
                if !matches!(format.text.as_str(), "{common}" | "{combined}") {
                    return Err(format.bad("another format than {common} is not supported"));
                }
                names
            }
            names => names,
        };
        let rule = LogRule {
            zones: self.zones(names)?,
            classes: classes(lines)?,
        };
        self.block.log.queries.push(rule);
        Ok(())
    }
}

/// `consolidate DURATION EXPRESSION [LEVEL] [show_first]`.
fn consolidate(line: &[Word]) -> Result<Consolidate, SyntaxError> {
    const EXPRESSION_BYTES_MAX: usize = 10_000;
    let [key, during, like, rest @ ..] = line else {
        return Err(line[0].bad("takes a duration and an expression"));
    };
    if like.text.len() > EXPRESSION_BYTES_MAX {
        return Err(key.bad("has an expression of more than 10000 bytes"));
    }
    let mut rule = Consolidate {
        like: Regex::new(&like.text).map_err(|error| like.bad(error.to_string()))?,
        during: duration(during)?,
        level: Level::ERROR,
        shows_first: false,
    };
    for word in rest {
        match word.text.as_str() {
            "warning" => rule.level = Level::WARN,
            "error" => rule.level = Level::ERROR,
            "info" => rule.level = Level::INFO,
            "debug" => rule.level = Level::DEBUG,
            "show_first" => rule.shows_first = true,
            _ => return Err(word.bad("is not warning, error, info, debug or show_first")),
        }
    }
    Ok(rule)
}

fn classes(lines: &[Vec<Word>]) -> Result<Classes, SyntaxError> {
    let mut classes = Classes::NONE;
    for line in lines {
        if line[0].text != "class" {
            return Err(line[0].bad("log knows class only"));
        }
        for word in &line[1..] {
            match word.text.as_str() {
                "all" => classes = Classes::ALL,
                "success" => classes.success = true,
                "denial" => classes.denial = true,
                "error" => classes.error = true,
                _ => return Err(word.bad("is not all, success, denial or error")),
            }
        }
    }
    Ok(if lines.is_empty() {
        Classes::ALL
    } else {
        classes
    })
}
