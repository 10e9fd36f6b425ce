//! Role based access control: rules, and an index that finds those of a caller. All pure.

mod cover;
mod index;
mod rule;
#[cfg(test)]
mod tests;

pub use cover::{NotHeld, covers};
pub use index::{Index, RoleRef};
pub use rule::Rule;

/// The API group of roles and bindings.
pub const GROUP: &str = "rbac.authorization.k8s.io";
