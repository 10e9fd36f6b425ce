//! What a command tells while it works: a line per step with the time it took; on a terminal, spinners and colours.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The steps of one command, written to standard error.
#[derive(Debug, Clone)]
pub struct Progress {
    start: Instant,
    terminal: Option<MultiProgress>,
}

/// A step under way. Dropped before it is done, it shows as failed.
#[derive(Debug)]
pub struct Step {
    name: String,
    start: Instant,
    bar: Option<ProgressBar>,
    progress: Progress,
    done: bool,
}

impl Default for Progress {
    fn default() -> Self {
        let terminal = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Progress {
            start: Instant::now(),
            terminal: terminal.then(MultiProgress::new),
        }
    }
}

impl Progress {
    /// Begins a step; several may be under way at a time.
    pub fn step(&self, name: impl Into<String>) -> Step {
        let name = name.into();
        let bar = self.terminal.as_ref().map(|terminal| {
            let bar = terminal.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template(" {spinner:.cyan} {msg}") {
                bar.set_style(style);
            }
            bar.set_message(name.clone());
            bar.enable_steady_tick(Duration::from_millis(80));
            bar
        });
        Step {
            name,
            start: Instant::now(),
            bar,
            progress: self.clone(),
            done: false,
        }
    }

    /// Time since the command began.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn line(&self, text: &str) {
        match &self.terminal {
            // Above the spinners that still turn.
            Some(terminal) => drop(terminal.println(text)),
            None => eprintln!("{text}"),
        }
    }
}

impl Step {
    /// Ends the step well.
    pub fn done(mut self) {
        self.end("\u{2713}", "32");
    }

    fn end(&mut self, mark: &str, colour: &str) {
        self.done = true;
        let took = self.start.elapsed().as_secs_f64();
        let at = self.progress.elapsed().as_secs_f64();
        let name = &self.name;
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            self.progress.line(&format!(" \u{1b}[{colour}m{mark}\u{1b}[0m {name:<44} \u{1b}[2m{took:6.2} s  (at {at:.2} s)\u{1b}[0m"));
        } else {
            self.progress
                .line(&format!(" {mark} {name:<44} {took:6.2} s  (at {at:.2} s)"));
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.done {
            self.end("\u{2717}", "31");
        }
    }
}
