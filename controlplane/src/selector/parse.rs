//! The query form of label selectors: tokens, and the grammar over them. What is wrong is told in upstream's words.

use super::SelectorError;
use super::label::{Requirement, Test};
use super::names::{key_faults, value_faults};

/// Operators that stand between a key and values, as messages list them.
const OPERATORS: &str = "in, notin, =, ==, !=, gt, lt";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    /// A key, a value, `in` or `notin`: which one of them, its place says.
    Word(&'a str),
    Mark(&'a str),
    /// Marks that mean nothing together.
    Unknown(&'a str),
    End,
}

impl<'a> Token<'a> {
    fn text(self) -> &'a str {
        match self {
            Self::Word(text) | Self::Mark(text) | Self::Unknown(text) => text,
            Self::End => "",
        }
    }
}

const MARKS: [&str; 9] = ["==", "!=", "(", ")", ",", "!", "=", ">", "<"];

fn tokens(text: &str) -> Vec<Token<'_>> {
    let is_mark = |c: char| "=!(),<>".contains(c);
    let is_space = |c: char| matches!(c, ' ' | '\t' | '\r' | '\n');
    // As upstream, which reads C's strings.
    let mut rest = text.split('\0').next().unwrap_or("");
    let mut tokens = Vec::new();
    loop {
        rest = rest.trim_start_matches(is_space);
        let Some(first) = rest.chars().next() else {
            tokens.push(Token::End);
            return tokens;
        };
        let token = if is_mark(first) {
            let mark = MARKS.into_iter().find(|mark| rest.starts_with(mark));
            mark.map_or(Token::Unknown(&rest[..1]), |mark| {
                Token::Mark(&rest[..mark.len()])
            })
        } else {
            let end = rest.find(|c| is_mark(c) || is_space(c));
            Token::Word(&rest[..end.unwrap_or(rest.len())])
        };
        rest = &rest[token.text().len()..];
        tokens.push(token);
    }
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

fn found(token: Token<'_>, rest: &str) -> SelectorError {
    SelectorError(format!("found '{}'{rest}", token.text()))
}

/// The requirements of a selector.
pub(super) fn requirements(text: &str) -> Result<Vec<Requirement>, SelectorError> {
    let mut parser = Parser {
        tokens: tokens(text),
        at: 0,
    };
    let mut requirements = Vec::new();
    loop {
        match parser.next() {
            Token::Word(_) | Token::Mark("!") => {}
            Token::End => return Ok(requirements),
            other => {
                let expected = ", expected: !, identifier, or 'end of string'";
                return Err(found(other, expected));
            }
        }
        let requirement = parser.requirement().map_err(|SelectorError(why)| {
            SelectorError(format!("unable to parse requirement: {why}"))
        })?;
        requirements.push(requirement);
        match parser.take() {
            Token::End => return Ok(requirements),
            Token::Mark(",") => match parser.next() {
                Token::Word(_) | Token::Mark("!") => {}
                other => return Err(found(other, ", expected: identifier after ','")),
            },
            other => return Err(found(other, ", expected: ',' or 'end of string'")),
        }
    }
}

impl<'a> Parser<'a> {
    fn next(&self) -> Token<'a> {
        self.tokens.get(self.at).copied().unwrap_or(Token::End)
    }

    fn take(&mut self) -> Token<'a> {
        let token = self.next();
        self.at += 1;
        token
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let mut first = self.take();
        let absent = first == Token::Mark("!");
        if absent {
            first = self.take();
        }
        let Token::Word(key) = first else {
            return Err(found(first, ", expected: identifier"));
        };
        hold("<nil>", key, key_faults(key))?;
        let test = if absent {
            Test::Absent
        } else if matches!(self.next(), Token::End | Token::Mark(",")) {
            Test::Exists
        } else {
            self.test(key)?
        };
        Ok(Requirement {
            key: key.to_owned(),
            test,
        })
    }

    fn test(&mut self, key: &str) -> Result<Test, SelectorError> {
        let operator = self.take();
        let values = match operator {
            Token::Word("in" | "notin") => self.values()?,
            Token::Mark("=" | "==" | "!=" | ">" | "<") => vec![self.value()?],
            other => return Err(found(other, &format!(", expected: {OPERATORS}"))),
        };
        if let Token::Mark(">" | "<") = operator {
            let bound = values[0].parse::<i64>().map_err(|_| {
                let why = "for 'Gt', 'Lt' operators, the value must be an integer";
                SelectorError(format!("values[0]: Invalid value: {:?}: {why}", values[0]))
            })?;
            return Ok(match operator {
                Token::Mark(">") => Test::Greater(bound),
                _ => Test::Less(bound),
            });
        }
        for (at, value) in values.iter().enumerate() {
            hold(&format!("values[{at}][{key}]"), value, value_faults(value))?;
        }
        if values.is_empty() {
            let why = "for 'in', 'notin' operators, values set can't be empty";
            return Err(SelectorError(format!("values: Invalid value: []: {why}")));
        }
        Ok(match operator {
            Token::Word("notin") | Token::Mark("!=") => Test::NotIn(values),
            _ => Test::In(values),
        })
    }

    /// What follows `=` and its like; nothing is the empty value.
    fn value(&mut self) -> Result<String, SelectorError> {
        match self.next() {
            Token::End | Token::Mark(",") => Ok(String::new()),
            Token::Word(value) => {
                self.take();
                Ok(value.to_owned())
            }
            other => Err(found(other, ", expected: identifier")),
        }
    }

    /// A list of values in parentheses, each once and in order.
    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        match self.take() {
            Token::Mark("(") => {}
            other => return Err(found(other, " expected: '('")),
        }
        let mut values = std::collections::BTreeSet::new();
        if self.next() == Token::Mark(")") {
            self.take();
            return Ok(Vec::new());
        }
        loop {
            let value = match self.next() {
                Token::Word(value) => {
                    self.take();
                    value
                }
                // Nothing before a comma or the end is the empty value.
                Token::Mark("," | ")") => "",
                other => return Err(found(other, ", expected: ',', or identifier")),
            };
            values.insert(value.to_owned());
            match self.take() {
                Token::Mark(")") => return Ok(values.into_iter().collect()),
                Token::Mark(",") => {}
                other => return Err(found(other, ", expected: ',' or ')'")),
            }
        }
    }
}

fn hold(path: &str, given: &str, faults: Vec<String>) -> Result<(), SelectorError> {
    if faults.is_empty() {
        return Ok(());
    }
    Err(SelectorError(format!(
        "{path}: Invalid value: {given:?}: {}",
        faults.join("; ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_told_in_the_words_that_users_know() {
        for (text, expected) in [
            ("a=b=c", "found '=', expected: ',' or 'end of string'"),
            (
                "a in",
                "unable to parse requirement: found '' expected: '('",
            ),
            (
                "a in (b",
                "unable to parse requirement: found '', expected: ',' or ')'",
            ),
            ("a in (b))", "found ')', expected: ',' or 'end of string'"),
            (
                ",",
                "found ',', expected: !, identifier, or 'end of string'",
            ),
            ("a,,b", "found ',', expected: identifier after ','"),
            (
                "a>x",
                "unable to parse requirement: values[0]: Invalid value: \"x\": for 'Gt', 'Lt' operators, the value must be an integer",
            ),
            (
                "!",
                "unable to parse requirement: found '', expected: identifier",
            ),
            ("!a=b", "found '=', expected: ',' or 'end of string'"),
            (
                "a b",
                "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt",
            ),
            (
                "a===b",
                "unable to parse requirement: found '=', expected: identifier",
            ),
            (
                "a!b",
                "unable to parse requirement: found '!', expected: in, notin, =, ==, !=, gt, lt",
            ),
        ] {
            let error = requirements(text).expect_err(text);
            assert_eq!(error.to_string(), expected, "{text}");
        }
        for text in ["a=-b", "-a"] {
            let error = requirements(text).expect_err(text).to_string();
            assert!(
                error.starts_with("unable to parse requirement: "),
                "{error}"
            );
            assert!(error.contains("must start and end with"), "{error}");
        }
    }

    #[test]
    fn nothing_is_the_empty_value_and_words_of_the_grammar_are_values_too() {
        let values = |text: &str| match requirements(text).expect(text).remove(0).test {
            Test::In(values) | Test::NotIn(values) => values,
            other => panic!("{other:?}"),
        };
        assert_eq!(values("a="), [""]);
        assert_eq!(values("a in (b,)"), ["", "b"]);
        assert_eq!(values("a notin (,)"), [""]);
        assert_eq!(values("in in (in, notin)"), ["in", "notin"]);
    }
}
