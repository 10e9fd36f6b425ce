//! The plugin by its second name, `loopback`: containerd calls a plugin of this name before any other one, and some
//! machines have none. It brings `lo` up in a container, and needs no agent.

use std::path::Path;

use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::invocation::command;
use crate::plugin::open_netns;
use crate::{CniError, Code, Command, Environment, sys};

/// The file name under which a runtime calls this plugin.
pub const NAME: &str = "loopback";
/// Every version has the same configuration here; older ones write addresses in another way.
const VERSIONS: [&str; 6] = ["0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Does what the environment and the configuration ask for, and returns what goes to standard output, if anything.
/// An ADD moves the calling thread into the container's network namespace.
pub fn run(env: &Environment, config: &[u8]) -> Result<Option<Value>, CniError> {
    let command = command(env)?;
    let config: Value = serde_json::from_slice(config).map_err(|error| {
        CniError::new(Code::Decode, "the network configuration cannot be read").with_details(error)
    })?;
    let version = config
        .get("cniVersion")
        .and_then(Value::as_str)
        .unwrap_or("0.2.0");
    match command {
        Command::Version => Ok(Some(
            json!({"cniVersion": version, "supportedVersions": VERSIONS}),
        )),
        Command::Add => {
            let path = env.netns.as_deref().ok_or_else(|| {
                CniError::new(
                    Code::InvalidEnvironment,
                    "CNI_NETNS is not set, and ADD needs it",
                )
            })?;
            let netns = open_netns(Path::new(path))?;
            let failed = |what: &str, error: nix::Error| {
                CniError::new(Code::Io, format!("cannot {what}")).with_details(error)
            };
            setns(netns, CloneFlags::CLONE_NEWNET)
                .map_err(|error| failed("enter the network namespace", error))?;
            sys::loopback_up().map_err(|error| failed("bring lo up", error))?;
            Ok(Some(
                config
                    .get("prevResult")
                    .cloned()
                    .unwrap_or_else(|| result(version, path)),
            ))
        }
        // The interface goes with its namespace.
        Command::Del | Command::Check | Command::Gc | Command::Status => Ok(None),
    }
}

fn result(version: &str, netns: &str) -> Value {
    let mut ip = json!({"interface": 0, "address": "127.0.0.1/8"});
    if version.starts_with("0.") {
        ip["version"] = "4".into();
    }
    json!({
        "cniVersion": version,
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": netns}],
        "ips": [ip],
        "dns": {},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(command: &str, netns: Option<&str>, stdin: &str) -> Result<Option<Value>, CniError> {
        let env = Environment {
            command: Some(command.into()),
            container_id: Some("c".into()),
            netns: netns.map(String::from),
            ifname: Some("lo".into()),
            args: None,
        };
        run(&env, stdin.as_bytes())
    }

    fn reach_self() -> std::io::Result<()> {
        std::net::UdpSocket::bind("0.0.0.0:0")?.connect("127.0.0.1:9")
    }

    const CONF: &str = r#"{"cniVersion":"0.3.1","name":"cni-loopback","type":"loopback"}"#;

    #[test]
    fn lo_is_up_in_a_container_after_an_add() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        // A namespace that nothing but this thread holds: it goes with the thread.
        std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
            let netns = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
            reach_self().expect_err("lo is down at first");
            let handle = std::fs::File::open(&netns).expect("open");
            let path = format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                std::os::fd::AsRawFd::as_raw_fd(&handle)
            );
            let answer = std::thread::spawn(move || call("ADD", Some(&path), CONF))
                .join()
                .expect("no panic");
            let result = answer.expect("added").expect("a result");
            assert_eq!(result["ips"][0]["address"], "127.0.0.1/8");
            reach_self().expect("lo carries packets");
        })
        .join()
        .expect("no panic");
    }

    #[test]
    fn wrong_calls_are_refused() {
        for (command, netns, stdin, code) in [
            ("ADD", None, CONF, 4),
            ("ADD", Some("/proc/1/ns/nothing"), CONF, 4),
            ("ADD", Some("/dev/null"), CONF, 4),
            ("ADD", Some("/proc/self/ns/net"), "{", 6),
            ("FROB", None, CONF, 4),
        ] {
            let error = call(command, netns, stdin).expect_err(command);
            assert_eq!(
                serde_json::to_value(&error).expect("JSON")["code"],
                code,
                "{command} {netns:?}: {error}"
            );
        }
        assert_eq!(call("DEL", None, CONF).expect("a deletion succeeds"), None);
    }
}
