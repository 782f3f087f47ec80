//! DNS (RFC 1035) for the names of a network's machines: one question in, one answer out. Nothing is
//! forwarded, kept or asked elsewhere.

use crate::settings::NAME_BYTES_MAX;
use crate::wire::{bytes_at, u8_at, u16_at};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) const PORT: u16 = 53;

const HEADER_BYTES: usize = 12;
const NAME_MAX: usize = 255;
const TTL_S: u32 = 60;
const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_AAAA: u16 = 28;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;
/// Addresses in one answer, so that it fits a datagram.
const ANSWERS_MAX: usize = 12;

const NO_ERROR: u8 = 0;
const FORMAT_ERROR: u8 = 1;
const NO_SUCH_NAME: u8 = 3;
const NOT_IMPLEMENTED: u8 = 4;
const REFUSED: u8 = 5;

/// What is known of names.
pub(crate) trait Directory {
    /// The addresses of a machine, if there is one of this name.
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>>;
    /// The machine that has an address.
    fn name_of(&self, address: IpAddr) -> Option<String>;
    /// The domain of the machines.
    fn domain(&self) -> &str;
    /// Whether the server speaks for this address, so that one without a machine has no name.
    fn is_local(&self, address: IpAddr) -> bool;
    /// Whether machines know other servers, which they should ask for other names.
    fn has_others(&self) -> bool;
}

/// What a question is about.
#[derive(Debug, PartialEq, Eq)]
enum Subject {
    Name(String),
    Address(IpAddr),
    /// The domain itself.
    Domain,
    Elsewhere,
}

/// The answer to a datagram; `None` for what is no query at all.
pub(crate) fn answer(query: &[u8], directory: &impl Directory) -> Option<Vec<u8>> {
    let flags = u16_at(query, 2)?;
    query.get(..HEADER_BYTES)?;
    if flags & 0x8000 != 0 {
        // An answer to an answer would never end.
        return None;
    }
    if flags & 0x7800 != 0 {
        return Some(message(query, &[], NOT_IMPLEMENTED, &[]));
    }
    let is_one = u16_at(query, 4)? == 1;
    let question = if is_one { read_question(query) } else { None };
    let Some((labels, kind, class, question)) = question else {
        return Some(message(query, &[], FORMAT_ERROR, &[]));
    };
    if class != CLASS_IN {
        return Some(message(query, question, REFUSED, &[]));
    }
    let (code, answers) = match subject(&labels, directory.domain()) {
        Subject::Name(name) => match directory.addresses(&name) {
            Some(addresses) => (NO_ERROR, addresses_of(&addresses, kind)),
            None => (NO_SUCH_NAME, Vec::new()),
        },
        Subject::Domain => (NO_ERROR, Vec::new()),
        Subject::Address(address) => match directory.name_of(address) {
            Some(name) if matches!(kind, TYPE_PTR | TYPE_ANY) => {
                let name = format!("{name}.{}", directory.domain());
                (NO_ERROR, vec![(TYPE_PTR, encode_name(&name))])
            }
            Some(_) => (NO_ERROR, Vec::new()),
            None if directory.is_local(address) || !directory.has_others() => {
                (NO_SUCH_NAME, Vec::new())
            }
            None => (REFUSED, Vec::new()),
        },
        Subject::Elsewhere if directory.has_others() => (REFUSED, Vec::new()),
        Subject::Elsewhere => (NO_SUCH_NAME, Vec::new()),
    };
    Some(message(query, question, code, &answers))
}

fn addresses_of(addresses: &[IpAddr], kind: u16) -> Vec<(u16, Vec<u8>)> {
    let record = |address: &IpAddr| match address {
        IpAddr::V4(a) if matches!(kind, TYPE_A | TYPE_ANY) => Some((TYPE_A, a.octets().to_vec())),
        IpAddr::V6(a) if matches!(kind, TYPE_AAAA | TYPE_ANY) => {
            Some((TYPE_AAAA, a.octets().to_vec()))
        }
        _ => None,
    };
    let records = addresses.iter().filter_map(record);
    records.take(ANSWERS_MAX).collect()
}

/// Labels in lower case, type, class, and the question's bytes.
fn read_question(query: &[u8]) -> Option<(Vec<String>, u16, u16, &[u8])> {
    let mut at = HEADER_BYTES;
    let mut labels = Vec::new();
    loop {
        let len = usize::from(u8_at(query, at)?);
        at += 1;
        if len == 0 {
            break;
        }
        // Longer ones are pointers, which have nothing before them to point to.
        if len > NAME_BYTES_MAX || at + len - HEADER_BYTES > NAME_MAX {
            return None;
        }
        let label = query.get(at..at + len)?;
        // What is no text is the name of nothing here.
        let label = String::from_utf8_lossy(label).to_ascii_lowercase();
        labels.push(label);
        at += len;
    }
    let (kind, class) = (u16_at(query, at)?, u16_at(query, at + 2)?);
    Some((labels, kind, class, query.get(HEADER_BYTES..at + 4)?))
}

fn subject(labels: &[String], domain: &str) -> Subject {
    let ends_in = |suffix: &[&str]| labels.ends_with_str(suffix);
    if ends_in(&["in-addr", "arpa"]) {
        return reverse_v4(labels).map_or(Subject::Elsewhere, |a| Subject::Address(a.into()));
    }
    if ends_in(&["ip6", "arpa"]) {
        return reverse_v6(labels).map_or(Subject::Elsewhere, |a| Subject::Address(a.into()));
    }
    let own: Vec<String> = domain.split('.').map(str::to_ascii_lowercase).collect();
    match labels {
        [name] if own.as_slice() != labels => Subject::Name(name.clone()),
        _ if labels == own.as_slice() => Subject::Domain,
        [name, rest @ ..] if rest == own.as_slice() => Subject::Name(name.clone()),
        // Deeper names of the domain are nobody's.
        _ if labels.ends_with(&own) => Subject::Name(labels.join(".")),
        _ => Subject::Elsewhere,
    }
}

trait EndsWith {
    fn ends_with_str(&self, suffix: &[&str]) -> bool;
}

impl EndsWith for [String] {
    fn ends_with_str(&self, suffix: &[&str]) -> bool {
        let own = self.iter().rev().map(String::as_str);
        self.len() > suffix.len() && own.zip(suffix.iter().rev()).all(|(a, b)| a == *b)
    }
}

fn reverse_v4(labels: &[String]) -> Option<Ipv4Addr> {
    let numbers = labels.get(..labels.len().checked_sub(2)?)?;
    let mut octets = [0; 4];
    if numbers.len() != octets.len() {
        return None;
    }
    for (octet, label) in octets.iter_mut().zip(numbers.iter().rev()) {
        *octet = label.parse().ok()?;
    }
    Some(octets.into())
}

fn reverse_v6(labels: &[String]) -> Option<Ipv6Addr> {
    let digits = labels.get(..labels.len().checked_sub(2)?)?;
    if digits.len() != 32 {
        return None;
    }
    let mut address = 0u128;
    for digit in digits.iter().rev() {
        if digit.len() != 1 {
            return None;
        }
        address = (address << 4) | u128::from(u8::from_str_radix(digit, 16).ok()?);
    }
    Some(address.into())
}

fn encode_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        let label = label
            .as_bytes()
            .get(..label.len().min(NAME_BYTES_MAX))
            .unwrap_or_default();
        bytes.push(u8::try_from(label.len()).unwrap_or(0));
        bytes.extend_from_slice(label);
    }
    bytes.push(0);
    bytes
}

fn message(query: &[u8], question: &[u8], code: u8, answers: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let id = bytes_at::<2>(query, 0).unwrap_or_default();
    let flags = u8_at(query, 2).unwrap_or(0);
    // An answer with authority; the operation and the wish for recursion are repeated.
    let flags = 0x84 | (flags & 0x79);
    let questions = u8::from(!question.is_empty());
    let count = u8::try_from(answers.len()).unwrap_or(0);
    let mut message = vec![
        id[0], id[1], flags, code, 0, questions, 0, count, 0, 0, 0, 0,
    ];
    message.extend_from_slice(question);
    for (kind, data) in answers {
        // The name is the question's.
        message.extend_from_slice(&[0xc0, 0x0c]);
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&CLASS_IN.to_be_bytes());
        message.extend_from_slice(&TTL_S.to_be_bytes());
        let len = u16::try_from(data.len()).unwrap_or(0);
        message.extend_from_slice(&len.to_be_bytes());
        message.extend_from_slice(data);
    }
    message
}

#[cfg(test)]
pub(crate) mod testing {
    //! A resolver, as far as tests need one.
    use super::*;

    /// A query with an odd identity that wants recursion.
    pub(crate) fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut query = vec![0x5a, 0x77, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let name = name.trim_end_matches('.');
        query.extend(if name.is_empty() {
            vec![0]
        } else {
            encode_name(name)
        });
        query.extend(kind.to_be_bytes());
        query.extend(CLASS_IN.to_be_bytes());
        query
    }

    /// The code and the data of the records of an answer to `query`, every byte of which is accounted for.
    pub(crate) fn read(query: &[u8], answer: &[u8]) -> (u8, Vec<String>) {
        assert_eq!(answer[..2], query[..2]);
        assert_eq!(answer[2] & 0xfe, 0x84, "an answer with authority");
        assert_eq!(answer[2] & 1, query[2] & 1);
        let count = u16_at(answer, 6).unwrap();
        assert_eq!(answer[8..12], [0; 4]);
        let question = match u16_at(answer, 4) {
            Some(1) => &query[HEADER_BYTES..],
            _ => &[],
        };
        let (asked, mut rest) = answer[HEADER_BYTES..].split_at(question.len());
        assert_eq!(asked, question);
        let mut data = Vec::new();
        for _ in 0..count {
            assert_eq!((&rest[..2], &rest[4..6]), (&[0xc0, 0x0c][..], &[0, 1][..]));
            let len = usize::from(u16_at(rest, 10).unwrap());
            let body = &rest[12..12 + len];
            data.push(match u16_at(rest, 2).unwrap() {
                TYPE_A => crate::wire::ipv4_at(body, 0).unwrap().to_string(),
                TYPE_AAAA => crate::wire::ipv6_at(body, 0).unwrap().to_string(),
                TYPE_PTR => {
                    let mut labels = vec![];
                    let mut at = 0;
                    while body[at] > 0 {
                        let len = usize::from(body[at]);
                        labels.push(String::from_utf8(body[at + 1..=at + len].to_vec()).unwrap());
                        at += len + 1;
                    }
                    assert_eq!(at + 1, len);
                    labels.join(".")
                }
                other => panic!("a record of type {other}"),
            });
            rest = &rest[12 + len..];
        }
        assert!(rest.is_empty());
        (answer[3], data)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{query, read};
    use super::*;
    use proptest::prelude::*;

    struct Lab {
        others: bool,
    }

    const WEB: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
    const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5);

    impl Directory for Lab {
        fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
            (name == "web").then(|| vec![WEB.into(), WEB6.into()])
        }
        fn name_of(&self, address: IpAddr) -> Option<String> {
            (address == WEB || address == WEB6).then(|| "web".to_owned())
        }
        fn domain(&self) -> &str {
            "lab.internal"
        }
        fn is_local(&self, address: IpAddr) -> bool {
            matches!(address, IpAddr::V4(a) if a.octets()[..3] == [10, 0, 0])
        }
        fn has_others(&self) -> bool {
            self.others
        }
    }

    const TYPE_MX: u16 = 15;

    fn ask(name: &str, kind: u16, others: bool) -> (u8, Vec<String>) {
        let query = query(name, kind);
        read(&query, &answer(&query, &Lab { others }).unwrap())
    }

    #[test]
    fn machines_have_names_and_addresses_have_machines() {
        for name in ["web.lab.internal.", "web.", "WeB.Lab.INTERNAL."] {
            let found = |address: &str| (NO_ERROR, vec![address.to_owned()]);
            assert_eq!(ask(name, TYPE_A, true), found("10.0.0.5"));
            assert_eq!(ask(name, TYPE_AAAA, true), found("fd00::5"));
            assert_eq!(ask(name, TYPE_ANY, true).1.len(), 2);
            assert_eq!(ask(name, TYPE_MX, true), (NO_ERROR, vec![]));
        }
        let reverse = ["5.0.0.10.in-addr.arpa.".to_owned(), {
            let digits = format!("{:032x}", u128::from(WEB6));
            let digits: Vec<String> = digits.chars().rev().map(String::from).collect();
            format!("{}.ip6.arpa.", digits.join("."))
        }];
        for name in reverse {
            let found = (NO_ERROR, vec!["web.lab.internal".to_owned()]);
            assert_eq!(ask(&name, TYPE_PTR, true), found);
        }
    }

    #[test]
    fn what_is_not_here_does_not_exist_or_is_asked_elsewhere() {
        let code = |name: &str, others| {
            let (code, data) = ask(name, TYPE_A, others);
            assert!(data.is_empty());
            code
        };
        for others in [false, true] {
            assert_eq!(code("db.lab.internal.", others), NO_SUCH_NAME);
            assert_eq!(code("a.web.lab.internal.", others), NO_SUCH_NAME);
            assert_eq!(code("9.0.0.10.in-addr.arpa.", others), NO_SUCH_NAME);
            assert_eq!(code("lab.internal.", others), NO_ERROR);
        }
        for name in ["debian.org.", "8.8.8.8.in-addr.arpa.", "1.ip6.arpa.", "."] {
            assert_eq!(code(name, true), REFUSED, "{name}");
            assert_eq!(code(name, false), NO_SUCH_NAME, "{name}");
        }
    }

    #[test]
    fn answers_are_not_answered_and_nonsense_is_a_format_error() {
        let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'w', b'e', b'b', 0];
        query.extend([0, 1, 0, 1]);
        let code = |query: &[u8]| answer(query, &Lab { others: true }).map(|a| a[3]);
        assert_eq!(code(&query), Some(NO_ERROR));
        for (at, value, expected) in [
            (2, 0x80, None),
            (2, 0x28, Some(NOT_IMPLEMENTED)),
            (5, 2, Some(FORMAT_ERROR)),
            (5, 0, Some(FORMAT_ERROR)),
            (12, 0xc0, Some(FORMAT_ERROR)),
            (12, 60, Some(FORMAT_ERROR)),
            (20, 3, Some(REFUSED)),
        ] {
            let mut other = query.clone();
            other[at] = value;
            assert_eq!(code(&other), expected, "{at} {value}");
        }
        assert_eq!(code(&query[..20]), Some(FORMAT_ERROR));
        assert_eq!(code(&query[..11]), None);
    }

    proptest! {
        #[test]
        fn random_queries_are_answered_within_bounds(
            bytes in prop::collection::vec(any::<u8>(), 0..300), begins_well: bool,
        ) {
            let mut bytes = bytes;
            if begins_well {
                crate::wire::put(&mut bytes, 2, &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            }
            if let Some(answer) = answer(&bytes, &Lab { others: true }) {
                prop_assert!(answer.len() <= bytes.len().max(HEADER_BYTES) + 300);
                // The question is repeated as it was, without what followed it.
                let asked = answer.len().min(bytes.len());
                if answer[5] == 1 && answer[7] == 0 {
                    prop_assert_eq!(&answer[HEADER_BYTES..], &bytes[HEADER_BYTES..asked]);
                }
            }
        }
    }
}
