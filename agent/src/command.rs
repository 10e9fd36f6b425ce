//! The commands that look into a running agent.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use ipnetwork::IpNetwork;
use keelway_agent::inspect::client::{self, ClientError};
use keelway_agent::inspect::table::{Screen, Table, Tone};
use keelway_agent::inspect::{FlowFilter, FlowItem, Query, ServiceItem, conntrack, text};
use keelway_agent::monitor::MonitorFilter;
use keelway_agent::report::Report;
use keelway_agent::routing;
use keelway_cni::protocol::{self, Request, Response};
use serde_json::Value;

/// How long the agent may be silent in the middle of an answer: longer than it takes to replace its worker.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Subcommand)]
pub enum Look {
    /// Say how the agent of this node is; fails when it is not ready
    Status {
        #[command(flatten)]
        common: Common,
    },
    /// Say how the pods of other nodes are reached, and how long round trips take
    Routes {
        #[command(flatten)]
        common: Common,
    },
    /// Services as this node serves them
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Flows that are translated per packet (sockets that were translated at connect have none)
    #[command(subcommand, visible_alias = "ct")]
    Conntrack(ConntrackCommand),
    /// Watch drops, rejects and new flows as they happen; with --output json, a line of JSON for each
    Monitor(MonitorFlags),
}

#[derive(Args)]
pub struct MonitorFlags {
    /// Only drops and rejects
    #[arg(long, conflicts_with = "sample")]
    drops: bool,
    /// Show one in N new flows, N a power of two
    #[arg(long, value_name = "N", default_value_t = 1)]
    sample: u32,
    /// Only what this pod [NAMESPACE/]NAME sends or is sent
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    /// Only what asks this Service [NAMESPACE/]NAME
    #[arg(long, short, value_name = "SERVICE")]
    service: Option<String>,
    /// Only this reason; may be given more than once
    #[arg(long, short, value_name = "REASON")]
    reason: Vec<String>,
    /// End after so many events
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
pub struct Common {
    /// Unix socket of the agent
    #[arg(long, value_name = "PATH", default_value = keelway_cni::AGENT_SOCKET)]
    socket: PathBuf,
    /// Text for people, or JSON for programs
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Subcommand)]
pub enum ServiceCommand {
    /// List Services with their addresses, ports and backends
    #[command(visible_alias = "ls")]
    List {
        /// Only Services of this namespace
        #[arg(long, short)]
        namespace: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Show one Service: frontends, ids, backends, endpoints that are not used and why, and what was refused
    Show {
        /// NAMESPACE/NAME, or NAME with --namespace
        name: String,
        #[arg(long, short, default_value = "default")]
        namespace: String,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Subcommand)]
pub enum ConntrackCommand {
    /// List flows
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        common: Common,
    },
    /// Remove flows: a connection that goes on is reset by its next packet, datagrams choose a backend anew
    Flush {
        #[command(flatten)]
        filter: Filter,
        /// Remove every flow
        #[arg(long, conflicts_with_all = ["service", "pod", "address", "protocol"])]
        all: bool,
        #[command(flatten)]
        common: Common,
    },
}

/// Which flows; of several conditions all must hold.
#[derive(Args)]
pub struct Filter {
    /// Flows to this Service [NAMESPACE/]NAME
    #[arg(long, short, value_name = "SERVICE")]
    service: Option<String>,
    /// Flows from or to this pod [NAMESPACE/]NAME
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    /// Flows whose client, frontend or backend has this address, or is in this range
    #[arg(long, short, value_name = "IP[/PREFIX]")]
    address: Option<IpNetwork>,
    /// Flows of this protocol: tcp, udp or sctp
    #[arg(long = "proto", short, value_name = "PROTOCOL")]
    protocol: Option<String>,
}

impl From<Filter> for FlowFilter {
    fn from(filter: Filter) -> Self {
        FlowFilter {
            service: filter.service.map(qualified),
            pod: filter.pod.map(qualified),
            address: filter.address,
            protocol: filter.protocol,
        }
    }
}

/// A name alone is of the namespace `default`, as with kubectl.
fn qualified(name: String) -> String {
    if name.contains('/') {
        name
    } else {
        format!("default/{name}")
    }
}

pub fn run(look: Look) -> anyhow::Result<ExitCode> {
    let outcome = match look {
        Look::Status { common } => return status(&common.socket, common.output),
        Look::Routes { common } => return routes(&common),
        Look::Service(ServiceCommand::List { namespace, common }) => {
            list_services(&common, namespace)
        }
        Look::Service(ServiceCommand::Show {
            name,
            namespace,
            common,
        }) => {
            let name = match name.contains('/') {
                true => name,
                false => format!("{namespace}/{name}"),
            };
            show_service(&common, &name)
        }
        Look::Conntrack(ConntrackCommand::List { filter, common }) => {
            let filter = filter.into();
            flows(&common, &Query::Flows { filter }, "no flow")
        }
        Look::Conntrack(ConntrackCommand::Flush {
            filter,
            all,
            common,
        }) => {
            let filter = FlowFilter::from(filter);
            if filter.is_empty() && !all {
                bail!(
                    "say which flows: --service, --pod, --address or --proto, or --all for every one"
                );
            }
            flows(&common, &Query::FlushFlows { filter }, "no flow to remove")
        }
        Look::Monitor(flags) => monitor(flags),
    };
    match outcome {
        // Whoever reads has seen enough.
        Err(error)
            if error
                .downcast_ref()
                .is_some_and(ClientError::is_closed_pipe) =>
        {
            Ok(ExitCode::SUCCESS)
        }
        other => other.map(|()| ExitCode::SUCCESS),
    }
}

fn routes(common: &Common) -> anyhow::Result<ExitCode> {
    let response = protocol::ask(&common.socket, &Request::Report, None, PATIENCE)?;
    let value = match response {
        Response::Report(value) => value,
        Response::Error(error) => bail!("{error}"),
        other => bail!("the agent gave an answer that does not belong to the question: {other:?}"),
    };
    let report: Report =
        serde_json::from_value(value).context("the agent's report cannot be read")?;
    match common.output {
        Output::Text => put(&routing::table(&report.paths))?,
        Output::Json => put(&format!("{:#}\n", serde_json::to_value(&report.paths)?))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints; that nobody reads on is no error.
fn put(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn list_services(common: &Common, namespace: Option<String>) -> anyhow::Result<()> {
    let query = Query::Services { namespace };
    let mut table = Table::new(text::SERVICE_HEADINGS);
    list(common, &query, |screen, item: ServiceItem| {
        table.row(screen, text::service_row(&item))
    })?;
    finish(common, table, "no Service")
}

fn show_service(common: &Common, name: &str) -> anyhow::Result<()> {
    let key = conntrack::key(name)?;
    let query = Query::Service {
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
    };
    let mut found = None;
    client::ask(&common.socket, &query, Some(PATIENCE), |item| {
        found = Some(item);
        Ok(())
    })?;
    let found = found.context("the agent did not show the Service")?;
    match common.output {
        Output::Json => writeln!(io::stdout(), "{found:#}").map_err(ClientError::Output)?,
        Output::Text => {
            let item: ServiceItem = serde_json::from_value(found).map_err(ClientError::from)?;
            text::service(&mut Screen::stdout(), &item).map_err(ClientError::Output)?;
        }
    }
    Ok(())
}

fn flows(common: &Common, query: &Query, none: &str) -> anyhow::Result<()> {
    let mut table = Table::new(text::FLOW_HEADINGS);
    list(common, query, |screen, item: FlowItem| {
        table.row(screen, text::flow_row(&item))
    })?;
    finish(common, table, none)
}

/// Prints items as they come: by `row`, or as a JSON array.
fn list<T: serde::de::DeserializeOwned>(
    common: &Common,
    query: &Query,
    mut row: impl FnMut(&mut Screen<io::BufWriter<io::Stdout>>, T) -> io::Result<()>,
) -> anyhow::Result<()> {
    let mut screen = Screen::stdout();
    let json = common.output == Output::Json;
    let mut separator = "[\n";
    let shown = client::ask(&common.socket, query, Some(PATIENCE), |item: Value| {
        if json {
            let text = format!("{separator}{item}");
            separator = ",\n";
            screen.write(&text, Tone::Plain)
        } else {
            row(&mut screen, serde_json::from_value(item)?)
        }
    });
    if json && shown.is_ok() {
        let end = if separator == "[\n" { "[]\n" } else { "\n]\n" };
        screen
            .write(end, Tone::Plain)
            .map_err(ClientError::Output)?;
    }
    screen.flush().map_err(ClientError::Output)?;
    Ok(shown?)
}

fn finish<const N: usize>(common: &Common, table: Table<N>, none: &str) -> anyhow::Result<()> {
    let rows = table
        .finish(&mut Screen::stdout())
        .map_err(ClientError::Output)?;
    if rows == 0 && common.output == Output::Text {
        eprintln!("{none}");
    }
    Ok(())
}

fn monitor(flags: MonitorFlags) -> anyhow::Result<()> {
    if !flags.sample.is_power_of_two() {
        bail!(
            "--sample {}: not a power of two (1, 2, 4, ...)",
            flags.sample
        );
    }
    let filter = MonitorFilter {
        flows: (!flags.drops).then(|| flags.sample.trailing_zeros()),
        pod: flags.pod.map(qualified),
        service: flags.service.map(qualified),
        reasons: flags.reason,
    };
    let mut screen = Screen::stdout();
    let mut left = flags.count.unwrap_or(u64::MAX);
    let json = flags.common.output == Output::Json;
    let query = Query::Monitor { filter };
    let heard = client::ask(
        &flags.common.socket,
        &query,
        Some(PATIENCE),
        |item: Value| {
            if json {
                screen.line(&item.to_string(), Tone::Plain)?;
                screen.flush()?;
            } else {
                text::event(&mut screen, &serde_json::from_value(item)?)?;
            }
            left -= 1;
            match left {
                0 => Err(io::ErrorKind::Interrupted.into()),
                _ => Ok(()),
            }
        },
    );
    match heard {
        // As many as were asked for.
        Err(ClientError::Output(_)) if left == 0 => Ok(()),
        other => Ok(other?),
    }
}

fn status(socket: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let value = match protocol::ask(socket, &Request::Report, None, Duration::from_secs(10))? {
        Response::Report(value) => value,
        Response::Error(error) => bail!("{error}"),
        other => bail!("the agent gave an answer that does not belong to the question: {other:?}"),
    };
    let report: Report =
        serde_json::from_value(value.clone()).context("the agent's report cannot be read")?;
    match output {
        Output::Text => put(&report.to_string())?,
        Output::Json => put(&format!("{value:#}\n"))?,
    }
    Ok(if report.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
