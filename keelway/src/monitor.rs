//! `keelway monitor`: what happens to packets on every node of a cluster.
//!
//! Each node's agent is asked by its own command, through the socket that the node's PID 1 sees; this puts the node's name before what it says.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::state::ClusterDir;

/// Where an agent listens, in its node's own file system.
const AGENT_SOCKET: &str = "run/keelway/agent.sock";
/// Lines that may wait for a slow terminal.
const LINES_MAX: usize = 1024;

/// A line of one node's agent.
struct Said {
    node: usize,
    line: String,
}

/// Prints what the agents of all nodes say, until all have ended. `arguments` are those of `keelway-agent monitor`.
pub async fn run(dir: &ClusterDir, name: &str, arguments: &[String]) -> anyhow::Result<()> {
    let state = dir
        .read()
        .with_context(|| format!("cluster {name} is not up"))?;
    let agent = agent()?;
    let json = wants_json(arguments);
    let (sender, mut said) = mpsc::channel(LINES_MAX);
    let (mut names, mut agents) = (Vec::new(), Vec::new());
    for node in state.nodes.iter().filter(|node| !node.control_plane) {
        let Some(init) = node.init.filter(|init| init.is_alive()) else {
            eprintln!("node {} does not run", node.name);
            continue;
        };
        let mut child = Command::new(&agent)
            .arg("monitor")
            .args(arguments)
            .arg("--socket")
            .arg(format!("/proc/{}/root/{AGENT_SOCKET}", init.pid))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| agent.display().to_string())?;
        let lines = child.stdout.take().context("its output")?;
        let (node_index, sender) = (names.len(), sender.clone());
        tokio::spawn(async move {
            let mut lines = BufReader::new(lines).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let node = node_index;
                if sender.send(Said { node, line }).await.is_err() {
                    return;
                }
            }
        });
        names.push(node.name.clone());
        agents.push(child);
    }
    drop(sender);
    if agents.is_empty() {
        bail!("no node of cluster {name} runs");
    }
    let width = names.iter().map(String::len).max().unwrap_or_default();
    while let Some(Said { node, line }) = said.recv().await {
        println!("{}", labelled(&names[node], width, &line, json));
    }
    ended(&names, agents).await
}

/// The agent of the same build lies beside this program.
fn agent() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let agent = program.with_file_name("keelway-agent");
    if !agent.is_file() {
        bail!(
            "{} is missing: it is built and installed with this program",
            agent.display()
        );
    }
    Ok(agent)
}

fn wants_json(arguments: &[String]) -> bool {
    let output =
        |pair: &[String]| matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == "json";
    let joined = |argument: &String| matches!(argument.as_str(), "-ojson" | "--output=json");
    arguments.windows(2).any(output) || arguments.iter().any(joined)
}

fn labelled(node: &str, width: usize, line: &str, json: bool) -> String {
    match serde_json::from_str(line) {
        Ok(Value::Object(event)) if json => {
            let mut all = serde_json::Map::new();
            all.insert("node".into(), node.into());
            all.extend(event);
            Value::Object(all).to_string()
        }
        _ => format!("{node:<width$}  {line}"),
    }
}

/// Fails when an agent's command did: it has said why.
async fn ended(names: &[String], agents: Vec<Child>) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (name, mut agent) in names.iter().zip(agents) {
        if !agent.wait().await?.success() {
            failed.push(name.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("the monitor ended on {}", failed.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn lines_have_their_nodes_name() {
        assert_eq!(labelled("n1", 4, "a line", false), "n1    a line");
        let json = labelled("n1", 4, r#"{"class":"drop"}"#, true);
        assert_eq!(json, r#"{"node":"n1","class":"drop"}"#);
    }

    #[test]
    fn json_is_asked_for_in_every_spelling() {
        for (arguments, json) in [
            ("--drops -o json", true),
            ("--output=json", true),
            ("-ojson", true),
            ("-o text", false),
            ("--pod json", false),
        ] {
            assert_eq!(wants_json(&words(arguments)), json, "{arguments}");
        }
    }
}
