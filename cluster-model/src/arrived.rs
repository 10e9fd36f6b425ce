//! Objects as a watch of the API brings them: converted one by one while the answer is read.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::Resource as _;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Deserializer};

use crate::{EndpointSlice, Node, Pod, Rejected, Service, wire};

/// What arrived: what a watch itself goes by, and the object, if it is one.
#[derive(Clone)]
pub(crate) struct Arrived<T> {
    /// Name, namespace and resourceVersion, no more.
    pub meta: ObjectMeta,
    pub object: Result<Arc<T>, Rejected>,
}

/// A kind of the model that can be watched.
pub(crate) trait Watched: Clone + Send + Sync + 'static {
    /// The API's own type, for where its objects are.
    type Api: k8s_openapi::Resource;

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arrived<Self>, D::Error>;
}

macro_rules! watched {
    ($($kind:ident: $api:ty),+) => {$(
        impl Watched for $kind {
            type Api = $api;

            fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arrived<Self>, D::Error> {
                let wire = wire::$kind::deserialize(deserializer)?;
                Ok(Arrived {
                    meta: meta(&wire.metadata),
                    object: Self::try_from(wire).map(Arc::new),
                })
            }
        }
    )+};
}

watched!(Service: core::Service, EndpointSlice: discovery::EndpointSlice, Node: core::Node, Pod: core::Pod);

fn meta(arrived: &wire::Meta<'_>) -> ObjectMeta {
    let owned = |text: &Option<wire::Text<'_>>| text.as_deref().map(str::to_owned);
    ObjectMeta {
        name: owned(&arrived.name),
        namespace: owned(&arrived.namespace),
        resource_version: owned(&arrived.resource_version),
        ..ObjectMeta::default()
    }
}

impl<'de, T: Watched> Deserialize<'de> for Arrived<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::read(deserializer)
    }
}

impl<T: Watched> fmt::Debug for Arrived<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", T::Api::KIND, self.meta.name)
    }
}

impl<T: Watched> Resource for Arrived<T> {
    type DynamicType = ();
    type Scope = <T::Api as k8s_openapi::Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        T::Api::KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        T::Api::GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        T::Api::VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        T::Api::URL_PATH_SEGMENT.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use kube::core::{ObjectList, WatchEvent};
    use serde_json::json;

    use super::*;

    /// As a real API server tells it, with what nobody here reads.
    fn web() -> serde_json::Value {
        json!({
            "metadata": {
                "name": "web", "namespace": "default", "uid": "1-2-3", "resourceVersion": "17",
                "labels": {"app": "web", "service.kubernetes.io/service-proxy-name": "an \"other\" proxy"},
                "annotations": null,
                "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {"f:ports": {"k:{\"port\":80}": {".": {}}}}}}],
                "ownerReferences": [{"name": "x", "spec": {"type": "NodePort"}}],
            },
            "spec": {
                "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ipFamilies": ["IPv4"], "selector": {"a": "b"},
                "ports": [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30_080}], "type": "NodePort",
            },
            "status": {"loadBalancer": {}, "conditions": [{"type": "x"}]},
        })
    }

    #[test]
    fn a_list_is_read_and_a_malformed_item_does_not_take_the_others_along() {
        let mut bad = web();
        bad["spec"]["clusterIPs"] = json!(["nowhere"]);
        let list = json!({
            "kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "20", "continue": "more"},
            "items": [web(), bad],
        });
        let list: ObjectList<Arrived<Service>> = serde_json::from_str(&list.to_string()).unwrap();
        assert_eq!(list.metadata.continue_.as_deref(), Some("more"));
        let [good, bad] = &list.items[..] else {
            panic!("{list:?}")
        };
        assert_eq!(good.meta.resource_version.as_deref(), Some("17"));
        let service = good.object.as_ref().unwrap();
        assert_eq!(service.key.to_string(), "default/web");
        assert_eq!(service.proxy_name.as_deref(), Some("an \"other\" proxy"));
        assert_eq!(service.ports[0].node_port, Some(30_080));
        let why = bad.object.as_ref().unwrap_err().to_string();
        assert!(why.contains("spec.clusterIPs[0]"), "{why}");
    }

    #[test]
    fn an_event_is_read_whichever_of_its_fields_comes_first() {
        for text in [
            format!(r#"{{"type":"ADDED","object":{}}}"#, web()),
            format!(r#"{{"object":{},"type":"ADDED"}}"#, web()),
        ] {
            let event: WatchEvent<Arrived<Service>> = serde_json::from_str(&text).unwrap();
            let WatchEvent::Added(arrived) = event else {
                panic!("{event:?}")
            };
            assert_eq!(arrived.object.unwrap().ports[0].port, 80);
        }
    }

    #[test]
    fn kinds_are_where_the_api_has_them() {
        let path = Arrived::<EndpointSlice>::url_path(&(), None);
        assert_eq!(path, "/apis/discovery.k8s.io/v1/endpointslices");
        assert_eq!(Arrived::<Node>::url_path(&(), None), "/api/v1/nodes");
    }
}
