//! `token` of a ServiceAccount.

use bytes::Bytes;
use http::{StatusCode, request::Parts};

use crate::api::body::decode;
use crate::api::fields::Fields;
use crate::api::reply::{self, Answer};
use crate::api::status::{FieldError, Status, Subject};
use crate::api::{Api, Call, admission};
use crate::auth::AuthError;

impl Api {
    /// Issues a token for a ServiceAccount.
    pub(super) async fn token(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let options = call.write_options(parts)?;
        let request = decode(
            parts,
            &body,
            "authentication.k8s.io/v1",
            "TokenRequest",
            options.validation,
        )?
        .value;
        let account = call.target.decode(&self.record(&call.target).await?)?;
        let (kind, name) = (
            request.text("/spec/boundObjectRef/kind"),
            request.text("/spec/boundObjectRef/name"),
        );
        let namespace = call.target.namespace.as_deref();
        let bound = match kind {
            "" => None,
            "Pod" | "Secret" | "Node" => {
                let plural = format!("{}s", kind.to_lowercase());
                let found = self
                    .lookup("", &plural, namespace.filter(|_| kind != "Node"), name)
                    .await?;
                let subject = Subject {
                    group: "",
                    resource: &plural,
                    name,
                };
                Some(found.ok_or_else(|| Status::not_found(subject))?)
            }
            _ => {
                let version = request.text("/spec/boundObjectRef/apiVersion");
                let version = match version.split_once('/') {
                    None => format!("/{version}"),
                    Some(_) => version.to_owned(),
                };
                return Err(Status::bad_request(format!(
                    "cannot bind token to object of type {version}, Kind={kind}"
                )));
            }
        };
        let node = match bound.as_ref().map(|bound| bound.text("/spec/nodeName")) {
            Some(node) if kind == "Pod" && !node.is_empty() => {
                self.lookup("", "nodes", None, node).await?
            }
            _ => None,
        };
        if self.decides() {
            admission::check_token(&call.identity, &call.target, &request, bound.as_ref())?;
        }
        let now = jiff::Timestamp::now().as_second();
        let granted = self
            .tokens
            .grant(&request, &account, (bound.as_ref(), node.as_ref()), now)
            .map_err(|error| match error {
                AuthError::Request { field, reason } => {
                    let given = request
                        .pointer(&format!("/{}", field.replace('.', "/")))
                        .cloned()
                        .unwrap_or_default();
                    let error = FieldError::invalid(field, given, reason);
                    Status::invalid("authentication.k8s.io", "TokenRequest", name, vec![error])
                }
                error => Status::internal(error),
            })?;
        Ok(reply::json(StatusCode::CREATED, &granted))
    }
}
