//! Typed access to one table of a parsed TOML file that remembers where everything stands.
//!
//! Errors are collected, not thrown, so that the user sees all of them at once.

use super::nearest::nearest;
use super::problem::{Located, Place, Problem};
use super::quantity::parse_size;
use serde_spanned::Spanned;
use std::ops::Range;
use toml::de::{DeTable, DeValue};

/// A key that a section may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    /// Its name.
    pub(super) name: &'static str,
    /// Whether it works; keys of features to come are known, and refused.
    pub(super) supported: bool,
}

/// A key that works.
pub(super) const fn key(name: &'static str) -> Key {
    Key {
        name,
        supported: true,
    }
}

/// A key whose feature does not exist yet.
pub(super) const fn later(name: &'static str) -> Key {
    Key {
        name,
        supported: false,
    }
}

/// The text of a VM file and its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) file: &'a str,
    pub(super) text: &'a str,
}

impl Source<'_> {
    pub(super) fn place(&self, key: &str, span: Range<usize>, with_value: bool) -> Place {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let column = before.get(line_start..).unwrap_or("").chars().count() + 1;
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let value = self.text.get(span).filter(|_| with_value).unwrap_or("");
        Place::File {
            file: self.file.to_owned(),
            line,
            column,
            key: key.to_owned(),
            value: value.lines().next().unwrap_or("").to_owned(),
        }
    }
}

/// One table.
#[derive(Debug)]
pub(super) struct Section<'a> {
    source: Source<'a>,
    name: &'static str,
    table: &'a DeTable<'a>,
    span: Range<usize>,
}

const fn type_with_article(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

impl<'a> Section<'a> {
    /// The file's top level.
    pub(super) fn root(source: Source<'a>, root: &'a Spanned<DeTable<'a>>) -> Self {
        Self {
            source,
            name: "",
            table: root.get_ref(),
            span: 0..0,
        }
    }

    /// Where the section begins.
    pub(super) fn place(&self) -> Place {
        self.source.place(self.name, self.span.clone(), false)
    }

    fn path(&self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    /// Refuses keys that are not among `known`.
    pub(super) fn check_keys(&self, known: &[Key], problems: &mut Vec<Problem>) {
        for (name, value) in self.table {
            let word: &str = name.get_ref();
            let found = known.iter().find(|k| k.name == word);
            let expectation = match found {
                Some(key) if key.supported => continue,
                Some(_) => "this key is not supported yet by this version of bulkhead".to_owned(),
                None => {
                    let names = || known.iter().filter(|k| k.supported).map(|k| k.name);
                    match nearest(word, names()) {
                        Some(meant) => format!("unknown key; did you mean `{meant}`?"),
                        None => {
                            let list: Vec<_> = names().collect();
                            format!("unknown key; expected one of {}", list.join(", "))
                        }
                    }
                }
            };
            let mut place = self.source.place(&self.path(word), name.span(), false);
            let plain = !value.get_ref().is_table() && !value.get_ref().is_array();
            if let (Place::File { value: text, .. }, true) = (&mut place, plain) {
                let written = self.source.text.get(value.span()).unwrap_or("");
                written.lines().next().unwrap_or("").clone_into(text);
            }
            problems.push(Problem { place, expectation });
        }
    }

    /// The value of `key`, made by `read`, which says what it expected when it cannot.
    pub(super) fn get<T>(
        &self,
        key: &str,
        problems: &mut Vec<Problem>,
        read: impl FnOnce(&DeValue<'a>) -> Result<T, String>,
    ) -> Option<Located<T>> {
        let value = self.table.get(key)?;
        let place = self.source.place(&self.path(key), value.span(), true);
        match read(value.get_ref()) {
            Ok(value) => Some(Located { value, place }),
            Err(expectation) => {
                problems.push(Problem { place, expectation });
                None
            }
        }
    }

    /// A string.
    pub(super) fn string(&self, key: &str, problems: &mut Vec<Problem>) -> Option<Located<String>> {
        self.get(key, problems, |value| {
            let text = value.as_str().map(str::to_owned);
            text.ok_or_else(|| format!("expected a string, not {}", type_with_article(value)))
        })
    }

    /// A string that is one of the words of `choices`.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        choices: &[(&str, T)],
        problems: &mut Vec<Problem>,
    ) -> Option<Located<T>> {
        self.get(key, problems, |value| {
            let found = value
                .as_str()
                .and_then(|word| choices.iter().find(|(name, _)| *name == word));
            found.map(|(_, choice)| *choice).ok_or_else(|| {
                let names: Vec<_> = choices.iter().map(|(n, _)| format!("\"{n}\"")).collect();
                format!("expected {}", names.join(" or "))
            })
        })
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self, key: &str, problems: &mut Vec<Problem>) -> Option<Located<bool>> {
        self.get(key, problems, |value| {
            value
                .as_bool()
                .ok_or_else(|| format!("expected true or false, not {}", type_with_article(value)))
        })
    }

    /// A whole number from 0 to 255; its owner checks the range.
    pub(super) fn small(
        &self,
        key: &str,
        range: (u8, u8),
        problems: &mut Vec<Problem>,
    ) -> Option<Located<u8>> {
        self.get(key, problems, |value| {
            value
                .as_integer()
                .and_then(|n| u8::from_str_radix(n.as_str(), n.radix()).ok())
                .filter(|n| (range.0..=range.1).contains(n))
                .ok_or_else(|| format!("expected a whole number from {} to {}", range.0, range.1))
        })
    }

    /// A whole number in `range`.
    pub(super) fn number(
        &self,
        key: &str,
        range: (u32, u32),
        problems: &mut Vec<Problem>,
    ) -> Option<Located<u32>> {
        self.get(key, problems, |value| {
            value
                .as_integer()
                .and_then(|n| u32::from_str_radix(n.as_str(), n.radix()).ok())
                .filter(|n| (range.0..=range.1).contains(n))
                .ok_or_else(|| format!("expected a whole number from {} to {}", range.0, range.1))
        })
    }

    /// A size with a unit.
    pub(super) fn size(&self, key: &str, problems: &mut Vec<Problem>) -> Option<Located<u64>> {
        self.get(key, problems, |value| match value.as_str() {
            Some(text) => parse_size(text).map_err(|e| e.to_string()),
            None => Err(format!(
                "expected a string with a unit such as \"512MiB\", not {}",
                type_with_article(value)
            )),
        })
    }

    /// The table called `key`.
    pub(super) fn table(
        &self,
        key: &'static str,
        problems: &mut Vec<Problem>,
    ) -> Option<Section<'a>> {
        self.table_named(key, key, problems)
    }

    /// The table called `key`, whose name in messages is `name`.
    pub(super) fn table_named(
        &self,
        key: &'static str,
        name: &'static str,
        problems: &mut Vec<Problem>,
    ) -> Option<Section<'a>> {
        let value = self.table.get(key)?;
        let span = value.span();
        if let DeValue::Table(table) = value.get_ref() {
            return Some(Section {
                source: self.source,
                name,
                table,
                span,
            });
        }
        problems.push(Problem {
            place: self.source.place(name, span, !value.get_ref().is_array()),
            expectation: format!("expected a section that begins with [{name}]"),
        });
        None
    }

    /// The tables called `key`, each begun by `[[key]]`.
    pub(super) fn tables(
        &self,
        key: &'static str,
        problems: &mut Vec<Problem>,
    ) -> Vec<Section<'a>> {
        let Some(value) = self.table.get(key) else {
            return Vec::new();
        };
        let entries: &[Spanned<DeValue<'a>>] = match value.get_ref() {
            DeValue::Array(entries) => entries,
            _ => std::slice::from_ref(value),
        };
        let is_array = value.get_ref().is_array();
        let mut sections = Vec::new();
        for entry in entries {
            match entry.get_ref() {
                DeValue::Table(table) if is_array => sections.push(Section {
                    source: self.source,
                    name: key,
                    table,
                    span: entry.span(),
                }),
                _ => problems.push(Problem {
                    place: self.source.place(key, entry.span(), !is_array),
                    expectation: format!("expected sections that begin with [[{key}]]"),
                }),
            }
        }
        sections
    }
}
