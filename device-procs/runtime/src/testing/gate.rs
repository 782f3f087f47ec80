//! The gate's half of a device: the driver half of its shadow virtqueues, with the framing of the
//! real gate.

use bulkhead_ipc::device_kind::{Framing, POSITION_BYTES, TAIL_OFFSET, VirtioKind};
use bulkhead_ipc::ring::{PageRange, RequestLayout, ShadowDriver, Span, WindowPages};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_ipc::window::{DeviceState, Doorbells, DriverView, Published, Window, WindowLayout};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a test waits for a device.
const PATIENCE: Duration = Duration::from_secs(30);

/// A completed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The slot that [`Rig::submit`] returned.
    pub slot: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
    /// All writable bytes of the request as they are now, tail last.
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
struct Placed {
    pages: Option<PageRange>,
    data: (usize, usize),
    tail: (usize, usize),
}

/// The gate of one device.
#[derive(Debug)]
pub struct Gate {
    kind: VirtioKind,
    /// The window.
    pub window: Window,
    window_fd: OwnedFd,
    /// Its doorbells.
    pub bells: Doorbells,
    drivers: Vec<ShadowDriver>,
    pages: WindowPages,
    placed: HashMap<(usize, u16), Placed>,
    epoch: u64,
    /// Whether writable bytes are filled with a pattern first.
    pub fill: bool,
}

#[expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a test that cannot set itself up fails"
)]
impl Gate {
    /// A gate with a fresh window of generation 1.
    #[must_use]
    pub fn new(kind: VirtioKind, window_bytes: u32, queue_sizes: &[u16]) -> Self {
        let layout = WindowLayout::of(kind, window_bytes as usize, queue_sizes).unwrap();
        let fd = sealed_memfd("window", layout.bytes as u64).unwrap();
        let window = Window::map(fd.try_clone().unwrap(), layout).unwrap();
        window.initialise(1);
        let layout = &window.layout;
        Self {
            kind,
            drivers: layout
                .queues
                .iter()
                .map(|&q| ShadowDriver::new(q))
                .collect(),
            pages: WindowPages::new(layout.data_pages),
            window,
            window_fd: fd,
            bells: Doorbells {
                kick: Doorbell::new().unwrap(),
                call: Doorbell::new().unwrap(),
            },
            placed: HashMap::new(),
            epoch: 0,
            fill: true,
        }
    }

    /// Descriptors for the device: window, kick, call.
    #[must_use]
    pub fn device_fds(&self) -> (OwnedFd, Doorbell, Doorbell) {
        (
            self.window_fd.try_clone().unwrap(),
            self.bells.kick.try_clone().unwrap(),
            self.bells.call.try_clone().unwrap(),
        )
    }

    /// What the device has published.
    #[must_use]
    pub fn published(&self) -> Published {
        assert_eq!(self.window.device_state(), DeviceState::Ready);
        self.window.published(0).unwrap()
    }

    /// The guest's driver starts with these features.
    pub fn start_driver(&mut self, features: u64) {
        self.epoch = (self.epoch + 1) | 1;
        let epoch = self.epoch;
        self.window.set_driver(DriverView { features, epoch });
    }

    /// The guest resets the device.
    pub fn reset_driver(&mut self) {
        self.epoch = (self.epoch + 2) & !1;
        let (features, epoch) = (0, self.epoch);
        self.window.set_driver(DriverView { features, epoch });
    }

    /// Puts a request into a queue as the gate would: `readable` is what the guest wrote (without what
    /// the gate puts in front: `position`, the stream position or the request's number), `writable` the bytes that it offers. `None` when nothing more fits.
    pub fn submit(
        &mut self,
        queue: usize,
        position: Option<u64>,
        readable: &[u8],
        writable: usize,
    ) -> Option<u16> {
        let framing = self.kind.framing(queue);
        let Framing {
            head_bytes,
            tail_bytes,
            answer_bytes: _,
            positioned,
            waits_for_input: _,
            frames: _,
            failure: _,
            numbered,
        } = framing;
        assert_eq!(positioned || numbered, position.is_some());
        let driver = self.drivers.get_mut(queue).unwrap();
        let slot = driver.next_slot()?;
        let (head, data) = readable.split_at(usize::from(head_bytes).min(readable.len()));
        let tail = usize::from(tail_bytes).min(writable);
        let into = writable - tail;
        let into_at = framing.writable_at(data.len());
        let need = if into > 0 { into_at + into } else { data.len() };
        let pages = if need > 0 {
            Some(self.pages.take(need)?)
        } else {
            None
        };
        let start = self.window.layout.data + pages.map_or(0, PageRange::offset);
        let head_at = driver.head_offset(slot);
        let memory = &self.window.memory;
        let mut front = Vec::new();
        front.extend(position.map(u64::to_le_bytes).into_iter().flatten());
        assert!(position.is_none() || front.len() == POSITION_BYTES);
        front.extend_from_slice(head);
        memory.slice(head_at, front.len()).copy_from(&front);
        memory.slice(start, data.len()).copy_from(data);
        let mut layout = RequestLayout::default();
        let mut push = |offset, len: usize, writable| {
            let len = u32::try_from(len).unwrap();
            layout.push(Span {
                offset,
                len,
                writable,
            });
        };
        push(head_at, front.len(), false);
        push(start, data.len(), false);
        push(start + into_at, into, true);
        push(head_at + TAIL_OFFSET, tail, true);
        if self.fill {
            memory
                .slice(start + into_at, into)
                .copy_from(&vec![0xa5u8; into]);
        }
        memory
            .slice(head_at + TAIL_OFFSET, tail)
            .copy_from(&[0xa5u8; 32][..tail]);
        assert_eq!(driver.submit(memory, &layout), slot);
        let place = Placed {
            pages,
            data: (start + into_at, into),
            tail: (head_at + TAIL_OFFSET, tail),
        };
        self.placed.insert((queue, slot), place);
        Some(slot)
    }

    /// Puts a request with spans of the test's own choice into a queue.
    pub fn submit_raw(&mut self, queue: usize, layout: &RequestLayout) -> u16 {
        let driver = self.drivers.get_mut(queue).unwrap();
        driver.submit(&self.window.memory, layout)
    }

    /// Puts a request into a queue as a gate could make it of these: offsets into the data area, lengths, and whether
    /// the device writes. `front` comes before them.
    pub fn submit_any(
        &mut self,
        queue: usize,
        front: Option<Span>,
        mut spans: Vec<(usize, u32, bool)>,
    ) -> u16 {
        let data = self.window.layout.data;
        let room = self.window.layout.bytes - data;
        spans.sort_by_key(|&(.., writable)| writable);
        let mut layout = RequestLayout::default();
        front.into_iter().for_each(|span| layout.push(span));
        for (at, len, writable) in spans {
            let at = at % room;
            let len = len.clamp(1, u32::try_from(room - at).unwrap());
            let offset = data + at;
            layout.push(Span {
                offset,
                len,
                writable,
            });
        }
        self.submit_raw(queue, &layout)
    }

    /// Rings the kick doorbell if the device asked for it. Returns whether it did.
    pub fn announce(&mut self, queue: usize) -> bool {
        let needed = self
            .drivers
            .get_mut(queue)
            .unwrap()
            .announce(&self.window.memory);
        if needed {
            self.bells.kick.ring();
        }
        needed
    }

    /// Asks to be called at the next completion. Returns whether there is one.
    #[must_use]
    pub fn ask_for_calls(&self, queue: usize) -> bool {
        self.drivers
            .get(queue)
            .unwrap()
            .enable_calls(&self.window.memory)
    }

    /// Asks not to be called.
    pub fn refuse_calls(&self, queue: usize) {
        self.drivers
            .get(queue)
            .unwrap()
            .disable_calls(&self.window.memory);
    }

    /// Completions of a queue since the last call, oldest first.
    pub fn answers(&mut self, queue: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        let driver = self.drivers.get_mut(queue).unwrap();
        while let Some(done) = driver.complete(&self.window.memory).unwrap() {
            let mut bytes = Vec::new();
            if let Some(place) = self.placed.remove(&(queue, done.slot)) {
                for (at, len) in [place.data, place.tail] {
                    let from = bytes.len();
                    bytes.resize(from + len, 0);
                    self.window
                        .memory
                        .slice(at, len)
                        .copy_to(&mut bytes[from..]);
                }
                if let Some(pages) = place.pages {
                    self.pages.give(pages);
                }
            }
            answers.push(Answer {
                slot: done.slot,
                written: done.written,
                bytes,
            });
        }
        answers
    }

    /// Waits for `count` completions, kicking the device if it asked for it.
    pub fn await_answers(&mut self, queue: usize, count: usize) -> Vec<Answer> {
        let deadline = Instant::now() + PATIENCE;
        self.announce(queue);
        let mut answers = Vec::new();
        while answers.len() < count && Instant::now() < deadline {
            answers.extend(self.answers(queue));
            std::thread::yield_now();
        }
        answers
    }

    /// As [`Gate::answers`], for measurements: shows each answer's data range and forgets it.
    pub fn each_answer(
        &mut self,
        queue: usize,
        mut look: impl FnMut(&Window, usize, usize),
    ) -> usize {
        let mut n = 0;
        let driver = self.drivers.get_mut(queue).unwrap();
        while let Some(done) = driver.complete(&self.window.memory).unwrap() {
            n += 1;
            if let Some(place) = self.placed.remove(&(queue, done.slot)) {
                look(&self.window, place.data.0, place.data.1);
                if let Some(pages) = place.pages {
                    self.pages.give(pages);
                }
            }
        }
        n
    }

    /// Whether the device has called since the last question.
    #[must_use]
    pub fn was_called(&self) -> bool {
        self.bells.call.take()
    }
}
