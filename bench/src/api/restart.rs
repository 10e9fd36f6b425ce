//! Servers that are killed and started again as they were: how soon they answer, with all that they kept.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keelway::process::Process;
use nix::sys::signal::Signal;

use super::endpoint::{Caller, Endpoint};
use super::work::{self, List};

/// How long processes may take to end, and a server to answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one question may take; the next one is asked on a new connection.
const QUESTION: Duration = Duration::from_secs(20);
/// Nothing tells that a server listens: so often it is asked.
const LOOK: Duration = Duration::from_millis(2);
const LAST_WORDS: i64 = 2000;

/// From when the first process was started.
pub struct Times {
    /// Until the server had answered with an object that it was asked for.
    pub first: Duration,
    /// Until it had answered with all of them.
    pub whole: Duration,
}

/// The processes of an endpoint. They end with this value, if it has ever started them.
pub struct Server {
    processes: Vec<Restartable>,
}

impl Server {
    /// # Errors
    /// When its processes are not known, or cannot be looked into.
    pub fn of(endpoint: &Endpoint) -> Result<Self> {
        let name = &endpoint.name;
        ensure!(
            !endpoint.pids().is_empty(),
            "--restart ends and starts the processes of {name}: name them by --pids {name}=PID"
        );
        let processes = endpoint
            .pids()
            .iter()
            .map(|pid| Restartable::of(*pid).with_context(|| format!("process {pid} of {name}")));
        Ok(Self {
            processes: processes.collect::<Result<_>>()?,
        })
    }

    /// Kills all of its processes, starts them again, the last one named first, and waits until all the pods are listed.
    pub async fn again(&mut self, endpoint: &mut Endpoint, pods: usize) -> Result<Times> {
        for process in &mut self.processes {
            process.end(Signal::SIGKILL)?;
        }
        let began = Instant::now();
        for process in self.processes.iter_mut().rev() {
            process.start()?;
        }
        endpoint.set_pids(self.processes.iter().map(Restartable::pid).collect());
        let first = self.asked(endpoint, began, work::one).await?;
        let all = async |caller: &Caller| List::Whole.once(caller, pods).await.map(drop);
        let whole = self.asked(endpoint, began, all).await?;
        Ok(Times { first, whole })
    }

    /// Asks until there is an answer; gives how long that was since it began.
    async fn asked(
        &mut self,
        endpoint: &Endpoint,
        began: Instant,
        ask: impl AsyncFn(&Caller) -> Result<()>,
    ) -> Result<Duration> {
        loop {
            let caller = endpoint.caller()?;
            let answer = tokio::time::timeout(QUESTION, ask(&caller)).await;
            let error = match answer {
                Ok(Ok(())) => return Ok(began.elapsed()),
                Ok(Err(error)) => error,
                Err(late) => late.into(),
            };
            for process in &mut self.processes {
                process.check()?;
            }
            if began.elapsed() > PATIENCE {
                return Err(error.context(format!(
                    "{}: no answer in {} s",
                    endpoint.name,
                    PATIENCE.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Asks what was started to end, the server before its store.
    pub fn stop(mut self) -> Result<()> {
        self.processes
            .iter_mut()
            .filter(|process| process.child.is_some())
            .try_for_each(|process| process.end(Signal::SIGTERM))
    }
}

/// A process with all that it takes to start it once more: as whoever measures, and with that one's limits.
struct Restartable {
    process: Process,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: PathBuf,
    /// What it said since it was started here.
    said: fs::File,
    child: Option<Child>,
}

impl Restartable {
    fn of(pid: u32) -> Result<Self> {
        let process = Process::now(pid).context("there is none")?;
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let program = fs::read_link(proc.join("exe"))?;
        ensure!(
            program.is_file(),
            "{} has been replaced since it was started: start it again",
            program.display()
        );
        let args = strings(&proc.join("cmdline"))?;
        ensure!(!args.is_empty(), "it has ended");
        let env = strings(&proc.join("environ"))?.into_iter();
        Ok(Self {
            process,
            program,
            args,
            env: env.filter_map(variable).collect(),
            folder: fs::read_link(proc.join("cwd"))?,
            said: tempfile::tempfile()?,
            child: None,
        })
    }

    fn start(&mut self) -> Result<()> {
        self.said.set_len(0)?;
        self.said.seek(SeekFrom::Start(0))?;
        let (name, args) = self.args.split_first().context("a name of its own")?;
        let child = Command::new(&self.program)
            .arg0(name)
            .args(args)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(self.said.try_clone()?)
            .stderr(self.said.try_clone()?)
            .spawn()
            .with_context(|| self.program.display().to_string())?;
        let process = Process::now(child.id());
        self.child = Some(child);
        self.process = process.context("it is not there, and nobody has waited for its end")?;
        Ok(())
    }

    fn pid(&self) -> u32 {
        self.process.pid
    }

    /// # Errors
    /// When it has ended: with what it said.
    fn check(&mut self) -> Result<()> {
        let Some(ended) = self
            .child
            .as_mut()
            .map(Child::try_wait)
            .transpose()?
            .flatten()
        else {
            return Ok(());
        };
        let mut words = Vec::new();
        let length = i64::try_from(self.said.metadata()?.len())?;
        let from = u64::try_from((length - LAST_WORDS).max(0))?;
        self.said.seek(SeekFrom::Start(from))?;
        self.said.read_to_end(&mut words)?;
        bail!(
            "{} was started again and has ended ({ended}): {}",
            self.program.display(),
            String::from_utf8_lossy(&words).trim()
        )
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        self.process
            .signal_and_wait(signal, PATIENCE)
            .with_context(|| self.program.display().to_string())?;
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Restartable {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Nobody is left to be told.
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

/// What is in a file of /proc whose strings end with zeros.
fn strings(path: &Path) -> io::Result<Vec<OsString>> {
    let mut bytes = fs::read(path)?;
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let each = bytes.split(|byte| *byte == 0);
    Ok(each.map(|each| OsString::from_vec(each.to_vec())).collect())
}

fn variable(text: OsString) -> Option<(OsString, OsString)> {
    let bytes = text.into_vec();
    let middle = bytes.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (bytes[..middle].to_vec(), bytes[middle + 1..].to_vec());
    (!name.is_empty()).then(|| (OsString::from_vec(name), OsString::from_vec(value)))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::fd::AsRawFd as _;

    use super::*;

    /// A shell that waits for a line, and its arguments. It says so first: a process that was just made has none for a moment.
    fn waiting(command: &mut Command) -> (Child, Restartable) {
        let mut child = command
            .args(["-c", "echo there; read line", "", "with spaces and\nlines"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut said = BufReader::new(child.stdout.take().expect("its words"));
        said.read_line(&mut String::new()).expect("a word");
        let process = Restartable::of(child.id()).expect("it runs");
        (child, process)
    }

    /// Kills it, and has it started again with other arguments.
    fn instead(process: &mut Restartable, first: &mut Child, args: &[&str]) {
        process.end(Signal::SIGKILL).expect("it ends");
        first.wait().expect("reaped");
        process.args = args.iter().map(OsString::from).collect();
        process.start().expect("it starts");
    }

    #[test]
    fn a_process_is_started_again_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut shell = Command::new("/bin/sh");
        shell.env_clear().envs([("KEY", "a=b c"), ("EMPTY", "")]);
        let (mut first, mut process) = waiting(shell.current_dir(folder.path()));
        assert_eq!(process.args.len(), 5, "{:?}", process.args);
        assert_eq!(process.args[4], "with spaces and\nlines");
        assert_eq!(process.env.len(), 2, "{:?}", process.env);
        let script = r#"[ "$KEY$EMPTY" = "a=b c" ] && pwd; exec sleep 1000"#;
        instead(&mut process, &mut first, &["sh", "-c", script]);
        assert_ne!(process.pid(), first.id());
        let said = || fs::read_to_string(format!("/proc/self/fd/{}", process.said.as_raw_fd()));
        let began = Instant::now();
        while said().expect("its words").is_empty() && began.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        let said = said().expect("its words");
        assert_eq!(Path::new(said.trim()), folder.path());
        process.check().expect("it runs");
        process.end(Signal::SIGTERM).expect("it ends");
        assert!(Process::now(process.pid()).is_none(), "and is reaped");
    }

    #[test]
    fn one_that_ends_says_why() {
        let (mut first, mut process) = waiting(&mut Command::new("/bin/sh"));
        instead(
            &mut process,
            &mut first,
            &["sh", "-c", "echo no room >&2; exit 3"],
        );
        let child = process.child.as_mut().expect("started");
        child.wait().expect("it ends by itself");
        let error = process.check().expect_err("it has ended").to_string();
        assert!(error.ends_with("(exit status: 3): no room"), "{error}");
    }

    #[test]
    fn what_has_ended_cannot_be_started_again() {
        let mut child = Command::new("/bin/true").spawn().expect("true");
        child.wait().expect("reaped");
        assert!(Restartable::of(child.id()).is_err());
    }
}
