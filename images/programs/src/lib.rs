//! What the programs of our images share: finding addresses the way a pod is told to.
#![forbid(unsafe_code)]

pub mod resolver;
