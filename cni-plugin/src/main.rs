//! The CNI plugin that container runtimes call. Results and errors go to standard output as JSON, as the specification has it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use keelway_cni::{Environment, Version, loopback, run};
use serde_json::{Value, json};

fn main() -> ExitCode {
    let called_as = std::env::args_os().next().map(PathBuf::from);
    let is_loopback = called_as
        .as_deref()
        .and_then(Path::file_name)
        .is_some_and(|name| name == loopback::NAME);
    let (env, stdin) = (Environment::of_process(), std::io::stdin().lock());
    let outcome = if is_loopback {
        loopback::run(&env, stdin)
    } else {
        run(&env, stdin)
    };
    let (output, code) = match outcome {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("keelway-cni: {error}");
            let mut object = json!({"cniVersion": Version::V1_0_0.name()});
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
