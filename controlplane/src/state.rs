//! Where the state of the cluster is kept: the flags, and the store that they name.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use keelway_controlplane::store::{
    Embedded, EmbeddedConfig, Etcd, EtcdConfig, Keys, Sealed, Store,
};

/// The embedded store's file, in the data directory.
pub const STATE_FILE: &str = "state.redb";

#[derive(Debug, Args)]
pub struct StateFlags {
    /// Where the state of the cluster is kept, when it is kept by this process.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// What keeps the state: `embedded`, in the data directory, or `etcd:URL[,URL...]`.
    #[arg(long, value_name = "STORE", default_value = "embedded")]
    store: Keeper,
    #[command(flatten)]
    etcd: EtcdFlags,
    /// Which resources are kept sealed, and the keys to that: an EncryptionConfiguration.
    #[arg(long, value_name = "FILE")]
    encryption_provider_config: Option<PathBuf>,
}

/// How to be let into etcd.
#[derive(Debug, Args)]
pub struct EtcdFlags {
    /// The authority that signs etcd's certificates.
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,
    /// The client certificate that is shown to etcd.
    #[arg(long, value_name = "FILE", requires = "etcd_keyfile")]
    etcd_certfile: Option<PathBuf>,
    /// The key of that certificate.
    #[arg(long, value_name = "FILE", requires = "etcd_certfile")]
    etcd_keyfile: Option<PathBuf>,
    /// What this cluster's keys begin with, where several share an etcd.
    #[arg(long, value_name = "PATH", default_value = "/keelway")]
    etcd_prefix: String,
    /// Ask those members of etcd too that it has beside the ones named, as they say where they are, and remember them here.
    #[arg(long, value_name = "FILE")]
    etcd_members_file: Option<PathBuf>,
}

impl EtcdFlags {
    pub fn config(&self, endpoints: &[String]) -> EtcdConfig {
        EtcdConfig {
            endpoints: endpoints.to_vec(),
            ca_file: self.etcd_cafile.clone(),
            identity_files: self.etcd_certfile.clone().zip(self.etcd_keyfile.clone()),
            prefix: self.etcd_prefix.clone(),
            members_file: self.etcd_members_file.clone(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Keeper {
    Embedded,
    Etcd(Vec<String>),
}

impl FromStr for Keeper {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        let addresses = text
            .strip_prefix("etcd:")
            .ok_or("it is `embedded`, or `etcd:` and addresses")?;
        endpoints(addresses).map(Self::Etcd)
    }
}

impl StateFlags {
    /// Opens the store, or connects to it.
    pub async fn open(&self) -> Result<Arc<dyn Store>> {
        let kept = self.open_kept().await?;
        let Some(file) = &self.encryption_provider_config else {
            return Ok(kept);
        };
        let sealed = Arc::new(Sealed::new(kept, Keys::read(file)?));
        let renewing = sealed.clone();
        tokio::spawn(async move {
            match renewing.renew().await {
                Ok(0) => {}
                Ok(count) => tracing::info!(count, "values were sealed with the first key"),
                Err(error) => {
                    tracing::error!(%error, "not everything is sealed with the first key")
                }
            }
        });
        Ok(sealed)
    }

    async fn open_kept(&self) -> Result<Arc<dyn Store>> {
        match &self.store {
            Keeper::Embedded => self.open_embedded().await,
            Keeper::Etcd(endpoints) => {
                let config = self.etcd.config(endpoints);
                Ok(Arc::new(Etcd::connect(&config).await?))
            }
        }
    }

    async fn open_embedded(&self) -> Result<Arc<dyn Store>> {
        let folder = self
            .data_dir
            .as_ref()
            .context("--store embedded keeps the state in a folder: name it by --data-dir")?;
        let config = EmbeddedConfig::at(state_file(folder)?);
        let store = tokio::task::spawn_blocking(move || Embedded::open(&config)).await??;
        Ok(Arc::new(store))
    }
}

/// The file of the embedded store in a data directory, which is made when it is not there.
pub fn state_file(folder: &Path) -> Result<PathBuf> {
    // It holds Secrets: nobody else's to read.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("creating the data directory {}", folder.display()))?;
    Ok(folder.join(STATE_FILE))
}

/// Reads the addresses of etcd after `etcd:`.
pub fn endpoints(text: &str) -> Result<Vec<String>, String> {
    let endpoints: Vec<String> = text.split(',').map(str::to_owned).collect();
    for endpoint in &endpoints {
        let host = endpoint
            .strip_prefix("https://")
            .or_else(|| endpoint.strip_prefix("http://"));
        if host.is_none_or(str::is_empty) {
            return Err(format!(
                "{endpoint:?} is no address of etcd, as https://10.0.0.1:2379 is"
            ));
        }
    }
    Ok(endpoints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_named_in_one_word() {
        assert_eq!("embedded".parse(), Ok(Keeper::Embedded));
        let two = vec!["https://a:2379".to_owned(), "https://b:2379".to_owned()];
        assert_eq!(
            "etcd:https://a:2379,https://b:2379".parse(),
            Ok(Keeper::Etcd(two))
        );
        for wrong in [
            "",
            "redis:http://a",
            "etcd:",
            "etcd:a:2379",
            "etcd:http://a,",
        ] {
            assert!(wrong.parse::<Keeper>().is_err(), "{wrong}");
        }
    }
}
