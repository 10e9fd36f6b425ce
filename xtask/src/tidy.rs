//! Conventions of docs/STYLE.md and docs/ARCHITECTURE.md that code can check.

mod coverage;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::process;
use crate::project::Project;

/// Who may import whom, as in docs/ARCHITECTURE.md. `tests` and `bench` may import anything; nothing imports them or xtask.
const IMPORTS: &[(&str, &[&str])] = &[
    ("dataplane-abi", &[]),
    ("dataplane-ebpf", &["dataplane-abi"]),
    ("cluster-model", &[]),
    ("keelway-cni", &[]),
    ("keelway-dns", &["cluster-model"]),
    (
        "keelway-agent",
        &[
            "cluster-model",
            "dataplane-abi",
            "keelway-cni",
            "keelway-dns",
        ],
    ),
    ("keelway-controlplane", &[]),
    ("keelway-kubelet", &[]),
    ("keelway", &[]),
    ("keelway-image-programs", &[]),
    ("keelway-fuzz", &["cluster-model"]),
    ("xtask", &[]),
];
const IMPORT_ANYTHING: &[&str] = &["keelway-tests", "keelway-bench"];

/// Module names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &[
    "utils", "util", "helpers", "helper", "manager", "common", "misc",
];

/// Lines a source file may have. The style asks for 150 to 500; past this a file is certainly several.
const FILE_LINES_MAX: usize = 900;

/// Files that may hold unsafe code, besides every `sys.rs` and the eBPF binary.
const UNSAFE_FOLDERS: &[&str] = &[
    "dataplane-abi/src",
    "dataplane-ebpf/src/bin",
    "dataplane-ebpf/src/main.rs",
];

/// Crates that a plan, check or diff must not see: it is a pure function of a snapshot.
const IMPURE: &[&str] = &["tokio", "kube", "aya"];
const PURE_MODULES: &[&str] = &["plan", "check", "diff"];

/// Checks every convention and lists what breaks one.
pub fn run(project: &Project) -> Result<()> {
    let mut faults = imports(project)?;
    let mut all = Vec::new();
    for file in sources(&project.root)? {
        let text = fs::read_to_string(project.root.join(&file))?;
        faults.extend(source_faults(&file, &text));
        all.push((file, text));
    }
    let document = fs::read_to_string(project.root.join("docs/coverage.md"))?;
    let all: Vec<(&Path, &str)> = all
        .iter()
        .map(|(file, text)| (file.as_path(), text.as_str()))
        .collect();
    faults.extend(coverage::faults(&document, &all));
    faults.extend(image_faults(project)?);
    if faults.is_empty() {
        return Ok(());
    }
    bail!("conventions are broken:\n  {}", faults.join("\n  "))
}

fn imports(project: &Project) -> Result<Vec<String>> {
    let metadata = process::stdout_of(process::cargo(&project.root).args([
        "metadata",
        "--no-deps",
        "--locked",
        "--format-version",
        "1",
    ]))?;
    Ok(import_faults(&serde_json::from_str(&metadata)?))
}

fn import_faults(metadata: &Value) -> Vec<String> {
    let rules: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    let packages = || metadata["packages"].as_array().into_iter().flatten();
    let name_of = |package: &'_ Value| package["name"].as_str().unwrap_or_default().to_owned();
    let ours: Vec<String> = packages().map(name_of).collect();
    let mut faults = Vec::new();
    for package in packages() {
        let name = name_of(package);
        let Some(allowed) = rules.get(name.as_str()) else {
            if !IMPORT_ANYTHING.contains(&name.as_str()) {
                faults.push(format!("package {name} is in no import rule; add it to xtask/src/tidy.rs and docs/ARCHITECTURE.md"));
            }
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            // Tests of a crate may use another's types or the test support.
            let is_dev = dependency["kind"] == "dev";
            if ours.iter().any(|our| our == on) && !allowed.contains(&on) && !is_dev {
                faults.push(format!(
                    "{name} must not import {on} (docs/ARCHITECTURE.md, \"Who may import whom\")"
                ));
            }
        }
    }
    faults
}

/// Examples are applied by kubectl alone, so they name the images of this very version.
fn image_faults(project: &Project) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for entry in fs::read_dir(project.root.join("examples"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        for stale in stale_images(&text, project.version) {
            faults.push(format!(
                "{} names {stale}; this is version {}",
                path.display(),
                project.version
            ));
        }
    }
    Ok(faults)
}

fn stale_images<'a>(manifest: &'a str, version: &str) -> Vec<&'a str> {
    manifest
        .split_whitespace()
        .filter(|word| word.starts_with("localhost/keelway/"))
        .filter(|word| word.rsplit_once(':').is_none_or(|(_, tag)| tag != version))
        .collect()
}

/// Rust sources of the project, relative to its root.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" {
                    folders.push(path);
                }
            } else if name.ends_with(".rs") {
                found.push(path.strip_prefix(root)?.to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn source_faults(file: &Path, text: &str) -> Vec<String> {
    let shown = file.display();
    let path = file.to_string_lossy();
    let mut faults = Vec::new();
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX && !is_generated(text) {
        faults.push(format!(
            "{shown} has {lines} lines; {FILE_LINES_MAX} are too many for one module"
        ));
    }
    if let Some(name) = file
        .components()
        .filter_map(|part| part.as_os_str().to_str())
        .map(|part| part.trim_end_matches(".rs"))
        .find(|part| EMPTY_NAMES.contains(part))
    {
        faults.push(format!(
            "{shown}: `{name}` says nothing about what is inside"
        ));
    }
    let may_be_unsafe =
        path.ends_with("sys.rs") || UNSAFE_FOLDERS.iter().any(|folder| path.starts_with(folder));
    let is_pure = file
        .components()
        .filter_map(|part| part.as_os_str().to_str())
        .any(|part| PURE_MODULES.contains(&part.trim_end_matches(".rs")))
        && !path.starts_with("xtask/");
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        let place = || format!("{shown}:{}", number + 1);
        if !may_be_unsafe && uses_unsafe(code) {
            faults.push(format!("{}: unsafe code belongs in a sys.rs", place()));
        }
        if is_pure && let Some(krate) = IMPURE.iter().find(|krate| imports_crate(code, krate)) {
            faults.push(format!(
                "{}: plan, check and diff are pure and do not import {krate}",
                place()
            ));
        }
    }
    faults
}

fn is_generated(text: &str) -> bool {
    text.lines().take(3).any(|line| line.contains("@generated"))
}

fn uses_unsafe(code: &str) -> bool {
    let code = code.trim_start();
    ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern "]
        .iter()
        .any(|form| code.contains(form))
        // A string that speaks of unsafe code is not unsafe code; this file has several.
        && !code.contains('"')
}

fn imports_crate(code: &str, krate: &str) -> bool {
    let code = code.trim_start();
    code.starts_with(&format!("use {krate}::")) || code.starts_with(&format!("pub use {krate}::"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_project_keeps_its_conventions() {
        run(&Project::locate().unwrap()).unwrap();
    }

    fn package(name: &str, dependencies: &[(&str, Value)]) -> Value {
        let dependencies: Vec<Value> = dependencies
            .iter()
            .map(|(name, kind)| json!({"name": name, "kind": kind}))
            .collect();
        json!({"name": name, "dependencies": dependencies})
    }

    #[test]
    fn an_import_that_no_rule_allows_is_a_fault() {
        let metadata = json!({"packages": [
            package("keelway-dns", &[("cluster-model", Value::Null), ("serde", Value::Null)]),
            package("cluster-model", &[("keelway-dns", Value::Null)]),
            package("keelway-tests", &[("keelway-dns", Value::Null)]),
            package("keelway-kubelet", &[("keelway-tests", json!("dev"))]),
        ]});
        let faults = import_faults(&metadata);
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].starts_with("cluster-model must not import keelway-dns"));
    }

    #[test]
    fn a_package_without_a_rule_is_a_fault() {
        let faults = import_faults(&json!({"packages": [package("keelway-extra", &[])]}));
        assert!(
            faults[0].contains("keelway-extra is in no import rule"),
            "{faults:?}"
        );
    }

    #[test]
    fn an_example_with_an_image_of_another_version_is_a_fault() {
        let manifest = "image: localhost/keelway/echo:0.1.0\nimage: localhost/keelway/client\nimage: example.org/a:1\n";
        assert_eq!(
            stale_images(manifest, "0.1.0"),
            ["localhost/keelway/client"]
        );
        assert_eq!(stale_images(manifest, "0.2.0").len(), 2);
    }

    #[test]
    fn sources_that_break_a_convention_are_named_with_their_line() {
        let cases = [
            (
                "agent/src/routes.rs",
                "fn a() {}\nlet x = unsafe { b() };\n",
                Some("agent/src/routes.rs:2: unsafe"),
            ),
            ("agent/src/sys.rs", "let x = unsafe { b() };\n", None),
            (
                "agent/src/routes.rs",
                "// unsafe { } would be wrong here\n",
                None,
            ),
            (
                "agent/src/plan/service.rs",
                "use tokio::sync::mpsc;\n",
                Some("do not import tokio"),
            ),
            ("agent/src/apply.rs", "use aya::maps::Map;\n", None),
            ("agent/src/utils.rs", "", Some("`utils` says nothing")),
        ];
        for (file, text, expected) in cases {
            let faults = source_faults(Path::new(file), text);
            match expected {
                Some(expected) => assert!(
                    faults.len() == 1 && faults[0].contains(expected),
                    "{file}: {faults:?}"
                ),
                None => assert!(faults.is_empty(), "{file}: {faults:?}"),
            }
        }
        let long = "\n".repeat(FILE_LINES_MAX + 1);
        assert_eq!(source_faults(Path::new("dns/src/zone.rs"), &long).len(), 1);
        let generated = format!("//! @generated by `cargo xtask generate-registry`.\n{long}");
        assert!(source_faults(Path::new("dns/src/zone.rs"), &generated).is_empty());
    }
}
