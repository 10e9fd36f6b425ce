//! The CNI plugin that container runtimes call. Results and errors go to standard output as JSON, as the specification has it.

use std::process::ExitCode;

use keelway_cni::{Environment, Version, run};
use serde_json::{Value, json};

fn main() -> ExitCode {
    let (output, code) = match run(&Environment::of_process(), std::io::stdin().lock()) {
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
