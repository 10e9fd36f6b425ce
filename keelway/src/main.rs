use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use keelway::node::init::{self, InitArguments};

#[derive(Debug, Parser)]
#[command(name = "keelway", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(hide = true)]
    NodeInit {
        #[arg(long)]
        spec: PathBuf,
        #[arg(long)]
        parent: Option<u32>,
        #[arg(long)]
        listener: bool,
    },
    #[command(hide = true)]
    NodeExec {
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
}

fn main() -> ExitCode {
    let outcome: anyhow::Result<()> = match Cli::parse().command {
        Command::NodeInit {
            spec,
            parent,
            listener,
        } => init::run(&InitArguments {
            spec,
            parent,
            listener,
        })
        .map_err(Into::into),
        Command::NodeExec { argv } => Err(keelway::node::exec_with_listener(&argv).into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
