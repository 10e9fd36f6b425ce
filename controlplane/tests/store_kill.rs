//! An answered write survives kill -9: a child process writes as fast as it can and reports each answer; it is killed
//! in the middle, and everything it reported must be there.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use bytes::Bytes;
use keelway_controlplane::store::{Embedded, EmbeddedConfig, Expect, Store};

const FILE_VARIABLE: &str = "STORE_KILL_FILE";

fn key(task: usize, i: usize) -> String {
    format!("/core/pods/default/{task}-{i}")
}

/// The child's part: does nothing unless the parent started it.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Ok(file) = std::env::var(FILE_VARIABLE) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Arc::new(Embedded::open(&EmbeddedConfig::at(file)).unwrap());
        let tasks = (0..4).map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for i in 0.. {
                    let record = store
                        .put(&key(task, i), Bytes::from(vec![b'x'; 700]), Expect::Absent)
                        .await
                        .unwrap();
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "answered {task} {i} {}", record.revision).unwrap();
                    out.flush().unwrap();
                }
            })
        });
        futures::future::join_all(tasks).await;
    });
}

fn answered_before_the_kill(file: &Path, count: usize) -> Vec<(usize, usize, u64)> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child_that_writes_until_it_is_killed",
            "--nocapture",
        ])
        .env(FILE_VARIABLE, file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut answers = Vec::new();
    for line in lines {
        let line = line.unwrap();
        let Some(answer) = line.split_once("answered ").map(|(_, a)| a) else {
            continue;
        };
        let mut numbers = answer.split(' ').map(|n| n.parse::<u64>());
        // The last line may be cut short by the kill.
        let (Some(Ok(task)), Some(Ok(i)), Some(Ok(revision))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            break;
        };
        answers.push((task as usize, i as usize, revision));
        if answers.len() == count {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    assert!(
        answers.len() >= count,
        "the child answered {} writes only",
        answers.len()
    );
    answers
}

#[test]
fn answered_writes_survive_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.redb");
    let answers = answered_before_the_kill(&file, 400);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let store = Embedded::open(&EmbeddedConfig::at(&file)).unwrap();
    for (task, i, revision) in &answers {
        let record = runtime.block_on(store.get(&key(*task, *i))).unwrap();
        let record = record.unwrap_or_else(|| panic!("{task}-{i} was answered and is gone"));
        assert_eq!((record.revision.0, record.value.len()), (*revision, 700));
    }
    assert!(store.revision().0 >= answers.iter().map(|a| a.2).max().unwrap());
}
