//! Get and list.

use std::time::Duration;

use bytes::Bytes;
use http::{StatusCode, request::Parts};
use serde_json::{Value, json};

use super::reply::Answer;
use super::request::{Encoding, Form, ListOptions, Target};
use super::status::Status;
use super::{Api, Call, object, reply, table};
use crate::codec::transcode::List;
use crate::page::Continue;
use crate::store::{Range, Record, Revision, StoreError, Wanted};

/// How long a list may take from its first page to its last: etcd keeps old states as long under a kube-apiserver, so a client
/// that is slower learns it everywhere alike.
const CONTINUE_LIFETIME_S: i64 = 300;
/// How long a revision that was asked for may take to be seen here.
const REACH_PATIENCE: Duration = Duration::from_secs(3);

impl Api {
    /// The stored record of the target, or 404.
    pub(super) async fn record(&self, target: &Target) -> Result<Record, Status> {
        self.record_at(&target.key()?, target).await
    }

    /// The same for who has the target's key already.
    pub(super) async fn record_at(&self, key: &str, target: &Target) -> Result<Record, Status> {
        let record = self.store.get(key).await?;
        record.ok_or_else(|| Status::not_found(target.subject()))
    }

    pub(super) async fn get(&self, call: &Call, parts: &Parts) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let asked = call.query.revision().map_err(Status::bad_request)?;
        self.reach(asked).await?;
        let record = self.record(&call.target).await?;
        reply::stored(StatusCode::OK, &call.target, form, &record)
    }

    /// Waits a moment for a revision that is not seen here yet, as upstream: another server may have told of it. Clients try again
    /// when it does not come.
    pub(super) async fn reach(&self, asked: Option<u64>) -> Result<(), Status> {
        let ahead = asked.filter(|asked| *asked > self.store.revision().0);
        let Some(asked) = ahead else { return Ok(()) };
        let reached = self.store.reached(Revision(asked));
        let waited = tokio::time::timeout(REACH_PATIENCE, reached).await;
        waited.map_err(|_| Status::revision_ahead(asked, self.store.revision().0))
    }

    pub(super) async fn list(
        &self,
        call: &Call,
        (form, encoding): (Form, Encoding),
        options: ListOptions,
    ) -> Result<Answer, Status> {
        let listing = self.select(&call.target, &options).await?;
        let resource = call.target.resource;
        if form == Form::Object && !object::converts(resource) {
            let (kind, api_version) = (format!("{}List", resource.kind), resource.api_version());
            let metadata = listing.metadata().to_string();
            if encoding == Encoding::Protobuf
                && let Some(messages) = self.encodings.messages(resource, &listing.records)
            {
                let lengths = messages.iter().map(Bytes::len);
                let list = List::new(&api_version, &kind, metadata.as_bytes(), lengths);
                if let Some(list) = list {
                    return Ok(reply::messages(list, messages));
                }
            }
            let head = format!(
                r#"{{"kind":"{kind}","apiVersion":"{api_version}","metadata":{metadata},"items":["#
            );
            return Ok(reply::records(head, listing.records));
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
        self.reach(options.resource_version).await?;
        let now = jiff::Timestamp::now().as_second();
        let (after, at, mut since) = match options.continue_token.as_str() {
            "" if options.resource_version_match == "Exact" => {
                (None, options.resource_version.map(Revision), now)
            }
            "" => (None, None, now),
            token => {
                let token = Continue::read(token, &prefix).map_err(|error| {
                    Status::bad_request(format!("invalid continue token: {error}"))
                })?;
                (Some(token.start), token.revision.map(Revision), token.since)
            }
        };
        if at.is_none() {
            since = now;
        } else if now.saturating_sub(since) > CONTINUE_LIFETIME_S {
            return Err(expired_continue(after.as_deref().unwrap_or(""), &prefix));
        }
        let wanted = |record: &Record| options.selects_stored(&record.value);
        let wanted: Wanted<'_> = &wanted;
        let placed = match (&after, at) {
            (None, None) => self.placed(target, options).await?,
            _ => None,
        };
        let mut range = Range {
            prefix: &target.prefix_of(options),
            after: after.as_deref(),
            limit: options.limit,
            at,
            wanted: (!options.selects_all()).then_some(wanted),
            keys: None,
        };
        if let Some((keys, revision)) = &placed {
            (range.keys, range.at) = (Some(keys.as_slice()), Some(*revision));
        }
        let mut listed = self.store.list(range).await;
        if placed.is_some() && matches!(listed, Err(StoreError::Compacted { .. })) {
            // More was written since than is kept: all pods are looked at.
            (range.keys, range.at) = (None, at);
            listed = self.store.list(range).await;
        }
        let page = match listed {
            Ok(page) => page,
            Err(StoreError::Compacted { .. }) if !options.continue_token.is_empty() => {
                return Err(expired_continue(after.as_deref().unwrap_or(""), &prefix));
            }
            Err(error) => return Err(error.into()),
        };
        let last = page.records.last().filter(|_| page.more());
        let token = last.map(|last| Continue {
            revision: Some(page.revision.0),
            start: last.key.to_string(),
            since,
        });
        Ok(Listing {
            // With a selector, how many of the rest match is not known.
            remaining: (options.selects_all() && token.is_some()).then_some(page.remaining),
            continue_token: token.map(|token| token.write(&prefix)),
            revision: page.revision,
            records: page.records,
        })
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

/// 410, with a token that goes on from the same place in the newest state.
fn expired_continue(last: &str, prefix: &str) -> Status {
    let mut status = Status::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list \
         without the continue parameter, or use the continue token in this response to retrieve the remainder of the \
         results. Continuing with the provided token results in an inconsistent list - objects that were created, \
         modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    let token = Continue {
        revision: None,
        start: last.to_owned(),
        since: 0,
    };
    status.continue_token = Some(token.write(prefix));
    status
}
