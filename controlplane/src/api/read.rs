//! Get and list.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{StatusCode, request::Parts};
use serde_json::{Value, json};

use super::reply::Answer;
use super::request::{Form, ListOptions, Target};
use super::status::Status;
use super::{Api, Call, object, reply, table};
use crate::store::{Page, Range, Record, Revision, StoreError};

/// How many records are read at once when a selector picks few of them.
const SCAN_RECORDS: usize = 500;

impl Api {
    /// The stored record of the target, or 404.
    pub(super) async fn record(&self, target: &Target) -> Result<Record, Status> {
        self.store
            .get(&target.key()?)
            .await?
            .ok_or_else(|| Status::not_found(target.subject()))
    }

    pub(super) async fn get(&self, call: &Call, parts: &Parts) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        self.not_ahead(call.query.number("resourceVersion")?)?;
        let record = self.record(&call.target).await?;
        let resource = call.target.resource;
        if form == Form::Object && !object::converts(resource) {
            let mut out = Vec::with_capacity(record.value.len() + 128);
            object::write(
                &mut out,
                &record,
                record.revision,
                resource.kind,
                &resource.api_version(),
            );
            return Ok(reply::bytes(StatusCode::OK, "application/json", out));
        }
        Ok(reply::object(
            StatusCode::OK,
            &call.target,
            form,
            call.target.decode(&record)?,
        ))
    }

    /// Refuses a revision that the store has not reached; clients try again.
    fn not_ahead(&self, asked: Option<u64>) -> Result<(), Status> {
        let current = self.store.revision().0;
        match asked {
            Some(asked) if asked > current => Err(Status::revision_ahead(asked, current)),
            _ => Ok(()),
        }
    }

    pub(super) async fn list(
        &self,
        call: &Call,
        form: Form,
        options: ListOptions,
    ) -> Result<Answer, Status> {
        let listing = self.select(&call.target, &options).await?;
        let resource = call.target.resource;
        if form == Form::Object && !object::converts(resource) {
            let size: usize = listing
                .records
                .iter()
                .map(|record| record.value.len() + 48)
                .sum();
            let mut out = Vec::with_capacity(size + 256);
            out.extend_from_slice(
                format!(
                    r#"{{"kind":"{}List","apiVersion":"{}","metadata":{},"items":["#,
                    resource.kind,
                    resource.api_version(),
                    listing.metadata()
                )
                .as_bytes(),
            );
            for (at, record) in listing.records.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                object::write_item(&mut out, record);
            }
            out.extend_from_slice(b"]}");
            return Ok(reply::bytes(StatusCode::OK, "application/json", out));
        }
        let objects: Result<Vec<Value>, Status> = listing
            .records
            .iter()
            .map(|record| Ok(object::from_stored(call.target.decode(record)?, resource)))
            .collect();
        let objects = objects?;
        let mut list = match form {
            Form::Table(version, include) => table::table(
                table::printer(resource.group, resource.kind),
                version,
                &objects,
                include,
                true,
            ),
            Form::Partial(version) => {
                let items: Vec<Value> = objects
                    .iter()
                    .map(|object| table::partial(object, version))
                    .collect();
                let api_version = format!("meta.k8s.io/{version}");
                json!({"kind": "PartialObjectMetadataList", "apiVersion": api_version, "metadata": {}, "items": items})
            }
            Form::Object => {
                let kind = format!("{}List", resource.kind);
                json!({"kind": kind, "apiVersion": resource.api_version(), "metadata": {}, "items": objects})
            }
        };
        list["metadata"] = listing.metadata();
        Ok(reply::json(StatusCode::OK, &list))
    }

    /// The records that the options select, with where the list stands.
    pub(super) async fn select(
        &self,
        target: &Target,
        options: &ListOptions,
    ) -> Result<Listing, Status> {
        let prefix = target.prefix();
        self.not_ahead(options.resource_version)?;
        let (after, mut at) = match options.continue_token.as_str() {
            "" if options.resource_version_match == "Exact" => {
                (None, options.resource_version.map(Revision))
            }
            "" => (None, None),
            token => {
                let (revision, start) = read_continue(token, &prefix)?;
                (Some(start), revision)
            }
        };
        let mut records: Vec<Record> = Vec::new();
        let mut last = after;
        loop {
            let wanted = options.limit.map(|limit| limit - records.len());
            let limit = if options.selects_all() {
                wanted
            } else {
                Some(SCAN_RECORDS)
            };
            let range = Range {
                prefix: &prefix,
                after: last.as_deref(),
                limit,
                at,
            };
            let page = match self.store.list(range).await {
                Ok(page) => page,
                Err(StoreError::Compacted { .. }) if !options.continue_token.is_empty() => {
                    return Err(expired_continue(last.as_deref().unwrap_or(""), &prefix));
                }
                Err(error) => return Err(error.into()),
            };
            at = Some(page.revision);
            let Page {
                records: found,
                revision,
                remaining,
            } = page;
            let found_last = found.last().map(|record| record.key.to_string());
            for (index, record) in found.iter().enumerate() {
                if options.selects_all() || options.selects(&target.decode(record)?) {
                    records.push(record.clone());
                }
                if options.limit == Some(records.len()) {
                    let left = found.len() - index - 1 + remaining;
                    return Ok(Listing::cut(
                        records,
                        revision,
                        left,
                        &record.key,
                        &prefix,
                        options,
                    ));
                }
            }
            if remaining == 0 || found_last.is_none() {
                return Ok(Listing {
                    records,
                    revision,
                    remaining: None,
                    continue_token: None,
                });
            }
            last = found_last;
        }
    }
}

impl Target {
    /// A record of this target's resource, as clients see it (in the stored form: see [`object::from_stored`]).
    pub(super) fn decode(&self, record: &Record) -> Result<Value, Status> {
        let stored = object::stored_resource(self.resource);
        object::decode(record, stored.kind, &stored.api_version())
    }
}

/// What a list found.
pub(super) struct Listing {
    pub records: Vec<Record>,
    pub revision: Revision,
    remaining: Option<usize>,
    continue_token: Option<String>,
}

impl Listing {
    fn cut(
        records: Vec<Record>,
        revision: Revision,
        left: usize,
        last_key: &str,
        prefix: &str,
        options: &ListOptions,
    ) -> Self {
        if left == 0 {
            return Self {
                records,
                revision,
                remaining: None,
                continue_token: None,
            };
        }
        let start = last_key.strip_prefix(prefix).unwrap_or(last_key);
        let token = write_continue(Some(revision), start);
        // With a selector, how many of the rest match is not known.
        let remaining = options.selects_all().then_some(left);
        Self {
            records,
            revision,
            remaining,
            continue_token: Some(token),
        }
    }

    fn metadata(&self) -> Value {
        let mut metadata = json!({"resourceVersion": self.revision.to_string()});
        if let Some(token) = &self.continue_token {
            metadata["continue"] = token.as_str().into();
        }
        if let Some(remaining) = self.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
        metadata
    }
}

/// A continue token: the revision the list is at (-1: whatever is newest) and the last key given out.
fn write_continue(revision: Option<Revision>, start: &str) -> String {
    let revision = revision.map_or(-1, |revision| i64::try_from(revision.0).unwrap_or(-1));
    URL_SAFE_NO_PAD
        .encode(json!({"v": "meta.k8s.io/v1", "rv": revision, "start": start}).to_string())
}

fn read_continue(token: &str, prefix: &str) -> Result<(Option<Revision>, String), Status> {
    let refused =
        || Status::bad_request("continue key is not valid: it was not given out by this server");
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| refused())?;
    let token: Value = serde_json::from_slice(&bytes).map_err(|_| refused())?;
    let start = token["start"]
        .as_str()
        .filter(|start| !start.is_empty())
        .ok_or_else(refused)?;
    let revision = token["rv"].as_i64().ok_or_else(refused)?;
    Ok((
        u64::try_from(revision).ok().map(Revision),
        format!("{prefix}{start}"),
    ))
}

/// 410, with a token that goes on from the same place in the newest state.
fn expired_continue(last: &str, prefix: &str) -> Status {
    let mut status = Status::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list \
         without the continue parameter, or use the continue token in this response to retrieve the remainder of the \
         results. Continuing with the provided token results in an inconsistent list - objects that were created, \
         modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    let start = last.strip_prefix(prefix).unwrap_or(last);
    status.continue_token = Some(write_continue(None, start));
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_come_back_as_given_out_and_others_are_refused() {
        let token = write_continue(Some(Revision(12)), "ns/name");
        let (revision, start) = read_continue(&token, "/core/pods/").expect("our own token");
        assert_eq!(
            (revision, start.as_str()),
            (Some(Revision(12)), "/core/pods/ns/name")
        );
        assert_eq!(
            read_continue(&write_continue(None, "x"), "/")
                .expect("inconsistent")
                .0,
            None
        );
        assert_eq!(read_continue("!!", "/").expect_err("refused").code, 400);
    }

    proptest::proptest! {
        #[test]
        fn no_token_makes_the_server_panic(text in ".{0,60}", json in "[{}\"a-z:,0-9-]{0,60}") {
            let _ = read_continue(&text, "/core/pods/");
            let _ = read_continue(&URL_SAFE_NO_PAD.encode(json), "/core/pods/");
        }
    }
}
