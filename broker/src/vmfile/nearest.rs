//! Finds the word that was probably meant.

/// Number of letters to insert, remove, replace or swap to make `a` into `b`.
fn distance(a: &[u8], b: &[u8]) -> usize {
    // Optimal string alignment, three rows at a time.
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &y) in b.iter().enumerate() {
            let at = |row: &[usize], j: usize| row.get(j).copied().unwrap_or(usize::MAX / 2);
            let replaced = at(&above, j) + usize::from(x != y);
            let mut best = replaced.min(at(&above, j + 1) + 1).min(at(&row, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(&y) && b.get(j - 1) == Some(&x);
            if swapped {
                best = best.min(at(&before, j - 1) + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or(0)
}

/// The word of `known` that is nearest to `word`, unless all are too far to be what was meant.
pub fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    if word.len() > 64 {
        return None;
    }
    let word = word.to_ascii_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|candidate| {
            let candidate_bytes = candidate.as_bytes();
            let far = distance(word.as_bytes(), candidate_bytes);
            // A prefix of three letters or more is one slip, however much is missing.
            let prefix =
                word.len() >= 3 && (candidate.starts_with(&word) || word.starts_with(candidate));
            (if prefix { far.min(1) } else { far }, candidate)
        })
        .filter(|(far, candidate)| *far <= 1.max(candidate.len().max(word.len()) / 3))
        .min_by_key(|(far, _)| *far)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_are_one_step() {
        assert_eq!(distance(b"memroy", b"memory"), 1);
        assert_eq!(distance(b"", b"abc"), 3);
        assert_eq!(distance(b"abc", b""), 3);
        assert_eq!(distance(b"kitten", b"sitting"), 3);
    }

    #[test]
    fn nearest_is_what_was_meant_or_nothing() {
        let keys = ["cpus", "memory", "hugepages"];
        assert_eq!(nearest("memroy", keys), Some("memory"));
        assert_eq!(nearest("mem", keys), Some("memory"));
        assert_eq!(nearest("CPUS", keys), Some("cpus"));
        assert_eq!(nearest("huge_pages", keys), Some("hugepages"));
        assert_eq!(nearest("colour", keys), None);
    }
}
