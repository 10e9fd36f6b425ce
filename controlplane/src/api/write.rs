//! The write pipeline: decode -> prepare -> default -> admit -> allocate -> validate -> charge -> store -> encode.
//!
//! Requests decode and encode; between them, creates go through [`Api::insert`] and every change of an object that is
//! there through [`Api::modify`]. Both settle an object in the same way ([`Api::settle`]) and differ in what they put
//! before it and in how they store it.

use std::borrow::Cow;

use bytes::Bytes;
use http::{StatusCode, request::Parts};
use rand::RngExt;
use serde_json::{Value, json};

use super::allocation::{self, Reservation};
use super::body::{decode, require_name, settle_namespace};
use super::change::{
    carry_over, check_identity, check_lifetime, check_preconditions, check_revision_given,
    drop_empty, finished, spec_differs,
};
use super::fields::{self, Fields};
use super::patching::Patch;
use super::reply::Answer;
use super::request::{Form, Target, WriteOptions};
use super::status::{FieldError, Status};
use super::storing::Outcome;
use super::{Api, Call, admission, object, reply, strategy};
use crate::patch;
use crate::store::{Expect, Record, StoreError};

/// How often a write without a resourceVersion is tried again when others write the same object.
const CONFLICT_RETRIES: usize = 16;
/// How often a Service is given other addresses when another server was faster to give out the chosen ones.
const RACE_RETRIES: usize = 16;
/// How often a generated name is drawn again when it is taken, as upstream.
const NAME_RETRIES: usize = 8;
/// What generated names end in; no vowels, so that no words come out.
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Which part of an object a write may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All but the status, where the kind has a status subresource.
    Main,
    Status,
    /// What a subresource of its own rules has worked out already (binding, finalize, scale).
    Exact(&'static str),
}

impl Part {
    /// How managedFields name the part.
    pub fn subresource(self) -> &'static str {
        match self {
            Self::Main => "",
            Self::Status => "status",
            Self::Exact(name) => name,
        }
    }
}

/// One write: of what, which part of it, and how.
#[derive(Clone, Copy)]
pub(super) struct Write<'a> {
    pub target: &'a Target,
    pub options: &'a WriteOptions,
    pub part: Part,
    tracking: Tracking,
}

/// Whether a write still has to be noted in managedFields; server-side apply has done it already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tracking {
    Update,
    Done,
}

impl<'a> Write<'a> {
    fn new(target: &'a Target, options: &'a WriteOptions, part: Part) -> Self {
        Self {
            target,
            options,
            part,
            tracking: Tracking::Update,
        }
    }

    fn tracked(self) -> Self {
        Self {
            tracking: Tracking::Done,
            ..self
        }
    }
}

impl Api {
    pub(super) async fn create(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let options = call.write_options(parts)?;
        let resource = call.target.resource;
        let decoded = decode(
            parts,
            &body,
            &resource.api_version(),
            resource.kind,
            options.validation,
        )?;
        let object = object::to_stored(decoded.value, resource);
        let created = self.insert(&call.target, object, &options).await?;
        let mut answer = reply::outcome(StatusCode::CREATED, &call.target, form, created)?;
        reply::warn(&mut answer, &decoded.warnings);
        reply::warn(&mut answer, &options.warnings.take());
        Ok(answer)
    }

    pub(super) async fn update(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        self.update_part(call, parts, body, Part::Main).await
    }

    pub(super) async fn update_part(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
        part: Part,
    ) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let options = call.write_options(parts)?;
        let resource = call.target.resource;
        let decoded = decode(
            parts,
            &body,
            &resource.api_version(),
            resource.kind,
            options.validation,
        )?;
        let mut wanted = object::to_stored(decoded.value, resource);
        settle_namespace(&mut wanted, &call.target)?;
        require_name(&mut wanted, call.target.object_name()?)?;
        let mut outcome = self
            .modify(&call.target, &options, part, |_| {
                check_revision_given(&call.target, &wanted)?;
                Ok(wanted.clone())
            })
            .await;
        let mut code = StatusCode::OK;
        let absent = matches!(&outcome, Err(status) if status.code == StatusCode::NOT_FOUND);
        if absent && part == Part::Main && strategy::of(resource).creates_on_update() {
            // Who names a version or an identity means an object that was there.
            check_preconditions(&call.target, &wanted, &json!({}))?;
            self.check_create(call).await?;
            match self.insert(&call.target, wanted.clone(), &options).await {
                // Somebody else was faster: then it is a change of theirs.
                Err(status) if status.reason == "AlreadyExists" => {
                    let change = |_: &Value| Ok(wanted.clone());
                    outcome = self.modify(&call.target, &options, part, change).await;
                }
                created => {
                    outcome = created;
                    code = StatusCode::CREATED;
                }
            }
        }
        let mut answer = reply::outcome(code, &call.target, form, outcome?)?;
        reply::warn(&mut answer, &decoded.warnings);
        reply::warn(&mut answer, &options.warnings.take());
        Ok(answer)
    }

    pub(super) async fn patch(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        self.patch_part(call, parts, body, Part::Main).await
    }

    pub(super) async fn patch_part(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
        part: Part,
    ) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let options = call.write_options(parts)?;
        let target = &call.target;
        let patch = Patch::parse(parts, &body, target, &options)?;
        let mut warnings = patch.warnings().to_vec();
        let applies = patch.applies();
        let write = match Write::new(target, &options, part) {
            write if applies => write.tracked(),
            write => write,
        };
        if applies && part == Part::Main && self.store.get(&target.key()?).await?.is_none() {
            self.check_create(call).await?;
            let object = patch.onto(None, target, &options, part)?;
            let object = object::to_stored(object, target.resource);
            match self.insert_as(write, object).await {
                // Somebody else was faster: then it is a change of theirs.
                Err(status) if status.reason == "AlreadyExists" => {}
                outcome => {
                    let mut answer = reply::outcome(StatusCode::CREATED, target, form, outcome?)?;
                    warnings.append(&mut options.warnings.take());
                    reply::warn(&mut answer, &warnings);
                    return Ok(answer);
                }
            }
        }
        let mut found = Vec::new();
        let outcome = self
            .modify_as(write, |old| {
                let old = match object::converts(target.resource) {
                    true => Cow::Owned(object::from_stored(old.clone(), target.resource)),
                    false => Cow::Borrowed(old),
                };
                let checked = patch.checked(&old, target, &options, part)?;
                found = checked.warnings;
                let mut object = object::to_stored(checked.value, target.resource);
                require_name(&mut object, target.object_name()?)?;
                settle_namespace(&mut object, target)?;
                check_identity(target, &object, &old)?;
                Ok(object)
            })
            .await?;
        warnings.append(&mut found);
        warnings.append(&mut options.warnings.take());
        let mut answer = reply::outcome(StatusCode::OK, target, form, outcome)?;
        reply::warn(&mut answer, &warnings);
        Ok(answer)
    }

    /// Creates an object (in stored form, decoded).
    pub(super) async fn insert(
        &self,
        target: &Target,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Outcome, Status> {
        self.insert_as(Write::new(target, options, Part::Main), object)
            .await
    }

    async fn insert_as(&self, write: Write<'_>, mut object: Value) -> Result<Outcome, Status> {
        begin(write.target, &mut object)?;
        if write.target.resource.plural == "certificatesigningrequests"
            && let Some(caller) = &write.options.caller
        {
            strategy::asked_by(&mut object, caller);
        }
        let prefix = object.text("/metadata/generateName").to_owned();
        if !fields::name(&object).is_empty() || prefix.is_empty() {
            return self.insert_named(write, object).await;
        }
        let mut attempt = 0;
        loop {
            let mut named = object.clone();
            named.set("/metadata/name", generated_name(&prefix));
            match self.insert_named(write, named).await {
                Err(status) if status.reason == "AlreadyExists" && attempt < NAME_RETRIES => {
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    async fn insert_named(&self, write: Write<'_>, object: Value) -> Result<Outcome, Status> {
        if !allocation::is_service(write.target) {
            let lost = || Status::internal("nothing was given out, and it is taken");
            return self.insert_once(write, object).await?.ok_or_else(lost);
        }
        for _ in 0..RACE_RETRIES {
            if let Some(created) = self.insert_once(write, object.clone()).await? {
                return Ok(created);
            }
        }
        let name = fields::name(&object).to_owned();
        Err(Status::modified(write.target.subject_named(&name)))
    }

    /// None when another server has given out the same address or port meanwhile.
    async fn insert_once(
        &self,
        write: Write<'_>,
        mut object: Value,
    ) -> Result<Option<Outcome>, Status> {
        let target = write.target;
        let strategy = strategy::of(target.resource);
        if target.resource.subresource("status").is_some() && !strategy.keeps_status() {
            object.remove("/status");
        }
        if let Some(status) = strategy::first_status(target.resource)
            && !object.has("/status")
        {
            object.set("/status", status);
        }
        let reservation = self.settle(write, &mut object, None).await?;
        object.set("/metadata/uid", uuid::Uuid::new_v4().to_string());
        object.set("/metadata/creationTimestamp", fields::now());
        strategy.assign(&mut object);
        if strategy.counts_generations() {
            object.set("/metadata/generation", 1);
        }
        self.track(write, None, &mut object);
        let name = fields::name(&object).to_owned();
        let key = target.key_of(&name);
        let generates = !object.text("/metadata/generateName").is_empty();
        let exists = || match generates {
            false => Status::already_exists(target.subject_named(&name)),
            true => Status::already_exists_generated(target.subject_named(&name)),
        };
        if self.store.get(&key).await?.is_some() {
            return Err(exists());
        }
        self.charge(write, &object, None).await?;
        if write.options.dry_run {
            return Ok(Some(Outcome::Kept(object)));
        }
        let along = reservation.along(&object);
        let stored = self.put(&key, object, Expect::Absent, along);
        match stored.await {
            Ok(record) => Ok(Some(Outcome::Stored(record))),
            Err(error) if allocation::is_lost_race(target, &error) => {
                self.catch_up(&error).await?;
                Ok(None)
            }
            Err(StoreError::Exists { .. }) => Err(exists()),
            Err(error) => Err(error.into()),
        }
    }

    /// Changes the object of the target: `change` makes of the present object the wanted one, and is called again when
    /// somebody else was faster.
    pub(super) async fn modify(
        &self,
        target: &Target,
        options: &WriteOptions,
        part: Part,
        change: impl FnMut(&Value) -> Result<Value, Status>,
    ) -> Result<Outcome, Status> {
        self.modify_as(Write::new(target, options, part), change)
            .await
    }

    /// As [`Api::modify`], for a change that has noted in managedFields itself who made it.
    pub(super) async fn apply_part(
        &self,
        target: &Target,
        options: &WriteOptions,
        part: Part,
        change: impl FnMut(&Value) -> Result<Value, Status>,
    ) -> Result<Outcome, Status> {
        self.modify_as(Write::new(target, options, part).tracked(), change)
            .await
    }

    async fn modify_as(
        &self,
        write: Write<'_>,
        mut change: impl FnMut(&Value) -> Result<Value, Status>,
    ) -> Result<Outcome, Status> {
        let target = write.target;
        let key = target.key()?;
        let mut place = self.contention.place(&key);
        for attempt in 0..CONFLICT_RETRIES {
            place.wait(attempt > 0).await;
            let record = self.record_at(&key, target).await?;
            let old = target.decode(&record)?;
            let mut new = change(&old)?;
            check_preconditions(target, &new, &old)?;
            if write.part == Part::Main {
                check_lifetime(target, &new, &old)?;
            }
            carry_over(&mut new, &old, write.part, target);
            drop_empty(&mut new);
            let reservation = self.settle(write, &mut new, Some(&old)).await?;
            // Where a pod is put is no change of what is asked for: kubelets report the generation they have seen.
            let bound = write.part == Part::Exact("binding");
            let counts = strategy::of(target.resource).counts_generations();
            if !bound && counts && spec_differs(&new, &old) {
                new.set("/metadata/generation", old.int("/metadata/generation") + 1);
            }
            if finished(&new) {
                return self.remove_finished(write, &record, new).await;
            }
            if new == old {
                return Ok(Outcome::Kept(old));
            }
            self.track(write, Some(&old), &mut new);
            // A client that leaves managedFields out changes nothing by that.
            if new == old {
                return Ok(Outcome::Kept(old));
            }
            self.charge(write, &new, Some(&old)).await?;
            if write.options.dry_run {
                return Ok(Outcome::Kept(new));
            }
            let expect = Expect::Revision(record.revision);
            let along = reservation.along(&new);
            match self.put(&record.key, new, expect, along).await {
                Ok(record) => return Ok(Outcome::Stored(record)),
                Err(error) if allocation::is_lost_race(target, &error) => {
                    self.catch_up(&error).await?;
                }
                Err(StoreError::Conflict { .. }) => {}
                Err(StoreError::NotFound { .. }) => {
                    return Err(Status::not_found(target.subject()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Status::modified(target.subject()))
    }

    /// Prepares, defaults, admits, allocates and validates: what every object goes through before it is stored.
    async fn settle(
        &self,
        write: Write<'_>,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation, Status> {
        let strategy = strategy::of(write.target.resource);
        let main = write.part == Part::Main;
        if let Some(old) = old.filter(|_| main) {
            strategy.prepare_update(new, old);
        }
        if let Some(old) = old.filter(|_| write.part == Part::Status) {
            strategy.prepare_status(new, old);
        }
        strategy.default(new);
        let options = write.options;
        if main {
            admission::admit(self, options, write.target, new, old).await?;
            let warnings = strategy::warnings(write.target.resource, new, old);
            options.warnings.add(warnings);
        } else if write.part == Part::Exact("ephemeralcontainers") {
            admission::admit_containers(self, options, write.target, new).await?;
        } else if write.part == Part::Exact("resize") {
            admission::admit_resize(self, write.target, new).await?;
        } else if let Some(old) = old.filter(|_| write.part == Part::Status) {
            admission::admit_status(self, options, write.target, new, old)?;
        }
        if old.is_none() {
            // Last, because a first state follows from what admission made of the object: a pod's quality of service.
            strategy.prepare_create(new);
        }
        let reservation = if main {
            self.services
                .reserve(&*self.store, write.target, new, old)
                .await?
        } else {
            self.services.nothing()
        };
        check(write, new, old)?;
        Ok(reservation)
    }

    /// Notes in managedFields who wrote what. Events are written once and never applied: not worth the bytes.
    fn track(&self, write: Write<'_>, old: Option<&Value>, new: &mut Value) {
        if write.tracking == Tracking::Done || write.target.resource.plural == "events" {
            return;
        }
        let now = fields::now();
        let manager = patch::Manager {
            name: &write.options.manager,
            subresource: write.part.subresource(),
            now: &now,
        };
        let stored = object::stored_resource(write.target.resource);
        patch::track_update(old, new, stored.ty.get(), manager);
    }

    /// Counts the write against the quotas of its namespace, the last thing before it is stored.
    async fn charge(
        &self,
        write: Write<'_>,
        new: &Value,
        old: Option<&Value>,
    ) -> Result<(), Status> {
        if !matches!(write.part, Part::Main | Part::Exact("resize")) {
            return Ok(());
        }
        admission::charge(self, write, new, old).await
    }

    /// Takes away an object whose deletion nothing holds back any more.
    async fn remove_finished(
        &self,
        write: Write<'_>,
        record: &Record,
        new: Value,
    ) -> Result<Outcome, Status> {
        let target = write.target;
        if !write.options.dry_run {
            match self.remove(target, record).await {
                Ok(_) | Err(StoreError::NotFound { .. }) => {}
                Err(StoreError::Conflict { .. }) => return Err(Status::modified(target.subject())),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Outcome::Deleted(new))
    }
}

/// Takes from a new object what only the server gives.
fn begin(target: &Target, object: &mut Value) -> Result<(), Status> {
    if target.namespace.is_none() && target.resource.namespaced {
        return Err(Status::bad_request(
            "an empty namespace may not be set during creation",
        ));
    }
    settle_namespace(object, target)?;
    if !object.text("/metadata/resourceVersion").is_empty() {
        return Err(Status::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    for field in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "selfLink",
    ] {
        object.remove(&format!("/metadata/{field}"));
    }
    drop_empty(object);
    Ok(())
}

/// Everything that must hold of an object before it is stored: 422 with all that does not.
fn check(write: Write<'_>, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    let resource = write.target.resource;
    let strategy = strategy::of(resource);
    let mut errors: Vec<FieldError> = Vec::new();
    strategy::validate_metadata(object, resource, &mut errors);
    // What a status write leaves alone was checked when it was written, by the rules of that time.
    if write.part == Part::Status {
        strategy::validate_status(resource, object, &mut errors);
    } else {
        strategy.validate(object, &mut errors);
    }
    // Subresources with rules of their own change what others may not: a pod's node, its resources.
    if let Some(old) = old.filter(|_| write.part == Part::Main) {
        strategy.validate_update(object, old, &mut errors);
    }
    if errors.is_empty() {
        return Ok(());
    }
    let name = fields::name(object);
    Err(Status::invalid(resource.group, resource.kind, name, errors))
}

fn generated_name(prefix: &str) -> String {
    /// Names have at most this many bytes before the five random ones (63 in all).
    const PREFIX_BYTES_MAX: usize = 58;
    let mut end = prefix.len().min(PREFIX_BYTES_MAX);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    let mut rng = rand::rng();
    let suffix: String = (0..5)
        .map(|_| char::from(NAME_LETTERS[rng.random_range(0..NAME_LETTERS.len())]))
        .collect();
    format!("{}{suffix}", &prefix[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_stay_within_a_label() {
        let name = generated_name(&"x".repeat(80));
        assert_eq!(name.len(), 63);
        assert_ne!(generated_name("a-"), generated_name("a-"));
    }
}
