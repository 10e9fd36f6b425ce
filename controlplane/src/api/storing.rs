//! Storing: the last step of a write, in one step with what goes along with it.

use serde_json::Value;

use super::allocation;
use super::request::Target;
use super::status::Status;
use super::{Api, object};
use crate::store::{Expect, Record, StoreError, Write, lifetime};

/// What a write makes of an object.
pub enum Outcome {
    /// It is stored like this, and mostly answered with as it is: without being decoded.
    Stored(Record),
    /// The object as it is, of which nothing was stored: nothing differs, or it was a dry run.
    Kept(Value),
    /// The change removed what held back the object's deletion.
    Deleted(Value),
}

impl Outcome {
    /// The object, in stored form.
    pub fn into_object(self, target: &Target) -> Result<Value, Status> {
        match self {
            Self::Stored(record) => target.decode(&record),
            Self::Kept(object) | Self::Deleted(object) => Ok(object),
        }
    }
}

impl Api {
    /// Writes an object, and what goes with it; Events get a lifetime, which begins anew with each write.
    pub(super) async fn put(
        &self,
        key: &str,
        object: Value,
        expect: Expect,
        along: Vec<Write>,
    ) -> Result<Record, StoreError> {
        let value = object::encode(object);
        if let Some(lifetime) = lifetime(key) {
            return self.store.put_for(key, value, expect, lifetime).await;
        }
        let first = Write {
            key: key.to_owned(),
            value: Some(value),
            expect,
        };
        self.store.commit(first, along).await
    }

    /// Deletes a record, and what its object was given.
    pub(super) async fn remove(
        &self,
        target: &Target,
        record: &Record,
    ) -> Result<Record, StoreError> {
        let delete = Write {
            key: record.key.to_string(),
            value: None,
            expect: Expect::Revision(record.revision),
        };
        let along = allocation::freeing(target, record);
        self.store.commit(delete, along).await
    }

    /// Sees to it that this server knows what another one has given out, before something else is chosen.
    pub(super) async fn catch_up(&self, lost: &StoreError) -> Result<(), Status> {
        if let StoreError::Exists { key, .. } = lost {
            self.store.get(key).await?;
        }
        Ok(())
    }
}
