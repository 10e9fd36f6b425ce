//! Objects that many write at once: whoever was outrun by another waits in line, and so do all that come after it.
//!
//! A write reads an object, works out what becomes of it, and stores that if nobody else was faster. Of many at once one
//! succeeds, and the others have worked in vain: each round costs all of them, and who loses often enough is refused. One
//! after the other, each is done once. Objects that nobody fights for have no line, and cost a look at an empty map.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

/// Nobody stands in line for longer: whoever is at its head may wait for a webhook that writes the same object.
const PATIENCE: Duration = Duration::from_secs(1);

/// The lines, by the keys of objects. Writes of other servers stand in none of them.
#[derive(Default)]
pub struct Contention {
    lines: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Contention {
    fn lines(&self) -> MutexGuard<'_, HashMap<String, Arc<tokio::sync::Mutex<()>>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place that is taken when there is a line, or when its owner has been outrun.
    pub fn place<'a>(&'a self, key: &'a str) -> Place<'a> {
        Place {
            contention: self,
            key,
            held: Held::Nothing,
        }
    }
}

/// A place in the line of one object. It is given up when it is dropped.
pub struct Place<'a> {
    contention: &'a Contention,
    key: &'a str,
    held: Held,
}

enum Held {
    Nothing,
    Line(Arc<tokio::sync::Mutex<()>>),
    Head(OwnedMutexGuard<()>),
}

impl Place<'_> {
    /// Before an attempt: waits for its turn where others wait, or where an earlier attempt was outrun.
    pub async fn wait(&mut self, outrun: bool) {
        if matches!(self.held, Held::Head(_)) {
            return;
        }
        let line = {
            let mut lines = self.contention.lines();
            match lines.get(self.key) {
                Some(line) => line.clone(),
                None if outrun => lines.entry(self.key.to_owned()).or_default().clone(),
                None => return,
            }
        };
        // Held while it waits, so that the line is there for as long as anybody is in it.
        self.held = Held::Line(line.clone());
        if let Ok(head) = tokio::time::timeout(PATIENCE, line.lock_owned()).await {
            self.held = Held::Head(head);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let line = match std::mem::replace(&mut self.held, Held::Nothing) {
            Held::Nothing => return,
            Held::Line(line) => line,
            Held::Head(head) => OwnedMutexGuard::mutex(&head).clone(),
        };
        let mut lines = self.contention.lines();
        // The map's, and this one's.
        if Arc::strong_count(&line) <= 2 {
            lines.remove(self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn only_who_was_outrun_makes_a_line_and_who_comes_later_stands_in_it() {
        let contention = Contention::default();
        let (mut first, mut second) = (contention.place("a"), contention.place("a"));
        first.wait(false).await;
        assert!(contention.lines().is_empty(), "nobody was outrun");
        first.wait(true).await;
        let mut other = contention.place("b");
        other.wait(false).await;
        assert!(pin!(second.wait(false)).now_or_never().is_none());
        drop(first);
        second.wait(false).await;
        assert!(matches!(second.held, Held::Head(_)));
        drop(second);
        assert!(contention.lines().is_empty(), "it is gone with the last");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let contention = Contention::default();
        let (mut first, mut second) = (contention.place("a"), contention.place("a"));
        first.wait(true).await;
        second.wait(false).await;
        assert!(matches!(second.held, Held::Line(_)));
        drop(first);
        assert_eq!(contention.lines().len(), 1, "one is in it still");
        drop(second);
        assert!(contention.lines().is_empty());
    }

    #[tokio::test]
    async fn who_goes_away_while_it_waits_leaves_no_line() {
        let contention = Contention::default();
        let mut first = contention.place("a");
        first.wait(true).await;
        let mut second = contention.place("a");
        assert!(pin!(second.wait(true)).now_or_never().is_none());
        drop(first);
        assert_eq!(contention.lines().len(), 1);
        drop(second);
        assert!(contention.lines().is_empty());
    }
}
