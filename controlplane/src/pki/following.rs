//! What is made of files that others replace: whoever asks gets what they hold now.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How often it is looked whether files have changed, when somebody asks.
pub const LOOK_PERIOD: Duration = Duration::from_secs(2);

/// What changes when one of some files is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp(Vec<Option<(SystemTime, u64, u64)>>);

impl Stamp {
    pub fn of<P: AsRef<Path>>(files: &[P]) -> Self {
        let of = |path: &P| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.ino(), meta.len()))
        };
        Self(files.iter().map(of).collect())
    }

    /// Waits until one of the files is another, and gives how they are then.
    pub async fn changed<P: AsRef<Path>>(&self, files: &[P]) -> Self {
        loop {
            tokio::time::sleep(LOOK_PERIOD).await;
            let now = Self::of(files);
            if now != *self {
                return now;
            }
        }
    }
}

type Make<T> = Box<dyn Fn() -> Result<T, String> + Send + Sync>;

/// Something made of files, made anew once they have changed. While they hold nothing usable, it stays as it is.
pub struct Following<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    stamp: Stamp,
    looked: Instant,
}

impl<T> fmt::Debug for Following<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Following").field(&self.files).finish()
    }
}

impl<T> Following<T> {
    /// # Errors
    /// When nothing can be made of the files yet.
    pub fn new<E: fmt::Display>(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, E> {
        // Looked at before they are read: what changes in between is seen the next time.
        let stamp = Stamp::of(&files);
        let state = State {
            current: Arc::new(make()?),
            stamp,
            looked: Instant::now(),
        };
        Ok(Arc::new(Self {
            files,
            make: Box::new(move || make().map_err(|error| error.to_string())),
            state: Mutex::new(state),
        }))
    }

    pub fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= LOOK_PERIOD {
            self.look(&mut state);
        }
        state.current.clone()
    }

    fn look(&self, state: &mut State<T>) {
        state.looked = Instant::now();
        let stamp = Stamp::of(&self.files);
        if stamp == state.stamp {
            return;
        }
        match (self.make)() {
            Ok(new) => {
                tracing::info!(files = ?self.files, "what they hold now is used");
                state.current = Arc::new(new);
                state.stamp = stamp;
            }
            // One of several files may be replaced already: they are looked at again soon.
            Err(error) => tracing::warn!(error, "what was there before stays in use"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked_at<T>(following: &Following<T>) -> Arc<T> {
        let mut state = following.state.lock().unwrap();
        following.look(&mut state);
        state.current.clone()
    }

    #[test]
    fn a_file_that_is_replaced_is_read_again_and_one_that_is_spoilt_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let read = {
            let path = path.clone();
            move || match fs::read_to_string(&path) {
                Ok(text) if text.is_empty() => Err("it is empty".to_owned()),
                read => read.map_err(|error| error.to_string()),
            }
        };
        assert!(Following::new(vec![path.clone()], read.clone()).is_err());
        fs::write(&path, "one").unwrap();
        let following = Following::new(vec![path.clone()], read).unwrap();
        let put = |text: &str| {
            let new = folder.path().join("new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &path).unwrap();
        };
        let first = looked_at(&following);
        assert_eq!(*first, "one");
        assert!(Arc::ptr_eq(&looked_at(&following), &first));
        put("two");
        assert_eq!(*looked_at(&following), "two");
        put("");
        assert_eq!(*looked_at(&following), "two");
        put("three");
        assert_eq!(*looked_at(&following), "three");
    }
}
