//! The state of the cluster at one moment, for who may have all of it: values come as they are kept, sealed ones sealed.

use bytes::Bytes;
use http::StatusCode;

use super::Api;
use super::reply::{self, Answer};
use super::status::Status;
use crate::store::Snapshot;

/// Where the backup is: no role but cluster-admin names this path.
pub const BACKUP_PATH: &str = "/keelway/backup";

impl Api {
    pub(super) async fn backup(&self) -> Result<Answer, Status> {
        let snapshot = Snapshot::of(self.store.kept()).await?;
        let media = "application/octet-stream";
        let mut answer = reply::bytes(StatusCode::OK, media, Bytes::new());
        *answer.body_mut() = reply::streamed(futures::stream::iter(snapshot.into_chunks()));
        Ok(answer)
    }
}
