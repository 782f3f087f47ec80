//! `console`: the virtio console. Sends `lines=` lines and `size=` bytes of pattern text, sends back
//! `count=` lines that it receives, and waits for `resizes=` changes of the terminal's size.

use core::fmt::Write;

use bulkhead_guest::pattern;
use bulkhead_guest::prng::Prng;
use bulkhead_guest::record::Escaped;

use crate::machine::Machine;
use crate::report::{Failure, Text, expect, say};
use crate::sys::irq;
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, Device, feature, id};
use crate::virtio::queue::{Queue, Segment};

const SIZE: u64 = 1;
const RECEIVE_BUFFERS: usize = 8;
const BUFFER: usize = 256;
const LINE_MAX: usize = 160;

struct Console {
    device: Device,
    has_size: bool,
    receive: Queue,
    transmit: Queue,
    /// Buffers of the receive queue, and the descriptor of each.
    buffers: Dma,
    heads: [u16; RECEIVE_BUFFERS],
    out: Dma,
    timeout_ms: u64,
    prng: Prng,
}

/// Does all that was asked for.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let device = mmio::find(machine, id::CONSOLE, 0)?;
    let features = device.negotiate(SIZE | feature::INDIRECT_DESC | feature::EVENT_IDX)?;
    let receive = device.queue(0, features)?;
    let transmit = device.queue(1, features)?;
    let mut console = Console {
        device,
        has_size: features & SIZE != 0,
        receive,
        transmit,
        buffers: phys::allocate(RECEIVE_BUFFERS * BUFFER),
        heads: [0; RECEIVE_BUFFERS],
        out: phys::allocate(4096),
        timeout_ms: super::timeout_ms(machine)?,
        prng: Prng::new(machine.number("seed", 1)?),
    };
    device.start()?;
    console.offer_buffers()?;
    let (columns, rows) = console.size();
    say!(
        "console.info slot={} gsi={} cols={columns} rows={rows} has_size={} features={features:#x}",
        device.slot,
        device.gsi,
        u8::from(console.has_size)
    );
    irq::enable(device.gsi);
    let result = console.all(machine);
    irq::disable(device.gsi);
    result
}

impl Console {
    fn all(&mut self, machine: &Machine) -> Result<(), Failure> {
        self.send_lines(machine.number("lines", 4)?)?;
        self.send_bulk(machine.number("size", 0)?)?;
        self.echo(machine.number("count", 0)?)?;
        self.watch_size(machine.number("resizes", 0)?)
    }

    fn size(&self) -> (u16, u16) {
        if self.has_size {
            (self.device.config(0), self.device.config(2))
        } else {
            (0, 0)
        }
    }

    fn offer_buffers(&mut self) -> Result<(), Failure> {
        for index in 0..RECEIVE_BUFFERS {
            let segment = Segment::writable(self.buffers.part(index * BUFFER, BUFFER));
            let head = self
                .receive
                .build(&[segment])
                .ok_or(Failure::Parameter("queue_size"))?;
            self.heads[index] = head;
            self.receive.offer(head);
        }
        self.receive.kick();
        Ok(())
    }

    /// Sends bytes as one chain of one to three segments.
    fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.out.all_mut()[..bytes.len()].copy_from_slice(bytes);
        let first = self.prng.within(1, bytes.len() as u64) as usize;
        let second = self.prng.below((bytes.len() - first) as u64 + 1) as usize;
        let third = bytes.len() - first - second;
        let parts = [(0, first), (first, second), (first + second, third)];
        let mut segments = [Segment::readable(self.out.part(0, 1)); 3];
        let mut count = 0;
        for (offset, len) in parts.into_iter().filter(|(_, len)| *len > 0) {
            segments[count] = Segment::readable(self.out.part(offset, len));
            count += 1;
        }
        let deadline = Deadline::after_ms(self.timeout_ms);
        let used = self.transmit.transfer(&segments[..count], deadline)?;
        expect("used_len", u64::from(used.len), 0)
    }

    fn send_lines(&mut self, lines: u64) -> Result<(), Failure> {
        for line in 1..=lines {
            let mut text = Text::new();
            let _ = write!(text, "bulkhead-guest console line {line} of {lines}\r\n");
            self.send(text.bytes())?;
        }
        if lines > 0 {
            say!("console.lines sent={lines}");
        }
        Ok(())
    }

    /// 64-byte lines of hexadecimal pattern, in requests of many sizes.
    fn send_bulk(&mut self, size: u64) -> Result<(), Failure> {
        if size == 0 {
            return Ok(());
        }
        let mut chunk = [0_u8; 2048];
        let (mut sent, mut sum, mut requests) = (0_u64, 0_u64, 0_u64);
        while sent < size {
            let len = self.prng.within(1, chunk.len() as u64).min(size - sent) as usize;
            for (byte, place) in chunk[..len].iter_mut().zip(sent..) {
                *byte = match place % 64 {
                    62 => b'\r',
                    63 => b'\n',
                    _ => {
                        b"0123456789abcdef"
                            [(pattern::word(7, place / 64, place % 64) & 15) as usize]
                    }
                };
                sum = sum.wrapping_mul(31).wrapping_add(u64::from(*byte));
            }
            let bytes = chunk;
            self.send(&bytes[..len])?;
            sent += len as u64;
            requests += 1;
        }
        say!("console.bulk bytes={sent} requests={requests} sum31={sum:#x}");
        Ok(())
    }

    /// Takes one received buffer, calls `each` with its bytes, and offers it again.
    fn take(&mut self, mut each: impl FnMut(u8)) -> Result<bool, Failure> {
        let Some(used) = self.receive.poll()? else {
            return Ok(false);
        };
        let index = self.heads.iter().position(|head| *head == used.head);
        let Some(index) = index.filter(|_| used.len as usize <= BUFFER) else {
            let (got, expected) = (u64::from(used.len), BUFFER as u64);
            return Err(Failure::Wrong {
                what: "used_len",
                got,
                expected,
            });
        };
        let buffer = self.buffers.part(index * BUFFER, used.len as usize);
        buffer.all().iter().for_each(|byte| each(*byte));
        self.receive.offer(used.head);
        self.receive.kick();
        Ok(true)
    }

    fn echo(&mut self, count: u64) -> Result<(), Failure> {
        let mut line = [0_u8; LINE_MAX];
        let mut len = 0;
        let mut done = 0;
        if count > 0 {
            say!("console.ready count={count}");
        }
        while done < count {
            let mut input = [0_u8; BUFFER];
            let mut received = 0;
            self.receive.want_interrupt();
            let deadline = Deadline::after_ms(self.timeout_ms);
            let mut failure = None;
            let arrived = irq::sleep_until(deadline, || {
                let taken = self.take(|byte| {
                    input[received] = byte;
                    received += 1;
                });
                taken.unwrap_or_else(|error| {
                    failure = Some(error);
                    true
                })
            });
            if let Some(failure) = failure {
                return Err(failure);
            }
            if !arrived {
                return Err(Failure::Timeout("console_input"));
            }
            self.device.take_interrupt();
            for byte in &input[..received] {
                if !matches!(byte, b'\r' | b'\n') {
                    line[len.min(LINE_MAX - 1)] = *byte;
                    len = (len + 1).min(LINE_MAX);
                    continue;
                }
                if len == 0 {
                    continue;
                }
                done += 1;
                say!(
                    "console.echo index={done} bytes={len} text={}",
                    Escaped(&line[..len])
                );
                let text = line;
                self.send(b"echo: ")?;
                self.send(&text[..len])?;
                self.send(b"\r\n")?;
                len = 0;
            }
        }
        Ok(())
    }

    fn watch_size(&mut self, resizes: u64) -> Result<(), Failure> {
        let mut last = self.size();
        if resizes > 0 {
            say!("console.watching resizes={resizes}");
        }
        for index in 1..=resizes {
            let deadline = Deadline::after_ms(self.timeout_ms);
            let mut now = last;
            let changed = irq::sleep_until(deadline, || {
                self.device.take_interrupt();
                now = self.size();
                now != last
            });
            if !changed {
                return Err(Failure::Timeout("console_resize"));
            }
            say!("console.resize index={index} cols={} rows={}", now.0, now.1);
            last = now;
        }
        Ok(())
    }
}
