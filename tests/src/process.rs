//! Programs run by tests: what they printed, and how they ended.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A program that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    pub command: String,
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// The standard output of a program that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.success, "{self}");
        self.stdout
    }

    /// What a program that must have failed told on standard error.
    #[track_caller]
    pub fn refused(self) -> String {
        assert!(!self.success, "it succeeded: {self}");
        self.stderr
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.success { "succeeded" } else { "failed" };
        write!(
            f,
            "`{}` {verdict}\n--- stdout\n{}\n--- stderr\n{}",
            self.command, self.stdout, self.stderr
        )
    }
}

/// Runs a command to its end; `seconds_max` later it is killed, which counts as a failure.
#[track_caller]
pub fn run(command: &[&str], environment: &[(&str, &str)], seconds_max: u32) -> Finished {
    run_with_input(command, environment, seconds_max, "")
}

/// [`run`] with something on standard input.
#[track_caller]
pub fn run_with_input(
    command: &[&str],
    environment: &[(&str, &str)],
    seconds_max: u32,
    input: &str,
) -> Finished {
    let mut child = Command::new("timeout")
        .args(["--kill-after=5", &seconds_max.to_string()])
        .args(command)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("standard input is piped");
    let input = input.to_owned();
    // A program that reads nothing closes its end, which is no fault of it.
    let feeder = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let output = child.wait_with_output().expect("a child can be waited for");
    feeder.join().expect("feeding does not panic");
    Finished {
        command: command.join(" "),
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A program that runs beside a test, whose lines arrive as it prints them. It ends with this value.
pub struct Running {
    command: String,
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    #[track_caller]
    pub fn start(command: &[&str], environment: &[(&str, &str)]) -> Running {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let (sender, lines) = channel();
        let stdout = child.stdout.take().expect("standard output is piped");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Running {
            command: command.join(" "),
            child,
            lines,
        }
    }

    /// Waits for a line that contains `text`.
    #[track_caller]
    pub fn line_with(&self, text: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!(
                    "`{}` printed no line with {text:?} within {limit:?}; it printed {seen:#?}",
                    self.command
                ),
            }
        }
    }

    /// A line that contains `text` and is there already; the lines before it are passed over.
    pub fn try_line_with(&self, text: &str) -> Option<String> {
        self.lines.try_iter().find(|line| line.contains(text))
    }

    /// The lines that are there already.
    pub fn lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Whether the program has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end of the program and returns the lines that were not looked at.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Vec<String> {
        let deadline = Instant::now() + limit;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!(
                    "`{}` has not ended within {limit:?}; it printed {seen:#?}",
                    self.command
                ),
            }
        }
        let status = self.child.wait().expect("a child can be waited for");
        assert!(status.success(), "`{}` {status}: {seen:#?}", self.command);
        seen
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks until there is an answer; for states that nothing tells of when they are reached.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(last) if Instant::now() > deadline => {
                panic!("not within {limit:?}: {what}. Last: {last}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
