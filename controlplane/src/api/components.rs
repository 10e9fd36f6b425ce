//! ComponentStatuses: whether the parts of the control plane do their work. Nothing is stored; each answer is a look.

use http::{StatusCode, request::Parts};
use serde_json::{Value, json};

use super::fields::Fields;
use super::reply::Answer;
use super::request::Form;
use super::status::Status;
use super::{Api, Call, reply, table};

/// The components by upstream's names, with the Lease that says who does the work; the store has none.
const COMPONENTS: [(&str, &str); 3] = [
    ("controller-manager", "kube-controller-manager"),
    ("etcd-0", ""),
    ("scheduler", "kube-scheduler"),
];

impl Api {
    pub(super) async fn component_statuses(
        &self,
        call: &Call,
        parts: &Parts,
    ) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let mut statuses = Vec::with_capacity(COMPONENTS.len());
        for (name, lease) in COMPONENTS {
            statuses.push(component_status(name, self.unwell(lease).await?));
        }
        if let Some(wanted) = call.target.name.as_deref() {
            let found = statuses
                .into_iter()
                .find(|status| status.text("/metadata/name") == wanted)
                .ok_or_else(|| Status::not_found(call.target.subject()))?;
            return Ok(reply::object(StatusCode::OK, &call.target, form, found));
        }
        let list = match form {
            Form::Table(version, include) => table::table(
                table::printer("", "ComponentStatus"),
                version,
                &statuses,
                include,
                true,
            ),
            _ => {
                for status in &mut statuses {
                    status.remove("/kind");
                    status.remove("/apiVersion");
                }
                json!({"kind": "ComponentStatusList", "apiVersion": "v1", "metadata": {}, "items": statuses})
            }
        };
        Ok(reply::json(StatusCode::OK, &list))
    }

    /// Why the holder of a Lease does not do its work; None when it does. The store works, or this would not be answered.
    async fn unwell(&self, lease: &str) -> Result<Option<String>, Status> {
        if lease.is_empty() {
            return Ok(None);
        }
        let found = self
            .lookup("coordination.k8s.io", "leases", Some("kube-system"), lease)
            .await?;
        let Some(found) = found else {
            return Ok(Some(format!("nobody has ever held the Lease {lease}")));
        };
        let renewed = found.text("/spec/renewTime").parse::<jiff::Timestamp>();
        let age_s = renewed.map_or(i64::MAX, |at| {
            jiff::Timestamp::now()
                .as_second()
                .saturating_sub(at.as_second())
        });
        let fresh = age_s <= found.int("/spec/leaseDurationSeconds");
        Ok((!fresh).then(|| format!("the Lease {lease} was last renewed {age_s} s ago")))
    }
}

fn component_status(name: &str, unwell: Option<String>) -> Value {
    let condition = match unwell {
        None => json!({"type": "Healthy", "status": "True", "message": "ok"}),
        Some(why) => json!({"type": "Healthy", "status": "False", "message": why}),
    };
    json!({"kind": "ComponentStatus", "apiVersion": "v1", "metadata": {"name": name}, "conditions": [condition]})
}
