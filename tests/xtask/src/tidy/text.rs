//! Rules about the text of files: length, unfinished work, paths of one machine.

use std::collections::BTreeSet;

use crate::workspace::SourceFile;

/// Past this many lines a file says in its header why it is one file.
const LINES_MAX: usize = 1000;
/// What that header says: a line with this, followed by the reason.
const LENGTH_REASON: &str = "Long because ";
/// How many lines the header of a file has at most.
const HEADER_LINES: usize = 40;
/// Where all postponed work has an entry.
const DEBT: &str = "docs/known-debt.md";

/// Complaints about the text of all files.
pub(super) fn check(files: &[SourceFile]) -> Vec<String> {
    let debt: BTreeSet<&str> = files
        .iter()
        .filter(|file| file.path == DEBT)
        .flat_map(|file| file.text.split(|c: char| !is_path_character(c)))
        .collect();
    files
        .iter()
        .flat_map(|file| check_file(file, &debt))
        .collect()
}

fn check_file(file: &SourceFile, debt: &BTreeSet<&str>) -> Vec<String> {
    let SourceFile { path, text } = file;
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    let explained = text
        .lines()
        .take(HEADER_LINES)
        .any(|line| line.contains(LENGTH_REASON));
    if is_source(path) && lines > LINES_MAX && !explained {
        complaints.push(format!(
            "{path}: {lines} lines; past {LINES_MAX} the header says \"{LENGTH_REASON}…\""
        ));
    }
    // Spelled so that this file obeys its own rules.
    let (unfinished, later) = (concat!("FIX", "ME"), concat!("TO", "DO"));
    for (number, line) in text.lines().enumerate() {
        let place = format!("{path}:{}", number + 1);
        if contains_word(line, unfinished) && is_source(path) {
            complaints.push(format!("{place}: {unfinished} never lands"));
        }
        if contains_word(line, later) && is_source(path) && !debt.contains(path.as_str()) {
            complaints.push(format!(
                "{place}: {later} needs an entry for {path} in {DEBT}"
            ));
        }
        for folder in [concat!("/wo", "rk/"), concat!("/ro", "ot/")] {
            if starts_a_path(line, folder) {
                complaints.push(format!("{place}: a path of one machine ({folder}…)"));
            }
        }
    }
    complaints
}

/// Whether the rules about length and unfinished work hold for a file: they do not for text about
/// those rules, nor for what a tool writes.
fn is_source(path: &str) -> bool {
    !path.ends_with(".md") && !path.ends_with(".lock")
}

fn is_path_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/._-".contains(c)
}

/// Whether `word` stands alone in the line.
fn contains_word(line: &str, word: &str) -> bool {
    let is_word_character = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(is_word_character)
            && !line[at + word.len()..].starts_with(is_word_character)
    })
}

/// Whether an absolute path below `folder` begins somewhere in the line.
fn starts_a_path(line: &str, folder: &str) -> bool {
    // `…/{pid}/root/` goes on with a path, too.
    let goes_on = |c: char| is_path_character(c) || c == '}';
    line.match_indices(folder)
        .any(|(at, _)| !line[..at].ends_with(goes_on))
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn long_files_say_why() {
        let long = "x\n".repeat(LINES_MAX + 1);
        assert_eq!(check(&[file("a.rs", &long)]).len(), 1);
        let explained = format!("//! Long because it is a table.\n{long}");
        assert!(check(&[file("a.rs", &explained)]).is_empty());
        assert!(check(&[file("Cargo.lock", &long)]).is_empty());
    }

    #[test]
    fn unfinished_work_never_lands() {
        let text = format!("// {}: later\n", concat!("FIX", "ME"));
        assert_eq!(check(&[file("a.rs", &text)]).len(), 1);
    }

    #[test]
    fn postponed_work_needs_an_entry_for_its_file() {
        let code = file(
            "broker/src/a.rs",
            &format!("// {}: more\n", concat!("TO", "DO")),
        );
        assert_eq!(check(std::slice::from_ref(&code)).len(), 1);
        let debt = file(DEBT, "- `broker/src/a.rs`: more.\n");
        assert!(check(&[code, debt]).is_empty());
    }

    #[test]
    fn words_that_contain_a_marker_are_no_marker() {
        let text = format!("const {}_MAX: u8 = 1;\n", concat!("TO", "DO"));
        assert!(check(&[file("a.rs", &text)]).is_empty());
    }

    #[test]
    fn paths_of_one_machine_are_refused() {
        for (text, complaints) in [
            (format!("see {}main/x", concat!("/wo", "rk/")), 1),
            (format!("\"{}.cache\"", concat!("/ro", "ot/")), 1),
            ("tests/guests/work/x".to_owned(), 0),
            (format!("/proc/{{pid}}{}", concat!("/ro", "ot/")), 0),
            (format!("some{}x", concat!("/wo", "rk/")), 0),
            (format!("HOME={}x", concat!("/ro", "ot/")), 1),
        ] {
            assert_eq!(check(&[file("a.md", &text)]).len(), complaints, "{text}");
        }
    }
}
