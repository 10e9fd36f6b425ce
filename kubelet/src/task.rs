//! Scoped: a task that ends with its owner.

use std::future::Future;

/// A Scoped task is aborted when this is dropped.
#[derive(Debug)]
pub struct Scoped(tokio::task::JoinHandle<()>);

impl Scoped {
    pub fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        self.0.abort();
    }
}
