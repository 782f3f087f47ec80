//! Any bytes as what a guest, clients of the host and the clock do to the exchange of a socket device: it
//! keeps its bounds, never says more than there is room for, and falls silent when all is said.
#![no_main]

use bulkhead_vsock::exchange::{CONNECTIONS_MAX, Exchange};
use bulkhead_vsock::packet::{HEADER_BYTES, HOST_CID, Header};
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const CID: u64 = 3;
/// Sockets that are open at a time.
const CLIENTS_MAX: usize = 16;
/// More packets than there can be to say.
const SAID_MAX: usize = 100_000;

fn pair() -> Option<(UnixStream, UnixStream)> {
    let (near, far) = UnixStream::pair().ok()?;
    near.set_nonblocking(true).ok()?;
    far.set_nonblocking(true).ok()?;
    Some((near, far))
}

fuzz_target!(|data: &[u8]| {
    let mut exchange = Exchange::new(CID);
    let mut now = Instant::now();
    let mut clients: Vec<UnixStream> = Vec::new();
    let mut rest = data;
    while let Some((&[what, size], behind)) = rest.split_first_chunk() {
        let (piece, left) = behind.split_at(usize::from(size).min(behind.len()));
        rest = left;
        match what % 7 {
            0 | 1 => {
                let mut bytes = [0; HEADER_BYTES];
                bytes
                    .iter_mut()
                    .zip(piece)
                    .for_each(|(to, from)| *to = *from);
                let mut header = Header::decode(&bytes);
                if what % 7 == 0 {
                    // Past the first check, and onto ports that have connections.
                    (header.src_cid, header.dst_cid, header.kind) = (CID, HOST_CID, 1);
                    header.src_port %= 4;
                    header.dst_port = (header.dst_port % 4) | (header.dst_port & 1 << 30);
                    header.op %= 9;
                    header.len %= 256;
                }
                exchange.hear(&header, piece.get(HEADER_BYTES..).unwrap_or_default(), now);
            }
            2 if clients.len() < CLIENTS_MAX => {
                let Some((near, mut client)) = pair() else {
                    return;
                };
                let _full = client.write(piece);
                exchange.accept(near, now);
                clients.push(client);
            }
            3 => {
                if let Some(dial) = exchange.next_dial() {
                    let reached = (clients.len() < CLIENTS_MAX && size % 2 == 0).then(pair);
                    let (near, client) = reached.flatten().unzip();
                    exchange.dialled(dial.id, near);
                    clients.extend(client);
                }
            }
            4 => exchange.wake(u64::from(size % 32), piece.len() % 2 == 1, now),
            5 => {
                let mut room = vec![0; usize::from(size) * 16];
                if let Some(header) = exchange.say(&mut room, now) {
                    assert!(usize::try_from(header.len).is_ok_and(|len| len <= room.len()));
                }
            }
            _ if size < 16 => {
                now += Duration::from_secs(size.into());
                exchange.expire(now);
                assert!(
                    exchange
                        .next_deadline()
                        .is_none_or(|deadline| deadline > now)
                );
            }
            _ if !clients.is_empty() => {
                clients.swap_remove(usize::from(size) % clients.len());
            }
            _ => {}
        }
        assert!(exchange.len() <= CONNECTIONS_MAX);
    }
    drop(clients);
    let mut room = [0; 4096];
    let said = (0..SAID_MAX).take_while(|_| exchange.say(&mut room, now).is_some());
    assert!(said.count() < SAID_MAX, "there is always more to say");
});
