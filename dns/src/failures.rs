//! Failures to ask others, in the log: how often the same is said, and what an operator wants to be told of together.

use std::collections::HashMap;
use std::mem::{Discriminant, discriminant, take};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::Level;

use crate::forward::{ForwardError, Question};
use crate::log::{Consolidate, ErrorRules, type_name};
use crate::name::Name;

/// An event of a level that is known at run time only.
macro_rules! say {
    ($level:expr, $($what:tt)*) => {
        match $level {
            Level::ERROR => tracing::error!($($what)*),
            Level::WARN => tracing::warn!($($what)*),
            Level::INFO => tracing::info!($($what)*),
            _ => tracing::debug!($($what)*),
        }
    };
}

/// Failures of one block, and what was said of them.
#[derive(Debug, Default)]
pub struct Failures {
    consolidated: Vec<Arc<Gathered>>,
    is_off: bool,
    told: Mutex<HashMap<Sort, Told>>,
}

/// Failures that say the same: of a kind, and of one upstream where it is an upstream's.
type Sort = (Discriminant<ForwardError>, Option<SocketAddr>);

/// When a failure of a sort was logged last, and how many have not been since: they come by the hundred thousand.
#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    untold: u64,
}

impl Told {
    /// Whether this one is to be logged, and with how many others.
    fn tell(&mut self, now: Instant) -> Option<u64> {
        const EVERY: Duration = Duration::from_secs(1);
        let since = self.last.map(|last| now.saturating_duration_since(last));
        if since.is_some_and(|since| since < EVERY) {
            self.untold += 1;
            return None;
        }
        self.last = Some(now);
        Some(take(&mut self.untold))
    }
}

/// What a rule has counted in the time that is running.
#[derive(Debug)]
struct Gathered {
    rule: Consolidate,
    count: AtomicU64,
}

/// A time in which failures are counted; they are told of when it is dropped, at its end or the server's.
struct During {
    gathered: Arc<Gathered>,
    begun: Instant,
}

impl Drop for During {
    fn drop(&mut self) {
        let rule = &self.gathered.rule;
        let count = self.gathered.count.swap(0, Ordering::Relaxed);
        if count > u64::from(rule.shows_first) {
            let (like, last) = (rule.like.as_str(), self.begun.elapsed());
            // Worded as CoreDNS does.
            say!(
                rule.level,
                "{count} errors like '{like}' occurred in last {:.0?}",
                last
            );
        }
    }
}

impl Failures {
    /// By some rules; without, nothing is said.
    pub fn by(rules: Option<&ErrorRules>) -> Self {
        let all = rules.map_or_else(Vec::new, |rules| rules.consolidated.clone());
        let gathered = |rule| {
            Arc::new(Gathered {
                rule,
                count: AtomicU64::new(0),
            })
        };
        Self {
            consolidated: all.into_iter().map(gathered).collect(),
            is_off: rules.is_none(),
            told: Mutex::default(),
        }
    }

    /// Tells the operator of a question that could not be asked, or was not answered: at once, unless the same was said less than a second
    /// ago, or when the time of a rule is over. Within a runtime; with nothing locked, since whoever reads the log may be slow.
    pub fn tell(&self, question: &Question, error: &ForwardError, now: Instant) {
        if self.is_off {
            return;
        }
        let (level, others) = match self.rule(error) {
            Some(gathered) => {
                if gathered.count.fetch_add(1, Ordering::Relaxed) > 0 {
                    return;
                }
                let during = During {
                    gathered: gathered.clone(),
                    begun: now,
                };
                tokio::spawn(async move {
                    tokio::time::sleep(during.gathered.rule.during).await;
                });
                if !gathered.rule.shows_first {
                    return;
                }
                (gathered.rule.level, 0)
            }
            None => match self.others(error, now) {
                Some(others) => (Level::WARN, others),
                None => return,
            },
        };
        let (name, rtype) = (Name::from_wire(&question.name), type_name(question.rtype));
        let others = (others > 0).then_some(others);
        say!(level, %name, %rtype, %error, others, "forwarding");
    }

    fn rule(&self, error: &ForwardError) -> Option<&Arc<Gathered>> {
        if self.consolidated.is_empty() {
            return None;
        }
        let (ours, theirs) = (error.to_string(), error.as_coredns_has_it());
        let mut all = self.consolidated.iter();
        all.find(|one| one.rule.like.is_match(&ours) || one.rule.like.is_match(&theirs))
    }

    fn others(&self, error: &ForwardError, now: Instant) -> Option<u64> {
        let sort = (discriminant(error), error.server());
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.entry(sort).or_default().tell(now)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use regex::Regex;

    use super::*;
    use crate::query::rtype;

    fn question() -> Question {
        Question {
            name: Name::parse("www.example.org")
                .expect("a name")
                .wire()
                .into(),
            rtype: rtype::A,
            dnssec_ok: false,
            checking_disabled: false,
        }
    }

    fn silence() -> ForwardError {
        ForwardError::Silence(Duration::from_secs(5))
    }

    fn refused(server: [u8; 4]) -> ForwardError {
        ForwardError::Io {
            server: (server, 53).into(),
            source: io::ErrorKind::ConnectionRefused.into(),
        }
    }

    /// What is written to the log while a future is polled on this thread.
    async fn logged(what: impl Future<Output = ()>) -> Vec<String> {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().expect("no panic").write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let writer = sink.clone();
        let log = tracing_subscriber::fmt().with_ansi(false).without_time();
        let log = log.with_writer(move || writer.clone()).finish();
        let guard = tracing::subscriber::set_default(log);
        what.await;
        drop(guard);
        let bytes = sink.0.lock().expect("no panic").clone();
        let text = String::from_utf8(bytes).expect("text");
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    #[test]
    fn of_failures_of_a_sort_one_a_second_is_told_with_the_number_of_the_others() {
        let (failures, begun) = (Failures::default(), Instant::now());
        let told = |error, millis| failures.others(&error, begun + Duration::from_millis(millis));
        assert_eq!(told(silence(), 0), Some(0));
        assert!((1..1000).all(|millis| told(silence(), millis).is_none()));
        // Another upstream's are another matter, and so is another failure of the same.
        assert_eq!(told(refused([192, 0, 2, 1]), 500), Some(0));
        assert_eq!(told(refused([192, 0, 2, 2]), 500), Some(0));
        assert_eq!(told(refused([192, 0, 2, 1]), 600), None);
        assert_eq!(told(silence(), 1000), Some(999));
        assert_eq!(told(silence(), 2500), Some(0));
        assert_eq!(told(refused([192, 0, 2, 1]), 1500), Some(1));
    }

    fn rule(like: &str, shows_first: bool) -> Consolidate {
        Consolidate {
            like: Regex::new(like).expect("an expression"),
            during: Duration::from_secs(300),
            level: Level::ERROR,
            shows_first,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_consolidated_has_one_line_when_its_time_is_over() {
        let rules = ErrorRules {
            // In CoreDNS's words, and in our own.
            consolidated: vec![
                rule("^read udp .* i/o timeout$", false),
                rule("192.0.2.1:53: ", true),
            ],
        };
        let failures = Failures::by(Some(&rules));
        let lines = logged(async {
            let tell = |error| failures.tell(&question(), &error, Instant::now());
            for _ in 0..3 {
                tell(silence());
                tell(refused([192, 0, 2, 1]));
            }
            tell(refused([192, 0, 2, 2]));
            tokio::time::sleep(Duration::from_secs(301)).await;
            tell(refused([192, 0, 2, 1]));
            tokio::time::sleep(Duration::from_secs(301)).await;
        });
        let lines = lines.await;
        let [first, other, timeouts, refusals, again] = &lines[..] else {
            panic!("{lines:#?}")
        };
        assert!(first.starts_with("ERROR") && first.contains("192.0.2.1:53"));
        assert!(other.starts_with("WARN") && other.contains("192.0.2.2:53"));
        assert!(timeouts.contains("3 errors like '^read udp .* i/o timeout$' occurred in last"));
        assert!(refusals.contains("3 errors like '192.0.2.1:53: ' occurred in last"));
        // The only one of its time has been told.
        assert!(again.contains("www.example.org") && again.contains("192.0.2.1:53"));
    }

    #[tokio::test]
    async fn nothing_is_said_where_errors_are_not_logged() {
        let failures = Failures::by(None);
        let lines = logged(async { failures.tell(&question(), &silence(), Instant::now()) });
        assert_eq!(lines.await, [""; 0]);
    }

    #[test]
    fn what_is_counted_when_the_server_ends_is_told() {
        let rules = ErrorRules {
            consolidated: vec![rule(".", false)],
        };
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().build().expect("a runtime");
        let failures = Failures::by(Some(&rules));
        let lines = futures::executor::block_on(logged(async {
            let entered = runtime.enter();
            failures.tell(&question(), &silence(), Instant::now());
            drop(entered);
            drop(runtime);
        }));
        assert!(
            matches!(&lines[..], [one] if one.contains("1 errors like '.'")),
            "{lines:?}"
        );
    }
}
