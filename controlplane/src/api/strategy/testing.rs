//! What tests of strategies ask.

use serde_json::Value;

use super::Strategy;

/// What is wrong with an object, a line each.
pub fn told(strategy: &dyn Strategy, object: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    strategy.validate(object, &mut errors);
    errors.iter().map(ToString::to_string).collect()
}

/// What is wrong with an object once its defaults are filled in.
pub fn told_with_defaults(strategy: &dyn Strategy, mut object: Value) -> Vec<String> {
    strategy.default(&mut object);
    told(strategy, &object)
}
