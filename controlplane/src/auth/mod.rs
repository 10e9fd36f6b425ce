//! Who a caller is: client certificates and ServiceAccount tokens. All pure; what needs the store (does the pod still
//! exist?) is left to the caller, who gets the claims.

mod identity;
mod keys;
mod token;

pub use identity::Identity;
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
