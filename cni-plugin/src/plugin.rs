//! One run of the plugin.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use serde_json::{Value, json};

use crate::invocation::command;
use crate::protocol::{self, ExchangeError, Request, Response, Wish};
use crate::{CniError, Code, Command, Environment, Invocation, Version, spool};

/// Longest configuration read from standard input, in bytes.
const CONFIG_LEN_MAX: u64 = 1 << 20;
/// How long an agent that accepted the connection may take. A runtime gives up on its own well after this.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Does what the environment and the configuration ask for, and returns what goes to standard output, if anything.
pub fn run(env: &Environment, config: &[u8]) -> Result<Option<Value>, CniError> {
    let command = command(env)?;
    if command == Command::Version {
        return version(config).map(Some);
    }
    let call = Invocation::parse(env, config)?;
    match call.command {
        Command::Add => add(&call).map(Some),
        Command::Check => check(&call).map(|()| None),
        Command::Del => {
            delete(&call);
            Ok(None)
        }
        Command::Gc => {
            let valid = call.conf.valid_attachments.clone().unwrap_or_default();
            let network = call.conf.name.clone();
            expect_done(ask(&call, &Request::Gc { network, valid }, None)?).map(|()| None)
        }
        Command::Status | Command::Version => {
            let answer = ask(&call, &Request::Status, None).map_err(|error| match error.code {
                Code::NotAvailable | Code::LimitedConnectivity => error,
                // Pods that are there keep their network without the agent.
                _ => CniError {
                    code: Code::NotAvailable,
                    ..error
                },
            })?;
            expect_done(answer).map(|()| None)
        }
    }
}

/// Reads the configuration that a runtime writes to standard input.
pub fn read_config(stdin: impl Read) -> Result<Vec<u8>, CniError> {
    let mut config = Vec::new();
    stdin
        .take(CONFIG_LEN_MAX + 1)
        .read_to_end(&mut config)
        .map_err(|error| {
            CniError::new(Code::Io, "standard input cannot be read").with_details(error)
        })?;
    if config.len() as u64 > CONFIG_LEN_MAX {
        return Err(CniError::new(
            Code::Decode,
            format!("the network configuration is longer than {CONFIG_LEN_MAX} bytes"),
        ));
    }
    Ok(config)
}

fn version(config: &[u8]) -> Result<Value, CniError> {
    let request: Value = serde_json::from_slice(config).map_err(|error| {
        CniError::new(Code::Decode, "the version request cannot be read").with_details(error)
    })?;
    let asked = request
        .get("cniVersion")
        .and_then(Value::as_str)
        .unwrap_or(Version::V1_1_0.name());
    Ok(json!({"cniVersion": asked, "supportedVersions": Version::ALL.map(Version::name)}))
}

fn add(call: &Invocation) -> Result<Value, CniError> {
    let (wish, netns) = wish(call)?;
    match ask(call, &Request::Add(wish), Some(&netns))? {
        Response::Added(mut result) => {
            result.dns = call.conf.dns.clone().unwrap_or_default();
            Ok(result.render(call.conf.version, call.conf.prev_result.as_ref()))
        }
        other => Err(unexpected(&other)),
    }
}

fn check(call: &Invocation) -> Result<(), CniError> {
    let (wish, netns) = wish(call)?;
    expect_done(ask(call, &Request::Check(wish), Some(&netns))?)
}

/// A deletion never fails: a runtime would repeat it forever, and the pod could not go. What the agent cannot do now,
/// it does when it is back.
fn delete(call: &Invocation) {
    let Some(attachment) = call.attachment.clone() else {
        return;
    };
    let problem = match ask(
        call,
        &Request::Del {
            attachment: attachment.clone(),
        },
        None,
    ) {
        Ok(Response::Done) => return,
        Ok(other) => unexpected(&other),
        Err(error) => error,
    };
    eprintln!(
        "keelway-cni: DEL {attachment}: {problem}; left for the agent in {}",
        call.conf.spool.display()
    );
    if let Err(error) = spool::put(&call.conf.spool, &attachment) {
        // The agent also collects attachments whose sandbox is gone, so this costs time, not an address.
        eprintln!(
            "keelway-cni: DEL {attachment}: {}: {error}",
            call.conf.spool.display()
        );
    }
}

/// The wish of an ADD or CHECK, and the open network namespace.
fn wish(call: &Invocation) -> Result<(Wish, File), CniError> {
    let (Some(attachment), Some(path)) = (call.attachment.clone(), call.netns.as_deref()) else {
        return Err(CniError::new(
            Code::InvalidEnvironment,
            "CNI_CONTAINERID, CNI_IFNAME and CNI_NETNS are needed",
        ));
    };
    let netns = open_netns(path)?;
    let addresses = call
        .conf
        .prev_result
        .as_ref()
        .and_then(|result| result.get("ips"))
        .and_then(Value::as_array)
        .map(|ips| {
            ips.iter()
                .filter_map(|ip| ip.get("address")?.as_str().map(str::to_owned))
                .collect()
        })
        .unwrap_or_default();
    let netns_path = path.to_string_lossy().into_owned();
    Ok((
        Wish {
            attachment,
            netns: netns_path,
            args: call.args.clone(),
            addresses,
            network: call.conf.name.clone(),
            capabilities: call.capabilities.clone(),
        },
        netns,
    ))
}

pub(crate) fn open_netns(path: &Path) -> Result<File, CniError> {
    let refuse = |why: &str| {
        CniError::new(
            Code::InvalidEnvironment,
            format!("CNI_NETNS {:?} {why}", path.display().to_string()),
        )
    };
    let file = File::open(path).map_err(|error| refuse("cannot be opened").with_details(error))?;
    let is_namespace = fstatfs(&file).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC);
    if !is_namespace {
        return Err(refuse("is not a namespace"));
    }
    // Wiring the host itself as if it were a pod would take its network away.
    let same =
        |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    if let (Ok(theirs), Ok(ours)) = (file.metadata(), std::fs::metadata("/proc/self/ns/net"))
        && same(theirs, ours)
    {
        return Err(refuse(
            "is the network namespace that this plugin runs in, not a container's",
        ));
    }
    Ok(file)
}

fn ask(call: &Invocation, request: &Request, netns: Option<&File>) -> Result<Response, CniError> {
    match protocol::ask(&call.conf.socket, request, netns.map(AsFd::as_fd), TIMEOUT) {
        Ok(Response::Error(error)) => Err(error),
        Ok(response) => Ok(response),
        Err(
            error
            @ (ExchangeError::Connect { .. } | ExchangeError::NoAnswer | ExchangeError::Io(_)),
        ) => Err(CniError::new(
            Code::TryAgain,
            "the Keelway agent of this node cannot be reached",
        )
        .with_details(error)),
        Err(error @ ExchangeError::Answer(_)) => Err(CniError::new(
            Code::Decode,
            "plugin and agent do not understand each other",
        )
        .with_details(error)),
    }
}

fn expect_done(response: Response) -> Result<(), CniError> {
    match response {
        Response::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> CniError {
    CniError::new(
        Code::Decode,
        "the agent gave an answer that does not belong to the question",
    )
    .with_details(format!("{response:?}"))
}
