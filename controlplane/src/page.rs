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
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("continue key is not valid: it was not given out by this server")]
pub struct ContinueError;

impl Continue {
    /// The token; keys leave out the prefix, so that a client can carry a list on nowhere but where it began it.
    pub fn write(&self, prefix: &str) -> String {
        let revision = self.revision.map(i64::try_from);
        let revision = revision.and_then(Result::ok).unwrap_or(-1);
        let start = self.start.strip_prefix(prefix).unwrap_or(&self.start);
        let token =
            json!({"v": "meta.k8s.io/v1", "rv": revision, "start": start, "since": self.since});
        URL_SAFE_NO_PAD.encode(token.to_string())
    }

    pub fn read(token: &str, prefix: &str) -> Result<Self, ContinueError> {
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| ContinueError)?;
        let token: Value = serde_json::from_slice(&bytes).map_err(|_| ContinueError)?;
        let start = token["start"]
            .as_str()
            .filter(|start| !start.is_empty())
            .ok_or(ContinueError)?;
        let revision = token["rv"].as_i64().ok_or(ContinueError)?;
        Ok(Self {
            revision: u64::try_from(revision).ok(),
            start: format!("{prefix}{start}"),
            since: token["since"].as_i64().ok_or(ContinueError)?,
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
        assert_eq!(Continue::read("!!", "/"), Err(ContinueError));
    }
}
