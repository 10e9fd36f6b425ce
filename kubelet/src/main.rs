//! keelway-kubelet: runs the pods of one node.

use std::io::IsTerminal;

use clap::Parser;
use keelway_kubelet::config::{Config, Flags};
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    // The client reports each refused connection as an error of its own, beside the one that its caller reports.
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,kube_client=off"));
    let terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(terminal)
        .with_writer(std::io::stderr)
        .init();
    let config = Config::try_from(Flags::parse())?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(keelway_kubelet::run::run(config))
}
