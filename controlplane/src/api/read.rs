//! Get and list.

use http::{StatusCode, request::Parts};
use serde_json::{Value, json};

use super::reply::Answer;
use super::request::{Encoding, Form, ListOptions, Target};
use super::status::Status;
use super::{Api, Call, object, reply, table};
use crate::codec::transcode;
use crate::page::Continue;
use crate::store::{Page, Range, Record, Revision, StoreError};

/// How many records are read at once when a selector picks few of them.
const SCAN_RECORDS: usize = 500;
/// How long a list may take from its first page to its last: etcd keeps old states as long under a kube-apiserver, so a client
/// that is slower learns it everywhere alike.
const CONTINUE_LIFETIME_S: i64 = 300;

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
        self.not_ahead(call.query.revision().map_err(Status::bad_request)?)?;
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
            out.push(b'\n');
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
        (form, encoding): (Form, Encoding),
        options: ListOptions,
    ) -> Result<Answer, Status> {
        let listing = self.select(&call.target, &options).await?;
        let resource = call.target.resource;
        if form == Form::Object && !object::converts(resource) {
            let (kind, api_version) = (format!("{}List", resource.kind), resource.api_version());
            let metadata = listing.metadata().to_string();
            if encoding == Encoding::Protobuf {
                let ty = resource.ty.get();
                let items = listing.records.iter();
                let items = items.map(|record| |out: &mut Vec<u8>| object::write_item(out, record));
                let list = transcode::list(&api_version, &kind, ty, metadata.as_bytes(), items);
                if let Some(list) = list {
                    return Ok(reply::protobuf(list));
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
        self.not_ahead(options.resource_version)?;
        let now = jiff::Timestamp::now().as_second();
        let (after, mut at, mut since) = match options.continue_token.as_str() {
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
                    if left == 0 {
                        return Ok(Listing::whole(records, revision));
                    }
                    let token = Continue {
                        revision: Some(revision.0),
                        start: record.key.to_string(),
                        since,
                    };
                    return Ok(Listing {
                        records,
                        revision,
                        // With a selector, how many of the rest match is not known.
                        remaining: options.selects_all().then_some(left),
                        continue_token: Some(token.write(&prefix)),
                    });
                }
            }
            if remaining == 0 || found_last.is_none() {
                return Ok(Listing::whole(records, revision));
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
    fn whole(records: Vec<Record>, revision: Revision) -> Self {
        Self {
            records,
            revision,
            remaining: None,
            continue_token: None,
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
