//! CertificateSubjectRestriction: nobody asks for a certificate of the group that may do all, whoever would approve it.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::Status;
use crate::auth::MASTERS;
use crate::controllers::{CLIENT_SIGNER, organizations};

/// Refuses a request for a client certificate of `system:masters`. What can't be read, no signer takes.
pub fn check_subject(target: &Target, request: &Value) -> Result<(), Status> {
    if request.text("/spec/signerName") != CLIENT_SIGNER {
        return Ok(());
    }
    let pem = BASE64_STANDARD.decode(request.text("/spec/request"));
    let asked = organizations(&pem.unwrap_or_default()).unwrap_or_default();
    if asked.iter().any(|organization| organization == MASTERS) {
        let why = format!("use of {CLIENT_SIGNER} signer with {MASTERS} group is not allowed");
        return Err(Status::forbidden(
            target.subject_named(fields::name(request)),
            why,
        ));
    }
    Ok(())
}
