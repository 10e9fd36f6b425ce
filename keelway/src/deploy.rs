//! The manifests that make a set of nodes a cluster: the agent and the cluster DNS, as anyone would apply them elsewhere.

use std::collections::BTreeMap;

use kube::core::DynamicObject;
use serde_json::Value;

const AGENT: &str = include_str!("../../deploy/keelway.yaml");
const DNS: &str = include_str!("../../deploy/dns.yaml");
/// Of pods: the digest of their image.
const BUILD: &str = "keelway.io/build";
const JOIN: &str = include_str!("../../deploy/join.yaml");

#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    #[error("{manifest} asks for ${{{variable}}}, which nobody gives")]
    Variable {
        manifest: &'static str,
        variable: String,
    },
    #[error("{manifest} is not a list of Kubernetes objects: {reason}")]
    Parse {
        manifest: &'static str,
        reason: String,
    },
}

/// What the manifests' variables stand for.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// URL of the API server, reachable from every node without a Service.
    pub api_server: String,
    /// The cgroup v2 folder of a node, in a pod that has the machine's /sys/fs/cgroup; may hold $(NODE_NAME).
    pub cgroup: String,
    pub cluster_dns: String,
    pub cluster_domain: String,
    pub agent_args: Vec<String>,
    pub dns_args: Vec<String>,
    /// Digests of images by their names: a DaemonSet whose image is another one rolls out, also when its name is the same.
    #[serde(skip)]
    pub builds: BTreeMap<String, String>,
}

/// The objects to create, in order.
///
/// # Errors
/// When a manifest is not what this program was built for.
pub fn objects(settings: &Settings) -> Result<Vec<DynamicObject>, DeployError> {
    let variables = BTreeMap::from([
        ("VERSION", env!("CARGO_PKG_VERSION")),
        ("API_SERVER", settings.api_server.as_str()),
        ("CGROUP", settings.cgroup.as_str()),
        ("CLUSTER_DNS", settings.cluster_dns.as_str()),
        ("CLUSTER_DOMAIN", settings.cluster_domain.as_str()),
    ]);
    let mut all = parse(
        "deploy/keelway.yaml",
        AGENT,
        &variables,
        &settings.agent_args,
    )?;
    all.extend(parse(
        "deploy/dns.yaml",
        DNS,
        &variables,
        &settings.dns_args,
    )?);
    for object in &mut all {
        tell_build(&mut object.data, &settings.builds);
    }
    Ok(all)
}

/// The objects that let machines join.
///
/// # Errors
/// As [`objects`].
pub fn join_objects() -> Result<Vec<DynamicObject>, DeployError> {
    parse("deploy/join.yaml", JOIN, &BTreeMap::new(), &[])
}

fn parse(
    manifest: &'static str,
    text: &str,
    variables: &BTreeMap<&str, &str>,
    extra_args: &[String],
) -> Result<Vec<DynamicObject>, DeployError> {
    let failed = |reason: String| DeployError::Parse { manifest, reason };
    let text = substitute(manifest, text, variables)?;
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&text).map_err(|error| failed(error.to_string()))?;
    documents
        .into_iter()
        .filter(|document| !document.is_null())
        .map(|mut document| {
            add_args(&mut document, extra_args);
            serde_json::from_value(document).map_err(|error| failed(error.to_string()))
        })
        .collect()
}

/// Appends to the arguments of a DaemonSet's first container.
fn add_args(document: &mut Value, extra: &[String]) {
    if let Some(args) = document
        .pointer_mut("/spec/template/spec/containers/0/args")
        .and_then(Value::as_array_mut)
    {
        args.extend(extra.iter().map(|arg| Value::from(arg.as_str())));
    }
}

/// Writes the digest of a DaemonSet's image into its pods.
fn tell_build(document: &mut Value, builds: &BTreeMap<String, String>) {
    let image = document.pointer("/spec/template/spec/containers/0/image");
    let digest = image
        .and_then(Value::as_str)
        .and_then(|image| builds.get(image));
    if let Some(digest) = digest.cloned()
        && let Some(metadata) = document.pointer_mut("/spec/template/metadata")
    {
        metadata["annotations"][BUILD] = digest.into();
    }
}

/// `text` with each `${NAME}` replaced, as envsubst does it. `$(NAME)` is Kubernetes' own and stays. Comments stay as they are.
fn substitute(
    manifest: &'static str,
    text: &str,
    variables: &BTreeMap<&str, &str>,
) -> Result<String, DeployError> {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if line.trim_start().starts_with('#') {
            continue;
        }
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("${") {
            let (name, after) = after.split_once('}').unwrap_or((after, ""));
            let value = variables.get(name);
            out.push_str(before);
            out.push_str(value.ok_or_else(|| DeployError::Variable {
                manifest,
                variable: name.trim().to_owned(),
            })?);
            rest = after;
        }
        out.push_str(rest);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            api_server: "https://198.18.0.2:6443".into(),
            cgroup: "/host/cgroup/unified/keelway/c/$(NODE_NAME)".into(),
            cluster_dns: "10.96.0.10".into(),
            cluster_domain: "cluster.local".into(),
            agent_args: vec!["--socket-lb=off".into()],
            dns_args: vec!["--upstream=1.2.3.4:53".into()],
            builds: BTreeMap::new(),
        }
    }

    #[test]
    fn the_manifests_are_whole_once_filled_in() {
        let objects = objects(&settings()).expect("they parse");
        let text = serde_json::to_string(&objects).expect("JSON");
        assert!(!text.contains("${"), "{text}");
        assert!(
            text.contains("https://198.18.0.2:6443") && text.contains("keelway/c/$(NODE_NAME)")
        );
        let daemon_sets: Vec<&DynamicObject> = objects
            .iter()
            .filter(|object| {
                object
                    .types
                    .as_ref()
                    .is_some_and(|types| types.kind == "DaemonSet")
            })
            .collect();
        let arg = |set: usize, arg: &str| {
            let args = daemon_sets[set]
                .data
                .pointer("/spec/template/spec/containers/0/args")
                .and_then(Value::as_array);
            args.is_some_and(|args| args.iter().any(|value| value == arg))
        };
        assert_eq!(daemon_sets.len(), 2);
        assert!(arg(0, "--socket-lb=off") && arg(1, "--upstream=1.2.3.4:53"));
        // Also where nobody says so, other names are asked for.
        assert!(arg(1, "--upstream=/etc/resolv.conf"));
        for object in &objects {
            let images: Vec<&Value> = ["initContainers", "containers"]
                .iter()
                .filter_map(|list| object.data.pointer(&format!("/spec/template/spec/{list}")))
                .flat_map(|list| list.as_array().into_iter().flatten())
                .filter_map(|container| container.get("image"))
                .collect();
            for image in images {
                assert!(
                    image
                        .as_str()
                        .is_some_and(|image| image.ends_with(env!("CARGO_PKG_VERSION"))),
                    "{image}"
                );
            }
        }
    }

    #[test]
    fn another_image_of_the_same_name_is_another_template() {
        let image = concat!("localhost/keelway/dns:", env!("CARGO_PKG_VERSION"));
        let mut settings = settings();
        settings.builds = BTreeMap::from([(image.to_owned(), "sha256:1".to_owned())]);
        let objects = objects(&settings).expect("they parse");
        let told = objects.iter().filter_map(|object| {
            let metadata = object.data.pointer("/spec/template/metadata")?;
            Some(metadata["annotations"][BUILD].as_str())
        });
        assert_eq!(told.collect::<Vec<_>>(), [None, Some("sha256:1")]);
    }

    #[test]
    fn tokens_of_this_program_have_the_rights_that_joining_needs() {
        let objects = join_objects().expect("they parse");
        let text = serde_json::to_string(&objects).expect("JSON");
        assert!(text.contains(crate::machine::token::GROUP));
        assert!(text.contains(crate::machine::discovery::NAME));
        assert!(text.contains(crate::machine::server::FACTS));
    }

    #[test]
    fn a_variable_that_nobody_gives_is_an_error() {
        let error = substitute("m", "a: ${WHAT}\n", &BTreeMap::new())
            .expect_err("unknown")
            .to_string();
        assert_eq!(error, "m asks for ${WHAT}, which nobody gives");
    }
}
