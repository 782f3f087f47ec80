//! Paths named in `docs/architecture.md` exist: the page cannot rot silently.

use std::collections::BTreeSet;

use crate::workspace::SourceFile;

const PAGE: &str = "docs/architecture.md";

/// Complaints about paths in code spans of the page that name nothing.
pub(super) fn check(files: &[SourceFile]) -> Vec<String> {
    let Some(page) = files.iter().find(|file| file.path == PAGE) else {
        return Vec::new();
    };
    let existing: BTreeSet<&str> = files.iter().flat_map(|file| prefixes(&file.path)).collect();
    let top: BTreeSet<&str> = files
        .iter()
        .filter_map(|file| file.path.split_once('/'))
        .map(|(top, _)| top)
        .collect();
    let mut complaints = Vec::new();
    for (number, line) in page.text.lines().enumerate() {
        for span in code_spans(line) {
            for path in alternatives(span) {
                let path = path.trim_end_matches('/');
                if !is_path(path, &top) || existing.contains(path) {
                    continue;
                }
                complaints.push(format!("{PAGE}:{}: `{path}` does not exist", number + 1));
            }
        }
    }
    complaints
}

/// A file's path and those of all folders that it is in.
fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let folders = path.match_indices('/').map(|(at, _)| &path[..at]);
    folders.chain(std::iter::once(path))
}

/// What stands between backquotes in a line.
fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Expands one `{a,b}` of a path.
fn alternatives(span: &str) -> Vec<String> {
    let parts = span.split_once('{').and_then(|(before, rest)| {
        rest.split_once('}')
            .map(|(choices, after)| (before, choices, after))
    });
    match parts {
        Some((before, choices, after)) => choices
            .split(',')
            .map(|choice| format!("{before}{}{after}", choice.trim()))
            .collect(),
        None => vec![span.to_owned()],
    }
}

/// Whether a code span means a file of ours: it begins with a top-level folder of the repository.
fn is_path(span: &str, top: &BTreeSet<&str>) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !span.chars().all(plain) {
        return false;
    }
    span.split_once('/')
        .is_some_and(|(first, _)| top.contains(first))
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn complaints(page: &str) -> Vec<String> {
        check(&[
            file(PAGE, page),
            file("ipc/src/ring/mod.rs", ""),
            file("ipc/src/lib.rs", ""),
        ])
    }

    #[test]
    fn existing_files_and_folders_are_fine() {
        assert!(complaints("`ipc/src/lib.rs`, `ipc/src/ring/`, `ipc/src`").is_empty());
        assert!(complaints("`ipc/src/{lib.rs,ring}`").is_empty());
    }

    #[test]
    fn a_missing_file_is_named_with_its_line() {
        let found = complaints("fine\n`ipc/src/gone.rs`\n");
        assert_eq!(
            found,
            ["docs/architecture.md:2: `ipc/src/gone.rs` does not exist"]
        );
        assert_eq!(complaints("`ipc/src/{lib,gone}.rs`").len(), 1);
    }

    #[test]
    fn code_that_is_no_path_is_left_alone() {
        assert!(complaints("`/dev/kvm`, `a/b` and `step(state, event)`, `cargo xtask`").is_empty());
    }
}
