//! What the fuzz targets hold the API's parsers to: no input makes them panic, hang or take memory without end, and what
//! they accept means the same when it is written down and read again.
//!
//! The modules under test are built from their sources, without the rest of the control plane: an instrumented build takes
//! seconds, and it shows that they know nothing of HTTP or of the store.

#[path = "../../controlplane/src/codec/mod.rs"]
pub mod codec;
#[path = "../../controlplane/src/page.rs"]
pub mod page;
#[path = "../../controlplane/src/patch/mod.rs"]
pub mod patch;
#[path = "../../controlplane/src/registry/mod.rs"]
pub mod registry;
#[path = "../../controlplane/src/selector/mod.rs"]
pub mod selector;

mod documents;
mod patches;
mod words;

pub use documents::{document, protobuf};
pub use patches::{applies, patches};
pub use words::{selectors, tokens};
