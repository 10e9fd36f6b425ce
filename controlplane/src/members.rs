//! `keelway-controlplane store member ...`: the members of the etcd that keeps the state.

use std::io::Write;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use keelway_controlplane::store::{EtcdMember, EtcdMembership};

use crate::maintenance::Place;
use crate::state::EtcdFlags;

#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// Show the members.
    List {
        #[command(flatten)]
        etcd: Reached,
        #[command(flatten)]
        shown: Shown,
    },
    /// Take in a member that is about to start, without a vote. One that was at its address goes, if it never started or had its name.
    Add {
        /// Where others will reach it: `https://10.0.0.2:2380`.
        #[arg(value_name = "PEER-URL")]
        peer: String,
        /// What it calls itself.
        #[arg(long, value_name = "NAME", default_value = "")]
        name: String,
        #[command(flatten)]
        etcd: Reached,
        #[command(flatten)]
        shown: Shown,
    },
    /// Give a member a vote, once it has caught up.
    Promote {
        #[arg(value_name = "PEER-URL")]
        peer: String,
        #[command(flatten)]
        etcd: Reached,
    },
    /// Take a member out.
    Remove {
        #[arg(value_name = "PEER-URL")]
        peer: String,
        #[command(flatten)]
        etcd: Reached,
    },
}

/// How etcd is reached.
#[derive(Debug, Args)]
pub struct Reached {
    /// `etcd:URL[,URL...]`, of any members that live.
    #[arg(long, value_name = "STORE")]
    store: Place,
    #[command(flatten)]
    etcd: EtcdFlags,
}

#[derive(Debug, Args)]
pub struct Shown {
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Reached {
    async fn membership(&self) -> Result<EtcdMembership> {
        let Place::Etcd(endpoints) = &self.store else {
            bail!("the embedded store has no members");
        };
        Ok(EtcdMembership::connect(&self.etcd.config(endpoints)).await?)
    }
}

impl MemberCommand {
    pub async fn run(self) -> Result<()> {
        match self {
            Self::List { etcd, shown } => show(&etcd.membership().await?.list().await?, &shown),
            Self::Add {
                peer,
                name,
                etcd,
                shown,
            } => show(&etcd.membership().await?.add(&peer, &name).await?, &shown),
            Self::Promote { peer, etcd } => Ok(etcd.membership().await?.promote(&peer).await?),
            Self::Remove { peer, etcd } => Ok(etcd.membership().await?.remove(&peer).await?),
        }
    }
}

fn show(members: &[EtcdMember], shown: &Shown) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if shown.output == Output::Json {
        serde_json::to_writer_pretty(&mut out, members)?;
        return Ok(writeln!(out)?);
    }
    writeln!(out, "{:<17} {:<20} {:<8} PEERS", "ID", "NAME", "VOTES")?;
    for member in members {
        let votes = if member.is_learner { "no" } else { "yes" };
        let peers = member.peer_urls.join(",");
        writeln!(
            out,
            "{:<17} {:<20} {votes:<8} {peers}",
            member.id, member.name
        )?;
    }
    Ok(())
}
