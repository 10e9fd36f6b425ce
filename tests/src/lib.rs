//! Test support and end-to-end suites.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod machine;
pub mod process;
