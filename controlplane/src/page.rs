//! Continue tokens: where a list that is given out page by page goes on.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

/// Continue is what a continue token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continue {
    /// What the list is of; whatever is newest when there is none.
    pub revision: Option<u64>,
    /// The last key given out, with the prefix of all keys that the list is of.
    pub start: String,
    /// When the first page was given out, in seconds since the epoch.
    pub since: i64,
}

/// ContinueError is a token that this server has not given out: a 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContinueError {
    #[error("continue key is not valid: {0}")]
    Encoding(String),
    #[error("continue key is not valid: server does not recognize this encoded version {0}")]
    Version(String),
    #[error(
        "continue key is not valid: incorrect encoded start resourceVersion (version meta.k8s.io/v1)"
    )]
    Revision,
    #[error("continue key is not valid: encoded start key empty (version meta.k8s.io/v1)")]
    Start,
}

const VERSION: &str = "meta.k8s.io/v1";

impl Continue {
    /// The token; keys leave out the prefix, so that a client can carry a list on nowhere but where it began it.
    pub fn write(&self, prefix: &str) -> String {
        let revision = self.revision.map(i64::try_from);
        let revision = revision.and_then(Result::ok).unwrap_or(-1);
        let start = self.start.strip_prefix(prefix).unwrap_or(&self.start);
        let token = json!({"v": VERSION, "rv": revision, "start": start, "since": self.since});
        URL_SAFE_NO_PAD.encode(token.to_string())
    }

    pub fn read(token: &str, prefix: &str) -> Result<Self, ContinueError> {
        let invalid = |error: &dyn std::fmt::Display| ContinueError::Encoding(error.to_string());
        let bytes = URL_SAFE_NO_PAD.decode(token);
        let bytes = bytes.map_err(|error| invalid(&error))?;
        let token: Value = serde_json::from_slice(&bytes).map_err(|error| invalid(&error))?;
        let text = |key: &str| token[key].as_str().unwrap_or_default();
        if text("v") != VERSION {
            return Err(ContinueError::Version(text("v").to_owned()));
        }
        let revision = token["rv"].as_i64().filter(|revision| *revision != 0);
        let revision = revision.ok_or(ContinueError::Revision)?;
        let start = text("start");
        if start.is_empty() {
            return Err(ContinueError::Start);
        }
        // Nothing that a path would resolve to another place.
        if start.split('/').any(|step| matches!(step, "" | "." | "..")) {
            return Err(invalid(&start));
        }
        Ok(Self {
            revision: u64::try_from(revision).ok(),
            start: format!("{prefix}{start}"),
            // A token that does not say is as old as can be.
            since: token["since"].as_i64().unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_come_back_as_given_out_and_others_are_refused() {
        let given = |revision| Continue {
            revision,
            start: "/core/pods/ns/name".to_owned(),
            since: 7,
        };
        for revision in [Some(12), None] {
            let token = given(revision).write("/core/pods/");
            let read = Continue::read(&token, "/core/pods/").expect("our own token");
            assert_eq!(read, given(revision));
        }
        for (token, said) in [
            (
                json!({"v": "v0", "rv": 1, "start": "a"}),
                "does not recognize this encoded version v0",
            ),
            (
                json!({"v": VERSION, "rv": 0, "start": "a"}),
                "incorrect encoded start resourceVersion",
            ),
            (
                json!({"v": VERSION, "rv": 1, "start": ""}),
                "start key empty",
            ),
            (
                json!({"v": VERSION, "rv": 1, "start": "../a"}),
                "not valid: ../a",
            ),
            (json!([]), "encoded version"),
        ] {
            let token = URL_SAFE_NO_PAD.encode(token.to_string());
            let error = Continue::read(&token, "/").expect_err("refused");
            assert!(error.to_string().contains(said), "{error}");
        }
        let error = Continue::read("!!", "/").expect_err("refused");
        assert!(error.to_string().starts_with("continue key is not valid"));
    }
}
