//! Test support and end-to-end suites.
