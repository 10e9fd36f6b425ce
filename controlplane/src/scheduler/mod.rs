//! The scheduler: finds a node for every pod that has none.
//!
//! `decide.rs` is pure: the nodes with what is on them (`cache.rs`) and a pod in, a node or the reasons against all of them out.
//! `preempt.rs` who would have to make way; `queue.rs` says whose turn it is, `run.rs` carries changes in and bindings out.

mod affinity;
mod cache;
mod decide;
mod preempt;
mod queue;
mod resources;
mod run;
mod spread;
#[cfg(test)]
mod tests;

pub(crate) use resources::parse_milli;
pub use run::{Config, run};
