//! Threads that do writes and nothing else, so that no read waits for them.
//!
//! A write is many times the work of a read, and writes come in crowds: all that one commit has stored go on at once. A thread that
//! does both has used its share of a processor whenever there are many, and who comes then waits for the thread, be it for the
//! least of answers. So connections and reads are of one runtime, whose threads sleep most of the time and are woken soon,
//! and what writes is of another one: from when the body of a request has been read until there is an answer.

use std::panic::resume_unwind;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Does work on threads of another runtime, for as long as somebody waits for it: it goes with the request that it is part of. A
/// panic of it is one of the caller's. None when those threads are ending.
pub async fn run<T: Send + 'static>(
    threads: &Handle,
    work: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    let mut awaited = Awaited(threads.spawn(work));
    match (&mut awaited.0).await {
        Ok(done) => Some(done),
        Err(error) => {
            let panic = error.try_into_panic().ok()?;
            resume_unwind(panic)
        }
    }
}

/// A task that ends when nobody waits for it any more.
struct Awaited<T>(JoinHandle<T>);

impl<T> Drop for Awaited<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;
    use std::sync::Arc;

    use futures::FutureExt;
    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::Notify;

    use super::*;

    fn threads() -> Runtime {
        let builder = || {
            Builder::new_multi_thread()
                .worker_threads(1)
                .thread_name("writes")
                .build()
        };
        builder().expect("a runtime")
    }

    #[test]
    fn work_is_done_there_and_its_panic_comes_here() {
        let (here, there) = (
            Builder::new_current_thread().build().expect("one"),
            threads(),
        );
        let name = async || {
            run(there.handle(), async {
                std::thread::current().name().map(str::to_owned)
            })
            .await
        };
        let named = Some(Some("writes".to_owned()));
        here.block_on(async {
            assert_eq!(name().await, named);
            let panics = run(there.handle(), async { panic!("as it should") });
            let panic = AssertUnwindSafe(panics).catch_unwind().await;
            let panic = panic.expect_err("a panic");
            assert_eq!(panic.downcast_ref(), Some(&"as it should"));
            assert_eq!(name().await, named, "the thread goes on");
        });
        let handle = there.handle().clone();
        drop(there);
        assert_eq!(here.block_on(run(&handle, async {})), None);
    }

    #[test]
    fn work_ends_where_it_waits_when_nobody_wants_it_any_more() {
        let (here, there) = (
            Builder::new_current_thread().build().expect("one"),
            threads(),
        );
        let begun = Arc::new(Notify::new());
        let (held, ended) = tokio::sync::oneshot::channel::<()>();
        let tells = begun.clone();
        let work = async move {
            tells.notify_one();
            std::future::pending::<()>().await;
            drop(held);
        };
        here.block_on(async {
            tokio::select! {
                _ = run(there.handle(), work) => unreachable!("it waits for ever"),
                () = begun.notified() => {}
            }
            assert!(ended.await.is_err(), "what it held has been let go");
        });
    }
}
