//! `keelway-controlplane store ...`: backups of a running cluster, and moving its state from one store to another.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use http_body_util::BodyExt;
use keelway_controlplane::api::BACKUP_PATH;
use keelway_controlplane::store::{Embedded, EmbeddedConfig, Etcd, Snapshot};
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::members::MemberCommand;
use crate::state::{EtcdFlags, STATE_FILE, endpoints, state_file};

/// A restored state goes on so many revisions after its backup: what clients saw in between is not used a second time, and
/// watches from there are told to list again. More than a busy cluster makes in an hour.
const RESTORE_GAP: u64 = 1_000_000;

/// Backups of a cluster's state, and moving it from one store to another.
#[derive(Debug, Parser)]
#[command(name = "store")]
pub struct StoreCli {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Write the state of a running cluster into a file, as it is at one moment.
    Backup {
        /// Credentials of an administrator.
        #[arg(long, value_name = "FILE")]
        kubeconfig: PathBuf,
        /// The backup; it must not be there yet.
        file: PathBuf,
    },
    /// Make a state of a backup. No control plane may run on it yet.
    Restore {
        file: PathBuf,
        /// `embedded:DIR` or `etcd:URL[,URL...]`, with nothing of this cluster in it.
        #[arg(long, value_name = "STORE")]
        to: Place,
        #[command(flatten)]
        etcd: EtcdFlags,
    },
    /// Tell what is in a store that no control plane runs on.
    Show {
        /// `embedded:DIR` or `etcd:URL[,URL...]`.
        #[arg(long, value_name = "STORE")]
        store: Place,
        #[command(flatten)]
        etcd: EtcdFlags,
    },
    /// Look at and change the members of the etcd that keeps the state.
    #[command(subcommand)]
    Member(MemberCommand),
    /// Copy the state from one store to another. No control plane may run on either.
    Migrate {
        /// `embedded:DIR` or `etcd:URL[,URL...]`.
        #[arg(long, value_name = "STORE")]
        from: Place,
        /// The same, with nothing of this cluster in it.
        #[arg(long, value_name = "STORE")]
        to: Place,
        #[command(flatten)]
        etcd: EtcdFlags,
    },
}

/// A store by its name.
#[derive(Clone, Debug)]
pub enum Place {
    Embedded(PathBuf),
    Etcd(Vec<String>),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("embedded", folder)) if !folder.is_empty() => Ok(Self::Embedded(folder.into())),
            Some(("etcd", addresses)) => endpoints(addresses).map(Self::Etcd),
            _ => Err("it is `embedded:` and a folder, or `etcd:` and addresses".to_owned()),
        }
    }
}

impl StoreCli {
    pub async fn run(self) -> Result<()> {
        match self.command {
            StoreCommand::Member(command) => command.run().await,
            StoreCommand::Show { store, etcd } => {
                let snapshot = read(&store, &etcd).await?;
                ensure!(!snapshot.records.is_empty(), "there is no state in it");
                report("it has", &snapshot);
                Ok(())
            }
            StoreCommand::Backup { kubeconfig, file } => backup(&kubeconfig, &file).await,
            StoreCommand::Restore { file, to, etcd } => {
                let opened = File::open(&file);
                let opened = opened.with_context(|| format!("opening {}", file.display()))?;
                let mut snapshot = Snapshot::read(opened)
                    .with_context(|| format!("restoring {}", file.display()))?;
                snapshot.revision.0 += RESTORE_GAP;
                write(&snapshot, &to, &etcd).await?;
                report("restored", &snapshot);
                Ok(())
            }
            StoreCommand::Migrate { from, to, etcd } => {
                let snapshot = read(&from, &etcd).await?;
                write(&snapshot, &to, &etcd).await?;
                report("migrated", &snapshot);
                Ok(())
            }
        }
    }
}

fn report(what: &str, snapshot: &Snapshot) {
    let (count, revision) = (snapshot.records.len(), snapshot.revision);
    println!("{what} {count} records, as of revision {revision}");
}

async fn read(from: &Place, etcd: &EtcdFlags) -> Result<Snapshot> {
    Ok(match from {
        Place::Embedded(folder) => {
            let file = folder.join(STATE_FILE);
            ensure!(file.is_file(), "there is no state in {}", folder.display());
            Snapshot::of(&Embedded::open(&EmbeddedConfig::at(file))?).await?
        }
        Place::Etcd(endpoints) => {
            Snapshot::of(&Etcd::connect(&etcd.config(endpoints)).await?).await?
        }
    })
}

async fn write(snapshot: &Snapshot, to: &Place, etcd: &EtcdFlags) -> Result<()> {
    match to {
        Place::Embedded(folder) => Embedded::import(&state_file(folder)?, snapshot)?,
        Place::Etcd(endpoints) => Etcd::import(&etcd.config(endpoints), snapshot).await?,
    }
    Ok(())
}

/// The file appears under its name when it is whole and on disk.
async fn backup(kubeconfig: &Path, file: &Path) -> Result<()> {
    ensure!(!file.exists(), "{} is there already", file.display());
    let read = Kubeconfig::read_from(kubeconfig);
    let read = read.with_context(|| format!("reading {}", kubeconfig.display()))?;
    let config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
    let client = kube::Client::try_from(config)?;
    let request = http::Request::get(BACKUP_PATH).body(kube::client::Body::empty())?;
    let answer = client
        .send(request)
        .await
        .context("asking the API server")?;
    let (head, mut body) = answer.into_parts();
    if !head.status.is_success() {
        let said = body.collect().await?.to_bytes();
        let said = String::from_utf8_lossy(&said).into_owned();
        bail!("the API server answered {}: {said}", head.status);
    }
    let mut partial = file.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    // What an attempt has left goes; what another one makes at this moment, or a link to elsewhere, is not written to.
    drop(std::fs::remove_file(&partial));
    let mut out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)
        .with_context(|| format!("writing {}", partial.display()))?;
    while let Some(frame) = body.frame().await {
        if let Ok(chunk) = frame.context("reading the backup")?.into_data() {
            out.write_all(&chunk)?;
        }
    }
    out.sync_all()?;
    // What arrived may have been cut off.
    let snapshot = Snapshot::read(File::open(&partial)?).context("checking the backup")?;
    std::fs::rename(&partial, file)?;
    report("backed up", &snapshot);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named_in_one_word() {
        for good in ["embedded:/var/lib/k", "etcd:https://a:2379,http://b:2379"] {
            assert!(good.parse::<Place>().is_ok(), "{good}");
        }
        for wrong in [
            "",
            "embedded",
            "embedded:",
            "etcd:",
            "etcd:a:2379",
            "redis:x",
        ] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }
}
