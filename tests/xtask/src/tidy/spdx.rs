//! Decides whether a licence expression (SPDX) is satisfied by a list of accepted licences.
//!
//! Knows `AND`, `OR`, `WITH`, parentheses, and the old `A/B`, which means `OR`.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

/// Whether accepting only `allowed` satisfies `expression`. A licence with an exception is accepted
/// where the licence alone is: exceptions only ever permit more.
pub(super) fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> Result<bool> {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let mut parser = Parser {
        words: spaced.split_whitespace().collect(),
        at: 0,
        allowed,
    };
    let result = parser.any()?;
    match parser.next() {
        None => Ok(result),
        Some(word) => bail!("`{expression}`: unexpected `{word}`"),
    }
}

struct Parser<'a> {
    words: Vec<&'a str>,
    at: usize,
    allowed: &'a BTreeSet<String>,
}

impl<'a> Parser<'a> {
    fn next(&mut self) -> Option<&'a str> {
        let word = self.words.get(self.at).copied();
        self.at += 1;
        word
    }

    fn skip(&mut self, expected: &str) -> bool {
        let found = self.words.get(self.at) == Some(&expected);
        self.at += usize::from(found);
        found
    }

    fn any(&mut self) -> Result<bool> {
        let mut result = self.all()?;
        while self.skip("OR") {
            result |= self.all()?;
        }
        Ok(result)
    }

    fn all(&mut self) -> Result<bool> {
        let mut result = self.one()?;
        while self.skip("AND") {
            result &= self.one()?;
        }
        Ok(result)
    }

    fn one(&mut self) -> Result<bool> {
        match self.next() {
            Some("(") => {
                let result = self.any()?;
                if !self.skip(")") {
                    bail!("a licence expression lacks `)`");
                }
                Ok(result)
            }
            None | Some(")" | "AND" | "OR" | "WITH") => bail!("a licence is missing"),
            Some(licence) => {
                if self.skip("WITH") && self.next().is_none() {
                    bail!("an exception is missing");
                }
                Ok(self.allowed.contains(licence))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_satisfied_by_what_is_allowed() {
        let allowed = ["MIT", "Apache-2.0"].map(str::to_owned).into();
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-3.0-only", false),
            ("GPL-3.0-only OR MIT", true),
            ("Unlicense/MIT", true),
            ("Apache-2.0 AND BSD-3-Clause", false),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", false),
            ("(GPL-2.0-only OR MIT) AND Apache-2.0", true),
            ("GPL-2.0-only OR MIT AND BSD-3-Clause", false),
            ("Apache-2.0 WITH LLVM-exception", true),
        ] {
            assert_eq!(
                satisfied(expression, &allowed).unwrap(),
                expected,
                "{expression}"
            );
        }
    }

    #[test]
    fn nonsense_is_an_error() {
        for expression in ["", "MIT AND", "(MIT", "MIT MIT", "OR MIT", "MIT WITH"] {
            assert!(
                satisfied(expression, &BTreeSet::new()).is_err(),
                "{expression}"
            );
        }
    }
}
