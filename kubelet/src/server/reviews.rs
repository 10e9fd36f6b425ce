//! reviews: the API server as the authority over who may call, by TokenReview and SubjectAccessReview.

use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::{Api, PostParams};
use kube::{Client, Resource};
use serde::{Serialize, de::DeserializeOwned};

use super::access::{Authority, AuthorityError, Caller, Right};

/// An API server that does not answer by then holds a request up no longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reviews ask the API server about this Node.
pub struct Reviews {
    client: Client,
    node: String,
}

impl Reviews {
    pub fn new(client: Client, node: &str) -> Self {
        Self {
            client,
            node: node.to_owned(),
        }
    }

    async fn ask<K>(&self, question: &'static str, review: &K) -> Result<K, AuthorityError>
    where
        K: Resource<Scope = k8s_openapi::ClusterResourceScope>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let failed = |reason: String| AuthorityError { question, reason };
        let api = Api::<K>::all(self.client.clone());
        let params = PostParams::default();
        match tokio::time::timeout(PATIENCE, api.create(&params, review)).await {
            Ok(answer) => answer.map_err(|error| failed(error.to_string())),
            Err(_) => Err(failed("it does not answer".to_owned())),
        }
    }
}

#[async_trait]
impl Authority for Reviews {
    async fn caller(&self, token: &str) -> Result<Option<Caller>, AuthorityError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                ..TokenReviewSpec::default()
            },
            ..TokenReview::default()
        };
        let status = self.ask("whose a token is", &review).await?.status;
        let status = status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true));
        Ok(user.map(|user| Caller {
            user: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        }))
    }

    async fn allows(&self, caller: &Caller, right: Right) -> Result<bool, AuthorityError> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(caller.user.clone()),
                uid: Some(caller.uid.clone()).filter(|uid| !uid.is_empty()),
                groups: Some(caller.groups.clone()),
                extra: Some(caller.extra.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(right.verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(right.part.to_owned()),
                    name: Some(self.node.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let answer = self.ask("what a caller may do", &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}
