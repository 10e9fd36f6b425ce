//! The CNI plugin that container runtimes call. Results and errors go to standard output as JSON, as the specification has it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use keelway_cni::{Environment, Version, declared_version, loopback, read_config, run};
use serde_json::{Value, json};

fn main() -> ExitCode {
    let called_as = std::env::args_os().next().map(PathBuf::from);
    let is_loopback = called_as
        .as_deref()
        .and_then(Path::file_name)
        .is_some_and(|name| name == loopback::NAME);
    let env = Environment::of_process();
    let config = read_config(std::io::stdin().lock());
    let version = config
        .as_deref()
        .ok()
        .and_then(declared_version)
        .unwrap_or_else(|| Version::V1_0_0.name().into());
    let outcome = config.and_then(|config| {
        if is_loopback {
            loopback::run(&env, &config)
        } else {
            run(&env, &config)
        }
    });
    let (output, code) = match outcome {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("keelway-cni: {error}");
            let mut object = json!({"cniVersion": version});
            if let (Value::Object(all), Ok(Value::Object(fields))) =
                (&mut object, serde_json::to_value(&error))
            {
                all.extend(fields);
            }
            (Some(object), ExitCode::FAILURE)
        }
    };
    if let Some(output) = output {
        println!("{output}");
    }
    code
}
