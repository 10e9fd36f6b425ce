//! Who a caller is (client certificates, ServiceAccount tokens) and what it may do (RBAC, the rights of nodes). All pure;
//! what needs the store (does the pod still exist?) is left to the caller, who gets the claims.

mod attributes;
pub mod bootstrap;
mod identity;
mod keys;
pub mod node;
pub mod policy;
pub mod rbac;
mod token;

pub use attributes::{Asked, Attributes, Resource};
pub use identity::{ANONYMOUS, AUTHENTICATED, Identity, MASTERS, UNAUTHENTICATED, common_name};
pub use keys::TokenKeys;
pub use token::{ObjectRef, TokenSpec};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    #[error("the client certificate {0}")]
    Certificate(String),
    #[error("the ServiceAccount key {0}")]
    Key(String),
    /// 401.
    #[error("the token {0}")]
    Token(String),
    /// 422: a TokenRequest that cannot be granted, with the field.
    #[error("{field}: {reason}")]
    Request { field: &'static str, reason: String },
}
