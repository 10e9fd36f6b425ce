//! Answers that nobody reads. A client that asks for a list and does not read it holds the records of it, and its connection: after a
//! while it is cut off.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::reply::{Answer, Body, BodyError, InChunks};

/// Unread is what of a connection's streamed answers waits for its client.
#[derive(Default)]
pub struct Unread {
    answers: Mutex<Answers>,
    begun: Notify,
}

#[derive(Default)]
struct Answers {
    next: u64,
    /// Since when the client is to take more of each; None while there is nothing to take, as mostly of a watch.
    since: BTreeMap<u64, Option<Instant>>,
}

impl Unread {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer, followed until it is over, if it is a list in chunks. Who reads a watch, a log or what another server says may pause.
    pub fn follow(self: &Arc<Self>, answer: Answer) -> Answer {
        let is_list = answer.extensions().get::<InChunks>().is_some();
        if !is_list || answer.body().size_hint().exact().is_some() {
            return answer;
        }
        let number = {
            let mut answers = self.answers();
            let number = answers.next;
            answers.next += 1;
            answers.since.insert(number, None);
            number
        };
        self.begun.notify_one();
        let unread = self.clone();
        answer.map(|body| {
            let followed = Followed {
                body,
                number,
                unread,
            };
            followed.boxed_unsync()
        })
    }

    fn set(&self, number: u64, since: Option<Instant>) {
        self.answers().since.insert(number, since);
    }

    /// Waits until the client has taken nothing of an answer for so long.
    pub async fn for_longer_than(&self, patience: Duration) {
        loop {
            let oldest = {
                let answers = self.answers();
                let waiting = answers.since.values().flatten().min().copied();
                waiting.or((!answers.since.is_empty()).then(Instant::now))
            };
            match oldest {
                None => self.begun.notified().await,
                Some(since) if since.elapsed() >= patience => return,
                Some(since) => tokio::time::sleep_until(since + patience).await,
            }
        }
    }
}

struct Followed {
    body: Body,
    number: u64,
    unread: Arc<Unread>,
}

impl HttpBody for Followed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        this.unread.set(this.number, None);
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        if matches!(frame, Some(Ok(_))) {
            this.unread.set(this.number, Some(Instant::now()));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.unread.answers().since.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use http::Response;

    use super::*;
    use crate::api::reply;

    const PATIENCE: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn what_the_client_is_to_take_waits_and_what_is_not_there_yet_does_not() {
        let unread = Arc::new(Unread::default());
        let whole = Response::new(reply::full("small"));
        drop(unread.follow(whole));
        assert!(unread.answers().since.is_empty(), "it was not followed");
        let parts = futures::stream::iter(["a", "b"].map(Bytes::from));
        let chunks = futures::StreamExt::chain(parts, futures::stream::pending());
        let log = Response::new(reply::streamed(futures::stream::pending()));
        drop(unread.follow(log));
        assert_eq!(unread.answers().next, 0, "who reads a log may pause");
        let mut list = Response::new(reply::streamed(chunks));
        list.extensions_mut().insert(InChunks);
        let mut answer = unread.follow(list);
        for _ in 0..2 {
            answer
                .body_mut()
                .frame()
                .await
                .expect("a part")
                .expect("whole");
            // Nobody asks for more.
            unread.for_longer_than(PATIENCE).await;
        }
        assert!(answer.body_mut().frame().now_or_never().is_none());
        assert_eq!(unread.answers().since[&0], None, "the client waits, not we");
        drop(answer);
        assert!(unread.answers().since.is_empty());
    }
}
