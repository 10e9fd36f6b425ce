//! The plugins of a Corefile that are about names of others: `forward` and `cache`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::corefile::{Directive, SyntaxError, Word};
use super::plugins::{Reading, duration, number, one, zone_names};
use super::spec::{DNS_PORT, RouteSpec, ServerSpec, TLS_PORT, TlsSpec, nameservers};
use crate::cache::CacheRules;
use crate::forward::{ForwardRules, Order};
use crate::name::Name;

impl Reading<'_> {
    pub(super) fn forward(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        let [from, to @ ..] = &directive.args[..] else {
            return Err(directive.name.bad("needs a zone and servers"));
        };
        let mut rules = ForwardRules::default();
        let mut except = Vec::new();
        let mut tls_name: Option<String> = None;
        let mut tls_files: Vec<PathBuf> = Vec::new();
        for line in &directive.lines {
            let (key, values) = (&line[0], &line[1..]);
            match key.text.as_str() {
                "except" => except.extend(self.zones(values)?),
                "force_tcp" => rules.tcp_only = true,
                "max_fails" => rules.failures_max = number(one(key, values)?)?,
                "max_concurrent" => {
                    let count: usize = number(one(key, values)?)?;
                    // 0 means no bound to CoreDNS; memory has one.
                    rules.concurrent_max = if count == 0 {
                        65_536
                    } else {
                        count.min(65_536)
                    };
                }
                "policy" => {
                    rules.order = match one(key, values)?.text.as_str() {
                        "random" => Order::Random,
                        "round_robin" => Order::RoundRobin,
                        "sequential" => Order::Sequential,
                        _ => return Err(values[0].bad("is not random, round_robin or sequential")),
                    };
                }
                "health_check" => {
                    let (every, options) = values
                        .split_first()
                        .ok_or_else(|| key.bad("needs a duration"))?;
                    rules.check_every = duration(every)?.max(Duration::from_millis(100));
                    let mut options = options.iter();
                    while let Some(option) = options.next() {
                        match option.text.as_str() {
                            "no_rec" => rules.check_recursive = false,
                            "domain" => {
                                let domain = options.next();
                                let domain = domain.ok_or_else(|| option.bad("needs a name"))?;
                                rules.check_name = Name::parse(&domain.text)
                                    .map_err(|error| domain.bad(error.to_string()))?;
                            }
                            _ => return Err(option.bad("is not no_rec or domain")),
                        }
                    }
                }
                "tls_servername" => tls_name = Some(one(key, values)?.text.clone()),
                "tls" => {
                    tls_files = values
                        .iter()
                        .map(|word| PathBuf::from(&word.text))
                        .collect()
                }
                // Connections are kept as long as is good for them, and UDP comes first anyway.
                "expire"
                | "prefer_udp"
                | "max_idle_conns"
                | "max_connect_attempts"
                | "failfast_all_unhealthy_upstreams" => {}
                _ => return Err(key.bad("this option of forward is not supported")),
            }
        }
        let (own, authorities) = match &tls_files[..] {
            [] => (None, None),
            [authorities] => (None, Some(authorities.clone())),
            [certificate, key] => (Some((certificate.clone(), key.clone())), None),
            [certificate, key, authorities, ..] => (
                Some((certificate.clone(), key.clone())),
                Some(authorities.clone()),
            ),
        };
        for file in &tls_files {
            self.files.note(file);
        }
        let mut servers = Vec::new();
        for word in to {
            servers.extend(self.servers(word)?);
        }
        if servers.is_empty() {
            return Err(directive.name.bad("names no server"));
        }
        for server in &mut servers {
            if let Some(tls) = &mut server.tls {
                if let Some(name) = &tls_name {
                    tls.name.clone_from(name);
                }
                tls.own.clone_from(&own);
                tls.authorities.clone_from(&authorities);
            }
        }
        for zone in zone_names(from, &from.text)? {
            self.block.routes.push(RouteSpec {
                zone,
                except: except.clone(),
                servers: servers.clone(),
                rules: rules.clone(),
            });
        }
        Ok(())
    }

    fn servers(&mut self, word: &Word) -> Result<Vec<ServerSpec>, SyntaxError> {
        let text = word.text.as_str();
        let (text, tls) = match text.strip_prefix("tls://") {
            Some(rest) => (rest, true),
            None => (text.strip_prefix("dns://").unwrap_or(text), false),
        };
        let (text, name) = match text.split_once('%') {
            Some((address, rest)) if tls => {
                let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
                let port = if port.is_empty() {
                    String::new()
                } else {
                    format!(":{port}")
                };
                (format!("{address}{port}"), Some(name.to_owned()))
            }
            _ => (text.to_owned(), None),
        };
        let port = if tls { TLS_PORT } else { DNS_PORT };
        let with_port = text.parse::<SocketAddr>().or_else(|_| {
            text.trim_matches(['[', ']'])
                .parse::<IpAddr>()
                .map(|ip| (ip, port).into())
        });
        if let Ok(address) = with_port {
            let tls = tls.then(|| TlsSpec {
                name: name.unwrap_or_else(|| address.ip().to_string()),
                authorities: None,
                own: None,
            });
            return Ok(vec![ServerSpec { address, tls }]);
        }
        let file = Path::new(&text);
        if tls || !file.is_absolute() {
            return Err(word.bad("is not an address, tls://ADDRESS or a resolv.conf"));
        }
        let servers = nameservers(file, self.files).map_err(|error| word.bad(error.to_string()))?;
        let plain = |address| ServerSpec { address, tls: None };
        Ok(servers.into_iter().map(plain).collect())
    }

    pub(super) fn cache(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        let mut rules = CacheRules::default();
        let mut zones = &directive.args[..];
        if let [ttl, rest @ ..] = zones
            && ttl.text.parse::<u64>().is_ok()
        {
            let most = duration(ttl)?;
            rules.success.ttl_max = most.min(rules.success.ttl_max);
            rules.denial.ttl_max = most.min(rules.denial.ttl_max);
            zones = rest;
        }
        rules.zones = self.zones(zones)?;
        for line in &directive.lines {
            let (key, values) = (&line[0], &line[1..]);
            match key.text.as_str() {
                "success" | "denial" => {
                    let share = if key.text == "success" {
                        &mut rules.success
                    } else {
                        &mut rules.denial
                    };
                    let [capacity, ttls @ ..] = values else {
                        return Err(key.bad("needs a capacity"));
                    };
                    share.entries_max = number(capacity)?;
                    if let Some(most) = ttls.first() {
                        share.ttl_max = duration(most)?;
                    }
                    if let Some(least) = ttls.get(1) {
                        share.ttl_min = duration(least)?;
                    }
                }
                "servfail" => {
                    rules.servfail = duration(one(key, values)?)?.min(Duration::from_secs(300))
                }
                "prefetch" => {
                    let hits = values
                        .first()
                        .ok_or_else(|| key.bad("needs a number of hits"))?;
                    rules.prefetch_hits = number(hits)?;
                    if let Some(percent) = values.get(2) {
                        let text = percent.text.trim_end_matches('%');
                        let share = text.parse().ok().filter(|share| (1..=90).contains(share));
                        rules.prefetch_percent =
                            share.ok_or_else(|| percent.bad("is not 1% to 90%"))?;
                    }
                }
                "serve_stale" => {
                    rules.stale = values
                        .first()
                        .map_or(Ok(Duration::from_secs(3600)), duration)?;
                    rules.stale_immediately =
                        values.get(1).is_none_or(|mode| mode.text == "immediate");
                }
                // Names of the cluster are in no cache, so that this says of them what is so anyway.
                "disable" => {
                    let [what, zones @ ..] = values else {
                        return Err(key.bad("needs success or denial"));
                    };
                    let share = match what.text.as_str() {
                        "success" => &mut rules.success,
                        "denial" => &mut rules.denial,
                        _ => return Err(what.bad("is not success or denial")),
                    };
                    share.except = self.zones_or(zones, &[Name::root()])?;
                }
                "keepttl" => {}
                _ => return Err(key.bad("this option of cache is not supported")),
            }
        }
        self.block.cache = Some(rules);
        Ok(())
    }
}
