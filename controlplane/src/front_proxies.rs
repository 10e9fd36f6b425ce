//! The flags of proxies in front of the API server, by the names that they have in Kubernetes.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use keelway_controlplane::api::FrontProxyConfig;

#[derive(Debug, clap::Args)]
pub struct FrontProxyFlags {
    /// The authority of proxies that say by headers whom they speak for. It is to sign nobody else's certificates
    #[arg(long, value_name = "FILE")]
    requestheader_client_ca_file: Option<PathBuf>,
    /// Common names of proxies that are believed [default: every one of that authority]
    #[arg(
        long,
        value_name = "NAME[,NAME]",
        value_delimiter = ',',
        requires = "requestheader_client_ca_file"
    )]
    requestheader_allowed_names: Vec<String>,
    /// Headers with the user; the first one that is there counts
    #[arg(
        long,
        value_name = "HEADER[,HEADER]",
        value_delimiter = ',',
        default_value = "X-Remote-User"
    )]
    requestheader_username_headers: Vec<String>,
    /// Headers with the user's groups
    #[arg(
        long,
        value_name = "HEADER[,HEADER]",
        value_delimiter = ',',
        default_value = "X-Remote-Group"
    )]
    requestheader_group_headers: Vec<String>,
    /// Headers with the user's UID
    #[arg(
        long,
        value_name = "HEADER[,HEADER]",
        value_delimiter = ',',
        default_value = "X-Remote-Uid"
    )]
    requestheader_uid_headers: Vec<String>,
    /// What the headers of extra fields begin with
    #[arg(
        long,
        value_name = "PREFIX[,PREFIX]",
        value_delimiter = ',',
        default_value = "X-Remote-Extra-"
    )]
    requestheader_extra_headers_prefix: Vec<String>,
}

impl FrontProxyFlags {
    /// None when no proxies are known.
    pub fn config(&self) -> Result<Option<FrontProxyConfig>> {
        let Some(ca_file) = self.requestheader_client_ca_file.clone() else {
            return Ok(None);
        };
        let config = FrontProxyConfig {
            ca_file,
            names: self.requestheader_allowed_names.clone(),
            user_headers: self.requestheader_username_headers.clone(),
            group_headers: self.requestheader_group_headers.clone(),
            uid_headers: self.requestheader_uid_headers.clone(),
            extra_prefixes: self.requestheader_extra_headers_prefix.clone(),
        };
        // An empty name is in every certificate without one; an empty prefix, in every header.
        for (flag, texts) in [
            ("--requestheader-allowed-names", &config.names),
            ("--requestheader-username-headers", &config.user_headers),
            ("--requestheader-group-headers", &config.group_headers),
            ("--requestheader-uid-headers", &config.uid_headers),
            (
                "--requestheader-extra-headers-prefix",
                &config.extra_prefixes,
            ),
        ] {
            let empty = texts.iter().any(|text| text.trim().is_empty());
            ensure!(!empty, "{flag} has an empty entry");
        }
        Ok(Some(config))
    }
}
