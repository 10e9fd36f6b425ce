//! The syntax of a Corefile: blocks, directives and their lines, with snippets, imports and variables filled in.

use std::collections::HashMap;
use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::vec::IntoIter;

use super::files::Files;

/// A word, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    pub text: String,
    pub at: At,
    quoted: bool,
    /// The first word of its line.
    begins: bool,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    file: Arc<str>,
    line: usize,
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What is done for some zones.
#[derive(Clone, Debug)]
pub struct Block {
    pub keys: Vec<Word>,
    pub directives: Vec<Directive>,
}

/// One plugin of a block.
#[derive(Clone, Debug)]
pub struct Directive {
    pub name: Word,
    pub args: Vec<Word>,
    /// Lines between its braces: at least one word each.
    pub lines: Vec<Vec<Word>>,
}

/// Why a file is no Corefile.
#[derive(Debug, thiserror::Error)]
pub enum SyntaxError {
    #[error("{}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{at}: {reason}")]
    At { at: At, reason: String },
    #[error("{file}: ends within a block; a closing brace is missing")]
    Open { file: String },
}

/// Imports within imports; more is a circle.
const DEPTH_MAX: usize = 8;
/// Imports of a file and of all that it imports: what each brings may have several again.
const IMPORTS_MAX: usize = 1000;

/// Reads the blocks of a file and of all that it imports.
pub fn read(path: &Path, files: &mut Files) -> Result<Vec<Block>, SyntaxError> {
    let mut reader = Reader {
        files,
        snippets: HashMap::new(),
        imports: 0,
    };
    let words = reader.file(path)?;
    reader.blocks(words, path, 0)
}

struct Reader<'f> {
    files: &'f mut Files,
    snippets: HashMap<String, Vec<Word>>,
    imports: usize,
}

impl Reader<'_> {
    /// Counts an import, at so many within each other.
    fn import(&mut self, word: &Word, depth: usize) -> Result<(), SyntaxError> {
        self.imports += 1;
        if depth == DEPTH_MAX {
            Err(word.bad("imports go round in circles"))
        } else if self.imports > IMPORTS_MAX {
            Err(word.bad(format!("these are more than {IMPORTS_MAX} imports")))
        } else {
            Ok(())
        }
    }

    fn file(&mut self, path: &Path) -> Result<Vec<Word>, SyntaxError> {
        let text = self.files.text(path).map_err(|source| SyntaxError::Read {
            path: path.into(),
            source,
        })?;
        words(&text, &path.display().to_string())
    }

    fn blocks(
        &mut self,
        words: Vec<Word>,
        path: &Path,
        depth: usize,
    ) -> Result<Vec<Block>, SyntaxError> {
        let open = || SyntaxError::Open {
            file: path.display().to_string(),
        };
        let mut blocks = Vec::new();
        let mut words = words.into_iter().peekable();
        while words.peek().is_some() {
            let mut keys: Vec<Word> = Vec::new();
            loop {
                let mut word = words.next().ok_or_else(open)?;
                if word.is("{") {
                    break;
                }
                if word.is("}") {
                    return Err(word.bad("a block begins with its zones"));
                }
                if keys.is_empty() && word.is("import") {
                    self.import(&word, depth)?;
                    let pattern = words
                        .next()
                        .ok_or_else(|| word.bad("import needs a file"))?;
                    for file in self.files.matching(beside(path, &pattern.text)) {
                        let inner = self.file(&file)?;
                        blocks.extend(self.blocks(inner, &file, depth + 1)?);
                    }
                    if words.peek().is_none() {
                        return Ok(blocks);
                    }
                    continue;
                }
                if word.text.ends_with(',') && !word.quoted {
                    word.text.pop();
                }
                keys.push(word);
            }
            let body = braced(&mut words).ok_or_else(open)?;
            match &keys[..] {
                [] => {
                    return Err(SyntaxError::At {
                        at: body.first().map_or_else(
                            || At {
                                file: path.display().to_string().into(),
                                line: 1,
                            },
                            |word| word.at.clone(),
                        ),
                        reason: "a block without zones".into(),
                    });
                }
                [key] if key.text.starts_with('(') && key.text.ends_with(')') => {
                    let name = key.text[1..key.text.len() - 1].to_owned();
                    self.snippets.insert(name, body);
                }
                _ => {
                    let directives = self.directives(body, path, 0)?;
                    blocks.push(Block { keys, directives });
                }
            }
        }
        Ok(blocks)
    }

    fn directives(
        &mut self,
        words: Vec<Word>,
        path: &Path,
        depth: usize,
    ) -> Result<Vec<Directive>, SyntaxError> {
        let mut directives = Vec::new();
        let mut words = words.into_iter().peekable();
        while let Some(name) = words.next() {
            let mut args = Vec::new();
            while let Some(word) = words.next_if(|word| !word.begins && !word.is("{")) {
                args.push(word);
            }
            let mut lines: Vec<Vec<Word>> = Vec::new();
            if words.next_if(|word| word.is("{")).is_some() {
                let body =
                    braced(&mut words).ok_or_else(|| name.bad("its braces are not closed"))?;
                for word in body {
                    match lines.last_mut() {
                        Some(line) if !word.begins => line.push(word),
                        _ => lines.push(vec![word]),
                    }
                }
            }
            if name.is("import") {
                self.import(&name, depth)?;
                let [what] = &args[..] else {
                    return Err(name.bad("import needs one file or snippet"));
                };
                if let Some(snippet) = self.snippets.get(&what.text).cloned() {
                    directives.extend(self.directives(snippet, path, depth + 1)?);
                } else {
                    for file in self.files.matching(beside(path, &what.text)) {
                        let inner = self.file(&file)?;
                        directives.extend(self.directives(inner, &file, depth + 1)?);
                    }
                }
                continue;
            }
            directives.push(Directive { name, args, lines });
        }
        Ok(directives)
    }
}

/// A path as a file means it.
pub(super) fn beside(file: &Path, path: impl AsRef<Path>) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

/// The words up to the brace that closes what was opened before; `None` when there is none.
fn braced(words: &mut Peekable<IntoIter<Word>>) -> Option<Vec<Word>> {
    let mut body = Vec::new();
    let mut depth = 1;
    loop {
        let word = words.next()?;
        if word.is("{") {
            depth += 1;
        } else if word.is("}") {
            depth -= 1;
            if depth == 0 {
                return Some(body);
            }
        }
        body.push(word);
    }
}

impl Word {
    fn is(&self, text: &str) -> bool {
        !self.quoted && self.text == text
    }

    /// An error about this word.
    pub fn bad(&self, reason: impl Into<String>) -> SyntaxError {
        SyntaxError::At {
            at: self.at.clone(),
            reason: format!("{}: {}", self.text, reason.into()),
        }
    }
}

fn words(text: &str, file: &str) -> Result<Vec<Word>, SyntaxError> {
    let file: Arc<str> = file.into();
    let mut words = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let at = At {
            file: file.clone(),
            line: index + 1,
        };
        let mut rest = line.trim_start_matches(['\u{feff}', ' ', '\t']);
        let mut begins = true;
        while let Some(first) = rest.chars().next() {
            let (text, quoted, after) = match first {
                '#' => break,
                '"' => quoted(&rest[1..]).ok_or_else(|| SyntaxError::At {
                    at: at.clone(),
                    reason: "a quotation is not closed on its line".into(),
                })?,
                _ => {
                    let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                    (rest[..end].to_owned(), false, &rest[end..])
                }
            };
            words.push(Word {
                text: with_variables(&text),
                at: at.clone(),
                quoted,
                begins,
            });
            begins = false;
            rest = after.trim_start();
        }
    }
    Ok(words)
}

fn quoted(text: &str) -> Option<(String, bool, &str)> {
    let mut word = String::new();
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            '"' if !escaped => return Some((word, true, &text[at + 1..])),
            '\\' if !escaped => {
                escaped = true;
                continue;
            }
            '"' => word.push('"'),
            // Only quotes are escaped; expressions keep their backslashes.
            _ if escaped => word.extend(['\\', c]),
            _ => word.push(c),
        }
        escaped = false;
    }
    None
}

/// `{$NAME}` and `{%NAME%}` stand for variables of the environment; those that are not set for nothing.
fn with_variables(text: &str) -> String {
    let mut out = text.to_owned();
    for (open, close) in [("{$", "}"), ("{%", "%}")] {
        let mut from = 0;
        while let Some(start) = out[from..].find(open).map(|at| from + at) {
            let Some(length) = out[start + 2..].find(close) else {
                break;
            };
            let value = std::env::var(&out[start + 2..start + 2 + length]).unwrap_or_default();
            out.replace_range(start..start + 2 + length + close.len(), &value);
            // What a variable holds is taken as it is: it may be its own name.
            from = start + value.len();
        }
    }
    out
}
