//! `keelway token create | list | delete`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::{GROUP, Token, create, delete, list};
use crate::machine::MachineDir;
use crate::machine::discovery::CaHash;
use crate::machine::share::Shared;
use crate::state::StateDir;

#[derive(Debug, clap::Subcommand)]
pub enum TokenCommand {
    /// Make a token, and print the command that joins with it
    Create {
        /// How long it is good, as 24h, 30m or 90s; 0 for ever
        #[arg(long, default_value = "24h", value_parser = life)]
        ttl: Duration,
        /// What it is for
        #[arg(long, default_value = "")]
        description: String,
        /// Print the token alone
        #[arg(long, conflicts_with = "control_plane")]
        quiet: bool,
        /// Let a machine join as a control plane, within two hours: the cluster's keys are kept for it, sealed by a key that is printed
        #[arg(long)]
        control_plane: bool,
        #[command(flatten)]
        access: Access,
    },
    /// List the tokens that there are, by their ids
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Make a token good for nothing
    Delete {
        /// Its id (the part before the dot), or all of it
        #[arg(required = true)]
        token: Vec<String>,
        #[command(flatten)]
        access: Access,
    },
}

/// As whom the cluster is asked.
#[derive(Debug, Clone, clap::Args)]
pub struct Access {
    /// Credentials [default: the administrator's, on a control plane; else $KUBECONFIG, ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl Access {
    async fn config(&self, state: &StateDir) -> anyhow::Result<Config> {
        let own = MachineDir::of(state).kubeconfig();
        let file = self.kubeconfig.clone().or(own.is_file().then_some(own));
        let kubeconfig = match &file {
            Some(path) => Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read {}", path.display()))?,
            None => {
                Kubeconfig::read().context("cannot read a kubeconfig; --kubeconfig names one")?
            }
        };
        let mut config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        config.proxy_url = None;
        Ok(config)
    }
}

/// A number with h, m or s.
fn life(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time like 24h, 30m or 90s");
    let (number, unit_s) = match text.char_indices().last() {
        Some((at, 'h')) => (&text[..at], 3600),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 's')) => (&text[..at], 1),
        _ if text == "0" => (text, 1),
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = number.checked_mul(unit_s).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

/// # Errors
/// What the cluster says.
pub async fn run(command: &TokenCommand, state: &StateDir) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create {
            ttl,
            description,
            quiet,
            control_plane,
            access,
        } => {
            let config = access.config(state).await?;
            let token = Token::new()?;
            let joins = join_command(&config, &token);
            let life = (!ttl.is_zero()).then_some(*ttl);
            let client = Client::try_from(config)?;
            if *control_plane {
                let shared = Shared::of(&MachineDir::of(state))?;
                let key = shared.offer(client, &token, description).await?;
                // By the shell's own word, so that no program has the key as an argument.
                println!(
                    "echo {key} | {} --control-plane --certificate-key -",
                    joins?
                );
                return Ok(());
            }
            create(client, &token, life, (description, &[GROUP])).await?;
            match joins {
                Ok(joins) if !quiet => println!("{joins}"),
                _ => println!("{}", token.shown()),
            }
        }
        TokenCommand::List { access } => {
            let client = Client::try_from(access.config(state).await?)?;
            println!("{:<8} {:<22} DESCRIPTION", "ID", "EXPIRES");
            for token in list(client).await? {
                let expires = token.expires.as_deref().unwrap_or("never");
                println!("{:<8} {expires:<22} {}", token.id, token.description);
            }
        }
        TokenCommand::Delete { token, access } => {
            let client = Client::try_from(access.config(state).await?)?;
            for named in token {
                let id = delete(client.clone(), named).await?;
                println!("Token {id} is deleted.");
            }
        }
    }
    Ok(())
}

/// The command that joins by the server and the authority of a kubeconfig.
fn join_command(config: &Config, token: &Token) -> anyhow::Result<String> {
    let uri = &config.cluster_url;
    let host = uri.host().context("the kubeconfig names no server")?;
    let port = uri.port_u16().unwrap_or(443);
    let at = match format!("{host}:{port}").parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => {
            bail!("the kubeconfig's server is on this machine's loopback")
        }
        Ok(address) => address.to_string(),
        Err(_) => format!("{host}:{port}"),
    };
    let ca = config.root_cert.iter().flatten().next();
    let hash = CaHash::of_der(ca.context("the kubeconfig names no authority")?)?;
    Ok(format!(
        "keelway join {at} --token {} --ca-hash {hash}",
        token.shown()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_numbers_with_a_unit() {
        for (text, seconds) in [("24h", 86_400), ("30m", 1800), ("90s", 90), ("0", 0)] {
            assert_eq!(life(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in [
            "",
            "24",
            "h",
            "-1h",
            "1d",
            "99999999999999999999h",
            "1\u{fffd}",
        ] {
            assert!(life(bad).is_err(), "{bad}");
        }
    }
}
