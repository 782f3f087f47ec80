//! What a client on the host says first: `CONNECT <port>\n`, as with Firecracker.

use crate::packet::PORT_ANY;

/// Bytes of a greeting at most, with its end of line.
pub const GREETING_BYTES_MAX: usize = 32;

/// Why a greeting is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GreetingError {
    /// No end of line where there has to be one.
    #[error("no end of line in the first {GREETING_BYTES_MAX} bytes")]
    TooLong,
    /// It is something else.
    #[error("not of the form CONNECT <port>")]
    Form,
    /// The port is not one that a guest can listen on.
    #[error("the port is not in 0..=4294967294")]
    Port,
}

/// A complete greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The port of the guest.
    pub port: u32,
    /// Bytes that the greeting takes, with its end of line. What is behind is payload.
    pub bytes: usize,
}

/// The greeting at the front of `said`; `None` while its end is missing.
///
/// # Errors
/// [`GreetingError`] as soon as it can be no greeting any more.
pub fn parse(said: &[u8]) -> Result<Option<Greeting>, GreetingError> {
    let window = said.get(..GREETING_BYTES_MAX).unwrap_or(said);
    let Some(end) = window.iter().position(|&b| b == b'\n') else {
        return if said.len() < GREETING_BYTES_MAX {
            Ok(None)
        } else {
            Err(GreetingError::TooLong)
        };
    };
    let line = window.get(..end).unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let line = std::str::from_utf8(line).map_err(|_| GreetingError::Form)?;
    let (verb, port) = line.split_once(' ').ok_or(GreetingError::Form)?;
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    if !verb.eq_ignore_ascii_case("connect") || !digits {
        return Err(GreetingError::Form);
    }
    match port.parse() {
        Ok(port) if port != PORT_ANY => Ok(Some(Greeting {
            port,
            bytes: end + 1,
        })),
        _ => Err(GreetingError::Port),
    }
}

/// The answer to a greeting that the guest has accepted: `OK <port>\n` with the port of the host's side.
#[must_use]
pub fn accepted(host_port: u32) -> Vec<u8> {
    format!("OK {host_port}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn greetings_of_existing_tools_are_understood() {
        for (said, port) in [
            ("CONNECT 52\n", 52),
            ("connect 0\n", 0),
            ("CONNECT 4294967294\r\n", u32::MAX - 1),
        ] {
            let bytes = said.len();
            assert_eq!(parse(said.as_bytes()), Ok(Some(Greeting { port, bytes })));
        }
    }

    #[test]
    fn payload_behind_the_greeting_is_not_a_part_of_it() {
        let found = parse(b"CONNECT 7\nGET / HTTP/1.1\r\n\r\n and so on").unwrap();
        assert_eq!(found, Some(Greeting { port: 7, bytes: 10 }));
    }

    #[test]
    fn other_lines_are_refused() {
        use GreetingError::{Form, Port, TooLong};
        for (said, error) in [
            ("\n", Form),
            ("CONNECT\n", Form),
            ("CONNECT \n", Form),
            ("CONNECT +5\n", Form),
            ("CONNECT -5\n", Form),
            ("CONNECT  5\n", Form),
            ("CONNECT 5 6\n", Form),
            ("CONNECTED 5\n", Form),
            ("CONNECT 4294967295\n", Port),
            ("CONNECT 99999999999999999999\n", Port),
            ("CONNECT 5                        \n", TooLong),
        ] {
            assert_eq!(parse(said.as_bytes()), Err(error), "{said:?}");
        }
        assert_eq!(parse(b"CONNECT \xff\n"), Err(Form));
    }

    proptest! {
        #[test]
        fn every_port_is_found_however_the_line_arrives(port in 0..PORT_ANY, tail in any::<Vec<u8>>()) {
            let line = format!("CONNECT {port}\n");
            for end in 0..line.len() {
                prop_assert_eq!(parse(&line.as_bytes()[..end]), Ok(None));
            }
            let said = [line.as_bytes(), &tail].concat();
            prop_assert_eq!(parse(&said), Ok(Some(Greeting { port, bytes: line.len() })));
        }

        #[test]
        fn a_decision_is_made_within_the_limit(said in any::<Vec<u8>>()) {
            match parse(&said) {
                Ok(None) => prop_assert!(said.len() < GREETING_BYTES_MAX && !said.contains(&b'\n')),
                Ok(Some(found)) => prop_assert_eq!(said[found.bytes - 1], b'\n'),
                Err(_) => {}
            }
        }
    }
}
