//! `keelway-controlplane certs ...`: the certificates of a control plane, listed and renewed.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use jiff::Timestamp;
use keelway_controlplane::pki;

/// The certificates of a control plane.
#[derive(Debug, Parser)]
#[command(name = "certs")]
pub struct CertsCli {
    #[command(subcommand)]
    command: CertsCommand,
    /// Where certificates and keys are.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/etc/keelway"
    )]
    pki_dir: PathBuf,
    /// More files with a certificate: an administrator's, for one.
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Vec<PathBuf>,
    /// Certificates of others, to be listed too (PEM).
    #[arg(long, global = true, value_name = "FILE")]
    pem: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// List them, with when each expires.
    List,
    /// Sign them anew, for a year. The authority stays. What runs takes them up by itself.
    Renew {
        /// Names as `list` has them; all when none is given.
        names: Vec<String>,
    },
}

impl CertsCli {
    pub fn run(self) -> Result<()> {
        pki::finish(&self.pki_dir);
        match self.command {
            CertsCommand::List => self.list(),
            CertsCommand::Renew { names } => {
                let now = Timestamp::now();
                for name in pki::renew(&self.pki_dir, &self.kubeconfig, &names, now)? {
                    println!("{name} is renewed.");
                }
                Ok(())
            }
        }
    }

    fn list(&self) -> Result<()> {
        let now = Timestamp::now();
        let mut all: Vec<(String, pki::Leaf)> = Vec::new();
        if self.pki_dir.join("ca.crt").exists() {
            let known = pki::known(&self.pki_dir, &self.kubeconfig)?;
            all.extend(known.into_iter().map(|known| (known.name, known.leaf)));
        }
        for path in &self.pem {
            let text = std::fs::read(path).with_context(|| path.display().to_string())?;
            let leaf = pki::Leaf::of_pem(&text);
            let leaf = leaf.map_err(|reason| anyhow::anyhow!("{}: {reason}", path.display()))?;
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            all.push((name.into_owned(), leaf));
        }
        println!(
            "{:<26} {:<22} {:>5}  SUBJECT",
            "CERTIFICATE", "EXPIRES", "DAYS"
        );
        for (name, leaf) in all {
            let left_days = (leaf.life.until_s - now.as_second()).div_euclid(86_400);
            let at = Timestamp::from_second(leaf.life.until_s)?;
            println!("{name:<26} {at:<22} {left_days:>5}  {}", leaf.subject());
        }
        Ok(())
    }
}
