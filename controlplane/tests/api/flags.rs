//! kubectl's flags that change what is asked of the API: each is seen in what comes of it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::kubectl::WEB;
use crate::server::{Server, text};
use crate::wire::{eventually, watchers};

/// A kubectl that runs on, and its lines as they come.
struct Running {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Running {
    fn start(server: &Server, arguments: &str) -> Self {
        let program = std::env::var("KUBECTL").unwrap_or("kubectl".to_owned());
        let mut child = Command::new(program)
            .arg("--kubeconfig")
            .arg(server.path("admin.kubeconfig"))
            .args(arguments.split_whitespace())
            .env("HOME", server.path(""))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let out = BufReader::new(child.stdout.take().expect("its output"));
        let (said, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The next line that has all the words; those before it are of no interest.
    fn line_with(&self, words: &[&str]) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(20));
            let line = line.unwrap_or_else(|_| panic!("no line with {words:?}"));
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn get_watch_tells_of_every_change() {
    let server = Server::start();
    server.kubectl("create configmap first");
    let watch = Running::start(&server, "get configmaps --watch --output-watch-events");
    watch.line_with(&["ADDED", "first"]);
    server.kubectl("create configmap second --from-literal=a=1");
    watch.line_with(&["ADDED", "second", "1"]);
    server.kubectl("label configmap second tier=one");
    watch.line_with(&["MODIFIED", "second"]);
    server.kubectl("delete configmap second");
    watch.line_with(&["DELETED", "second"]);
    // One object alone, and only what comes from now on.
    let one = Running::start(&server, "get configmap first --watch-only --output=name");
    server.kubectl("create configmap third");
    // The watch may begin after a change; so there is more than one.
    let mut round = 0;
    loop {
        server.kubectl(&format!(
            "annotate configmap first round={round} --overwrite"
        ));
        match one.lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => {
                assert_eq!(line, "configmap/first");
                break;
            }
            Err(_) => round += 1,
        }
        assert!(round < 20, "no change of the object is told of");
    }
}

#[test]
fn wait_ends_with_conditions_fields_and_deletions() {
    let server = Server::start();
    server.kubectl_in("apply -f -", WEB);
    let waits = [
        "wait deployment/web --for=condition=Available --timeout=20s",
        "wait deployment/web --for=jsonpath={.status.readyReplicas}=2 --timeout=20s",
    ]
    .map(|arguments| Running::start(&server, arguments));
    // A patch of the status alone, by the subresource that it is.
    let status = r#"{"status":{"replicas":2,"readyReplicas":2,"conditions":[{"type":"Available","status":"True","reason":"x","message":"y"}]},"spec":{"paused":true}}"#;
    let said = server.kubectl(&format!(
        "patch deployment web --subresource=status --type=merge -p {status}"
    ));
    assert!(said.contains("patched"), "{said}");
    for wait in &waits {
        wait.line_with(&["deployment.apps/web condition met"]);
    }
    let object = server.object("deployment web");
    assert_eq!(
        object["spec"]["paused"],
        Value::Null,
        "the spec is left alone"
    );
    let shown = server
        .kubectl("get deployment web --subresource=status -o jsonpath={.status.readyReplicas}");
    assert_eq!(shown, "2");
    let scale =
        server.kubectl("get deployment web --subresource=scale -o jsonpath={.spec.replicas}");
    assert_eq!(scale, "2");
    let gone = Running::start(&server, "wait service/web --for=delete --timeout=20s");
    eventually("kubectl watches", || watchers(&server, "services") > 0);
    server.kubectl("delete service web");
    gone.line_with(&["service/web condition met"]);
    let late = server.kubectl_fails(
        "wait deployment/web --for=condition=Progressing --timeout=1s",
        "",
    );
    assert!(late.contains("timed out"), "{late}");
}

#[test]
fn diff_shows_what_an_apply_would_change_and_changes_nothing() {
    let server = Server::start();
    server.kubectl_in("apply -f -", WEB);
    let words = ["diff", "-f", "-"];
    let same = server.kubectl_with(&words, WEB);
    assert_eq!(
        (same.status.code(), text(&same.stdout)),
        (Some(0), String::new())
    );
    let changed = WEB
        .replace("replicas: 2", "replicas: 5")
        .replace("1.27", "1.28");
    for words in [
        &words[..],
        &["diff", "--server-side", "--force-conflicts", "-f", "-"],
    ] {
        let output = server.kubectl_with(words, &changed);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        let shown = text(&output.stdout);
        for line in ["-  replicas: 2", "+  replicas: 5", "nginx:1.28"] {
            assert!(shown.contains(line), "{shown}");
        }
    }
    assert_eq!(server.object("deployment web")["spec"]["replicas"], 2);
}

#[test]
fn fields_that_do_not_exist_are_refused_told_of_or_dropped_as_asked() {
    let server = Server::start();
    let wrong = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, dta: {a: b}}";
    let refused = server.kubectl_fails("create --validate=strict -f -", wrong);
    assert!(refused.contains("unknown field \"dta\""), "{refused}");
    let output = server.kubectl_with(&["create", "--validate=warn", "-f", "-"], wrong);
    let told = text(&output.stderr);
    assert!(
        output.status.success() && told.contains("Warning: unknown field \"dta\""),
        "{told}"
    );
    server.kubectl("delete configmap c");
    let output = server.kubectl_with(&["create", "--validate=ignore", "-f", "-"], wrong);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        text(&output.stderr)
    );
    // Twice the same field, as kubectl itself would not send it.
    let twice = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"d"},"data":{"a":"1"},"data":{"a":"2"}}"#;
    let maps = "/api/v1/namespaces/default/configmaps";
    let post = ["-H", "Content-Type: application/json", "--data", twice];
    let (code, _, body) = server.curl(&post, &format!("{maps}?fieldValidation=Strict"));
    assert_eq!(code, 400);
    assert!(
        text(&body).contains("duplicate field \\\"data\\\""),
        "{}",
        text(&body)
    );
    let (code, ..) = server.curl(&post, &format!("{maps}?fieldValidation=Ignore"));
    assert_eq!(code, 201);
}

#[test]
fn two_managers_share_an_object_until_they_want_the_same_field() {
    let server = Server::start();
    let first =
        "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: shared}, data: {a: one, b: one}}";
    let second =
        "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: shared}, data: {b: two, c: two}}";
    server.kubectl_in("apply --server-side --field-manager=first -f -", first);
    let refused = server.kubectl_fails("apply --server-side --field-manager=second -f -", second);
    assert!(
        refused.contains("Apply failed with 1 conflict: conflict with \"first\": .data.b"),
        "{refused}"
    );
    server.kubectl_in(
        "apply --server-side --field-manager=second --force-conflicts -f -",
        second,
    );
    // What the first one gives up stays when another has it, and goes when nobody has.
    let less = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: shared}, data: {}}";
    server.kubectl_in("apply --server-side --field-manager=first -f -", less);
    let data = server.object("configmap shared")["data"].clone();
    assert_eq!(data, serde_json::json!({"b": "two", "c": "two"}));
    // Replicas by way of the scale are a field like any other.
    server.kubectl_in("apply --server-side --field-manager=first -f -", WEB);
    let scale = r#"{"apiVersion":"autoscaling/v1","kind":"Scale","metadata":{"name":"web"},"spec":{"replicas":7}}"#;
    let path = "/apis/apps/v1/namespaces/default/deployments/web/scale?fieldManager=scaler";
    let patch = [
        "-X",
        "PATCH",
        "-H",
        "Content-Type: application/apply-patch+yaml",
        "--data",
        scale,
    ];
    let (code, _, body) = server.curl(&patch, path);
    assert_eq!(code, 409, "{}", text(&body));
    assert!(text(&body).contains(".spec.replicas"), "{}", text(&body));
    let (code, _, body) = server.curl(&patch, &format!("{path}&force=true"));
    assert_eq!(code, 200, "{}", text(&body));
    let web = server.object("deployment web");
    assert_eq!(web["spec"]["replicas"], 7);
    let managers = web["metadata"]["managedFields"]
        .as_array()
        .expect("managers");
    let scaler = managers
        .iter()
        .find(|entry| entry["manager"] == "scaler")
        .expect("the scaler");
    assert_eq!(
        (
            &scaler["subresource"],
            &scaler["operation"],
            &scaler["apiVersion"]
        ),
        (&"scale".into(), &"Apply".into(), &"apps/v1".into())
    );
    assert_eq!(
        scaler["fieldsV1"],
        serde_json::json!({"f:spec": {"f:replicas": {}}})
    );
    let refused = server.kubectl_fails("apply --server-side --field-manager=first -f -", WEB);
    assert!(
        refused.contains("conflict with \"scaler\" with subresource \"scale\""),
        "{refused}"
    );
}

#[test]
fn a_list_is_fetched_in_chunks() {
    let server = Server::start();
    let maps: Vec<String> = (0..25)
        .map(|number| {
            format!("---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: m{number:02}}}}}\n")
        })
        .collect();
    server.kubectl_in("create -f -", &maps.concat());
    let words = [
        "get",
        "configmaps",
        "--chunk-size=10",
        "--output=name",
        "-v=8",
    ];
    let output = server.kubectl_with(&words, "");
    let asked = text(&output.stderr);
    let pages = asked
        .lines()
        .filter(|line| line.contains("limit=10"))
        .count();
    assert!(pages >= 3, "{pages} pages:\n{asked}");
    assert!(asked.contains("continue="), "{asked}");
    assert_eq!(text(&output.stdout).lines().count(), 25);
}

#[test]
fn every_kind_is_explained_to_its_leaves() {
    let server = Server::start();
    let listed = server.kubectl("api-resources --no-headers");
    // A few at a time: each is a program of its own.
    let names: Vec<(&str, &str)> = listed
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Name, short names if there are any, version, scope, kind.
            (words[0], words[words.len() - 3])
        })
        .collect();
    assert!(names.len() > 60, "{listed}");
    std::thread::scope(|scope| {
        for part in names.chunks(names.len().div_ceil(4)) {
            let server = &server;
            scope.spawn(move || {
                for (name, version) in part {
                    let arguments = format!("explain {name} --api-version={version} --recursive");
                    let said = server.kubectl(&arguments);
                    assert!(
                        said.contains("KIND:") && said.contains("DESCRIPTION:"),
                        "{said}"
                    );
                    let empty = said.contains("<empty>");
                    let fields = said.lines().filter(|line| line.contains('<')).count();
                    assert!(!empty && fields > 2, "{name}: {said}");
                }
            });
        }
    });
}
