//! What a runtime asks for: environment variables and a network configuration, checked before anything is done.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::capabilities::RawRuntimeConfig;
use crate::result::Dns;
use crate::{AGENT_SOCKET, Capabilities, CniError, Code, SPOOL_DIR, Version};

/// An operation of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    pub fn name(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let all = [
            Self::Add,
            Self::Del,
            Self::Check,
            Self::Gc,
            Self::Status,
            Self::Version,
        ];
        all.into_iter().find(|command| command.name() == text)
    }

    /// Whether the command is about one attachment, and so needs a container and an interface.
    fn of_attachment(self) -> bool {
        matches!(self, Command::Add | Command::Del | Command::Check)
    }
}

/// The interface of one container: what an ADD makes and a DEL takes away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container_id, self.ifname)
    }
}

/// The environment variables of the specification, unchecked.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub command: Option<String>,
    pub container_id: Option<String>,
    pub netns: Option<String>,
    pub ifname: Option<String>,
    pub args: Option<String>,
}

impl Environment {
    /// The variables of this process.
    pub fn of_process() -> Self {
        let var = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            command: var("CNI_COMMAND"),
            container_id: var("CNI_CONTAINERID"),
            netns: var("CNI_NETNS"),
            ifname: var("CNI_IFNAME"),
            args: var("CNI_ARGS"),
        }
    }
}

/// The part of a network configuration that matters to us. Keys that are not known are other plugins' business.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConf {
    pub version: Version,
    pub name: String,
    pub socket: PathBuf,
    pub spool: PathBuf,
    /// ADD: the result of the plugins before this one in a chain. CHECK and DEL: the result of the whole chain's ADD.
    pub prev_result: Option<Map<String, Value>>,
    /// Name resolution that the result shall name, as runtime or configuration has it.
    pub dns: Option<Dns>,
    /// GC: the attachments that are to stay.
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// A checked call of the plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Invocation {
    pub command: Command,
    /// There for ADD, DEL and CHECK.
    pub attachment: Option<Attachment>,
    /// Path of the network namespace; there for ADD and CHECK.
    pub netns: Option<PathBuf>,
    pub args: BTreeMap<String, String>,
    /// What an ADD shall give beyond an interface.
    pub capabilities: Capabilities,
    pub conf: NetConf,
}

/// Longest interface name of the kernel (IFNAMSIZ less its terminator).
const IFNAME_LEN_MAX: usize = 15;
/// Longest container id taken: it becomes part of a file name.
const CONTAINER_ID_LEN_MAX: usize = 200;

impl Invocation {
    /// Checks environment and configuration together. Nothing has been touched when it fails.
    pub fn parse(env: &Environment, config: &[u8]) -> Result<Self, CniError> {
        let command = command(env)?;
        let attachment = if command.of_attachment() {
            Some(attachment(env)?)
        } else {
            None
        };
        let netns = match (&env.netns, command) {
            (Some(path), Command::Add | Command::Check) => Some(PathBuf::from(path)),
            (None, Command::Add | Command::Check) => return Err(missing("CNI_NETNS", command)),
            _ => None,
        };
        let args = args(env.args.as_deref().unwrap_or_default())?;
        let (conf, more) = NetConf::read(config)?;
        // A deletion must not fail for what an ADD would have been refused for.
        let capabilities = match command {
            Command::Add => Capabilities::parse(&more.runtime, &args, more.args.as_ref())?,
            _ => Capabilities::default(),
        };
        if command == Command::Check && conf.version < Version::V0_4_0 {
            return Err(CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "CHECK needs cniVersion 0.4.0, the configuration has {}",
                    conf.version
                ),
            ));
        }
        if matches!(command, Command::Gc | Command::Status) && conf.version < Version::V1_1_0 {
            return Err(CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "{} needs cniVersion 1.1.0, the configuration has {}",
                    command.name(),
                    conf.version
                ),
            ));
        }
        if command == Command::Check && conf.prev_result.is_none() {
            return Err(CniError::new(
                Code::InvalidConfig,
                "CHECK needs prevResult in the configuration",
            ));
        }
        if command == Command::Gc && conf.valid_attachments.is_none() {
            return Err(CniError::new(
                Code::InvalidConfig,
                "GC needs \"cni.dev/valid-attachments\" in the configuration",
            ));
        }
        Ok(Self {
            command,
            attachment,
            netns,
            args,
            capabilities,
            conf,
        })
    }
}

/// The command alone, which is known before the rest is read.
pub(crate) fn command(env: &Environment) -> Result<Command, CniError> {
    let Some(text) = &env.command else {
        return Err(CniError::new(Code::InvalidEnvironment, "CNI_COMMAND is not set").with_details(
            "this program is called by a container runtime, with CNI_* variables and a configuration on stdin",
        ));
    };
    Command::parse(text).ok_or_else(|| {
        CniError::new(
            Code::InvalidEnvironment,
            format!("CNI_COMMAND {text:?} is not known"),
        )
    })
}

fn missing(variable: &str, command: Command) -> CniError {
    CniError::new(
        Code::InvalidEnvironment,
        format!("{variable} is not set, and {} needs it", command.name()),
    )
}

fn attachment(env: &Environment) -> Result<Attachment, CniError> {
    let command = command(env)?;
    let container_id = env
        .container_id
        .as_deref()
        .ok_or_else(|| missing("CNI_CONTAINERID", command))?;
    let ifname = env
        .ifname
        .as_deref()
        .ok_or_else(|| missing("CNI_IFNAME", command))?;
    let bad = |variable: &str, value: &str, why: &str| {
        CniError::new(
            Code::InvalidEnvironment,
            format!("{variable} {value:?} {why}"),
        )
    };
    if !is_identifier(container_id) || container_id.len() > CONTAINER_ID_LEN_MAX {
        return Err(bad(
            "CNI_CONTAINERID",
            container_id,
            "is not a container id",
        ));
    }
    if ifname.len() > IFNAME_LEN_MAX {
        return Err(bad("CNI_IFNAME", ifname, "is longer than 15 bytes"));
    }
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if ifname == "." || ifname == ".." || ifname.contains(forbidden) {
        return Err(bad("CNI_IFNAME", ifname, "is not an interface name"));
    }
    Ok(Attachment {
        container_id: container_id.into(),
        ifname: ifname.into(),
    })
}

/// The specification's rule for container ids and network names: a letter or digit, then those and `_.-`.
fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// `K=V;K=V`; a runtime may pass any keys.
fn args(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    text.split(';')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(CniError::new(
                Code::InvalidEnvironment,
                format!("CNI_ARGS has {pair:?}, which is not of the form KEY=VALUE"),
            )),
        })
        .collect()
}

/// The part of a configuration that runtimes fill in.
struct More {
    runtime: RawRuntimeConfig,
    args: Option<Value>,
}

impl NetConf {
    /// Reads a network configuration.
    pub fn parse(json: &[u8]) -> Result<Self, CniError> {
        Self::read(json).map(|(conf, _)| conf)
    }

    fn read(json: &[u8]) -> Result<(Self, More), CniError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            cni_version: Option<String>,
            name: Option<String>,
            socket: Option<PathBuf>,
            spool: Option<PathBuf>,
            prev_result: Option<Value>,
            dns: Option<Dns>,
            #[serde(default)]
            runtime_config: Option<RawRuntimeConfig>,
            args: Option<Value>,
            #[serde(
                default,
                rename = "cni.dev/valid-attachments",
                deserialize_with = "present"
            )]
            valid_attachments: Option<Vec<Attachment>>,
            /// The name that libcni also gives them.
            #[serde(default, rename = "cni.dev/attachments", deserialize_with = "present")]
            attachments: Option<Vec<Attachment>>,
        }
        if json.iter().all(u8::is_ascii_whitespace) {
            return Err(CniError::new(
                Code::Decode,
                "no network configuration on standard input",
            ));
        }
        let raw: Raw = serde_json::from_slice(json).map_err(|error| {
            CniError::new(Code::Decode, "the network configuration cannot be read")
                .with_details(error)
        })?;
        let invalid = |what: String| CniError::new(Code::InvalidConfig, what);
        let version = match raw.cni_version {
            Some(version) => version.parse()?,
            None => return Err(invalid("the configuration has no cniVersion".into())),
        };
        let name = raw.name.unwrap_or_default();
        if !is_identifier(&name) {
            return Err(invalid(format!(
                "the configuration's name {name:?} is not a network name"
            )));
        }
        let absolute = |key: &str, path: Option<PathBuf>, default: &str| match path {
            None => Ok(PathBuf::from(default)),
            Some(path) if path.is_absolute() => Ok(path),
            Some(path) => Err(invalid(format!(
                "{key} {:?} is not an absolute path",
                path.display()
            ))),
        };
        let prev_result = match raw.prev_result {
            None | Some(Value::Null) => None,
            Some(Value::Object(result)) => Some(result),
            Some(_) => return Err(invalid("prevResult is not an object".into())),
        };
        let wrong = prev_result.iter().flatten().find(|(key, value)| {
            matches!(key.as_str(), "interfaces" | "ips" | "routes")
                && !value.is_array()
                && !value.is_null()
        });
        if let Some((key, _)) = wrong {
            return Err(invalid(format!("prevResult: {key} is not a list")));
        }
        let runtime = raw.runtime_config.unwrap_or_default();
        let conf = Self {
            version,
            name,
            socket: absolute("socket", raw.socket, AGENT_SOCKET)?,
            spool: absolute("spool", raw.spool, SPOOL_DIR)?,
            prev_result,
            dns: runtime.dns().or(raw.dns),
            valid_attachments: raw.valid_attachments.or(raw.attachments),
        };
        Ok((
            conf,
            More {
                runtime,
                args: raw.args,
            },
        ))
    }
}

/// A list that is there: libcni writes an empty one as null, which is not the same as none at all.
fn present<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<Attachment>>, D::Error> {
    Option::deserialize(deserializer).map(|list| Some(list.unwrap_or_default()))
}

/// The version that a configuration names, whatever else is wrong with it: errors are told in it.
pub fn declared_version(json: &[u8]) -> Option<String> {
    let config: Value = serde_json::from_slice(json).ok()?;
    config.get("cniVersion")?.as_str().map(str::to_owned)
}
