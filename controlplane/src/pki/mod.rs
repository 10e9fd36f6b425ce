//! The certificates of a control plane, in its folder of credentials: which there are and until when, renewed by the authority whose
//! key lies beside them, and taken up by what runs without a restart.

mod authorities;
mod following;
mod leaf;
mod reload;
mod renewal;

pub use authorities::{TrustedServers, signing};
pub use following::{Following, LOOK_PERIOD, Stamp};
pub use leaf::{Leaf, Life};
pub use reload::{Reloading, Source};
pub use renewal::{finish, keep, known, renew};

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {reason}")]
    Unusable { path: PathBuf, reason: String },
    #[error("{0} is no certificate of this control plane; `certs list` names those that there are")]
    Unknown(String),
    #[error("{0} is an authority, which stays")]
    Authority(String),
    #[error("the key of the authority is not here ({0}): certificates are renewed where it is")]
    NoKey(PathBuf),
}

fn file(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::File {
        action,
        path,
        source,
    }
}
