//! The transport and the gates together, between a scripted driver and a scripted device.

mod flood;
mod frames;
mod succession;

use super::*;
use crate::gate::Phase;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::shared::sealed_memfd;
use bulkhead_ipc::window::DeviceState;
use proptest::prelude::*;
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

const BASE: u64 = platform::VIRTIO_MMIO_BASE;
const MEMORY_BYTES: usize = 1 << 20;
const QUEUE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const WINDOW_BYTES: u32 = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A device of which one queue is used, a blk device unless a test wants another; the test is both its driver and its
/// device process.
struct Machine {
    memory: GuestMemoryMmap,
    bus: Arc<VirtioBus>,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
    window: Window,
    device_memory: GuestMemoryMmap,
    device: Queue,
    kick: Doorbell,
    call: Doorbell,
    avail: u16,
    used: u16,
    /// Number of the queue.
    queue: u16,
}

/// The device half of the shadow queue, as a process has it that was just born.
fn device_queue(window: &Window, queue: u16) -> Queue {
    let q = window.layout.queues[usize::from(queue)];
    let mut device = Queue::new(q.descriptors).unwrap();
    let low = |a: usize| Some(u32::try_from(a).unwrap());
    device.set_desc_table_address(low(q.desc_table), Some(0));
    device.set_avail_ring_address(low(q.avail_ring), Some(0));
    device.set_used_ring_address(low(q.used_ring), Some(0));
    device.set_event_idx(true);
    device.set_ready(true);
    device
}

/// A device's slot with what the gate is given for it, and what its process has: the window, and the doorbells that
/// wake it and that it rings.
fn plug(
    number: u8,
    name: &str,
    kind: VirtioKind,
    queue_sizes: Vec<u16>,
) -> ((VirtioSlot, SlotFds), Window, [Doorbell; 2]) {
    let layout = WindowLayout::new(WINDOW_BYTES as usize, &queue_sizes).unwrap();
    let fd = sealed_memfd("w", u64::from(WINDOW_BYTES)).unwrap();
    let window = Window::map(fd.try_clone().unwrap(), layout).unwrap();
    let bells = [(); 2].map(|()| Doorbell::new().unwrap());
    let [kick, call] = bells
        .each_ref()
        .map(|bell| bell.try_clone().unwrap().into());
    let fds = SlotFds {
        window: fd,
        kick,
        call,
    };
    let slot = VirtioSlot {
        slot: number,
        name: name.to_owned(),
        kind,
        generation: 1,
        queue_sizes,
        window_bytes: WINDOW_BYTES,
        features: 1 << 9 | 1 << 29 | kind.gate_features(),
        config: vec![0; kind.config_bytes()],
        output_position: 0,
        input_position: 0,
    };
    ((slot, fds), window, bells)
}

impl Machine {
    fn new() -> Self {
        Self::of(VirtioKind::Blk, 0)
    }

    /// A device with as many queues as it takes to have number `queue`.
    fn of(kind: VirtioKind, queue: u16) -> Self {
        Self::beside(kind, queue, Cpus { host: 2, guest: 1 }, vec![])
    }

    /// The same, on these CPUs, beside other devices.
    fn beside(
        kind: VirtioKind,
        queue: u16,
        cpus: Cpus,
        others: Vec<(VirtioSlot, SlotFds)>,
    ) -> Self {
        let sizes = vec![QUEUE; usize::from(queue) + 1];
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let (slot, window, [kick, call]) = plug(0, "disk", kind, sizes);
        let fd = window.memory.descriptor().unwrap();
        let region = Window::map(fd.try_clone_to_owned().unwrap(), window.layout.clone())
            .unwrap()
            .memory
            .into_region();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let device_memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let device = device_queue(&window, queue);
        let registers = RegisterFile::new().unwrap();
        let devices = std::iter::once(slot).chain(others).collect();
        let (bus, thread) = build(memory.clone(), &registers, devices, cpus).unwrap();
        let thread = Some(std::thread::spawn(move || thread.run()));
        Self {
            memory,
            bus,
            thread,
            window,
            device_memory,
            device,
            kick,
            call,
            avail: 0,
            used: 0,
            queue,
        }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(BASE + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.bus.write(BASE + offset, &value.to_le_bytes());
    }

    fn publish(&self) {
        self.window.publish(u64::MAX, &77u64.to_le_bytes());
        self.call.ring();
    }

    /// A driver's initialisation up to DRIVER_OK, without event index.
    fn start(&mut self) {
        self.start_with(&[(self.queue, [DESC, AVAIL, USED])]);
    }

    /// The same with these queues, each with its rings.
    fn start_with(&mut self, queues: &[(u16, [u64; 3])]) {
        self.start_as(0, queues);
    }

    /// The same with these features besides the version.
    fn start_as(&mut self, features: u32, queues: &[(u16, [u64; 3])]) {
        self.set(0x70, 0);
        // The rings are the device's until the reset is done.
        self.wait("the reset", |m| (m.get(0x70) == 0).then_some(()));
        self.memory
            .write_slice(&[0; 0x3000], GuestAddress(DESC))
            .unwrap();
        (self.avail, self.used) = (0, 0);
        self.set(0x70, 3);
        self.set(0x24, 0);
        self.set(0x20, features);
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11, "features are accepted");
        for (queue, rings) in queues {
            self.set(0x30, u32::from(*queue));
            self.set(0x38, u32::from(QUEUE));
            for (offset, address) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
                self.set(offset, u32::try_from(*address).unwrap());
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESC + 16 * u64::from(index));
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.memory
            .write_obj([flags, next], GuestAddress(at.0 + 12))
            .unwrap();
    }

    fn offer(&mut self, head: u16) {
        let place = AVAIL + 4 + 2 * u64::from(self.avail % QUEUE);
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        self.avail += 1;
        self.memory
            .store(self.avail, GuestAddress(AVAIL + 2), Ordering::Release)
            .unwrap();
        let queue = usize::from(self.queue);
        self.bus.wiring()[0].notify[queue].write(1).unwrap();
    }

    /// A blk request: 16-byte header, `data` bytes, status.
    fn offer_request(&mut self, first: u16, data: u32, device_writes: bool) {
        let n = u64::from(first);
        self.memory
            .write_obj([first; 8], GuestAddress(0x4000 + n * 32))
            .unwrap();
        self.describe(first, 0x4000 + n * 32, 16, NEXT, first + 1);
        let flags = if device_writes { NEXT | WRITE } else { NEXT };
        self.describe(first + 1, 0x10000 + n * 0x2000, data, flags, first + 2);
        self.describe(first + 2, 0x5000 + n, 1, WRITE, 0);
        self.offer(first);
    }

    fn wait<T>(&mut self, what: &str, mut poll: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = poll(self) {
                return value;
            }
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "waited for {what}"
            );
            std::thread::yield_now();
        }
    }

    /// The device process's view of the next request: (head, readable bytes, writable spans).
    fn device_pop(&mut self) -> (u16, Vec<u8>, Vec<(GuestAddress, u32)>) {
        self.wait("a request", |m| {
            let chain = m.device.pop_descriptor_chain(&m.device_memory)?;
            let head = chain.head_index();
            let (mut readable, mut writable) = (Vec::new(), Vec::new());
            for d in chain {
                if d.is_write_only() {
                    writable.push((d.addr(), d.len()));
                } else {
                    let mut part = vec![0; d.len() as usize];
                    m.device_memory.read_slice(&mut part, d.addr()).unwrap();
                    readable.extend(part);
                }
            }
            Some((head, readable, writable))
        })
    }

    fn device_complete(&mut self, head: u16, len: u32) {
        self.device
            .add_used(&self.device_memory, head, len)
            .unwrap();
        self.call.ring();
    }

    /// Waits for the next used element: (id, len).
    fn used(&mut self) -> (u32, u32) {
        self.wait("a used element", |m| {
            let idx: u16 = m
                .memory
                .load(GuestAddress(USED + 2), Ordering::Acquire)
                .unwrap();
            (idx != m.used).then_some(())?;
            let at = USED + 4 + 8 * u64::from(m.used % QUEUE);
            m.used += 1;
            Some(
                m.memory
                    .read_obj::<[u32; 2]>(GuestAddress(at))
                    .unwrap()
                    .into(),
            )
        })
    }

    fn wait_fault(&mut self) -> FromVcpu {
        self.wait("a fault report", |m| m.bus.take_faults().pop())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.bus.interrupt_waits();
        self.bus.stop();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

#[test]
fn registers_identify_the_device() {
    let m = Machine::new();
    assert_eq!([0, 4, 8].map(|o| m.get(o)), [0x7472_6976, 2, 2]);
    assert_eq!((m.get(0x34), m.get(0x44), m.get(0x70)), (16, 0, 0));
    m.set(0x30, 1);
    assert_eq!(m.get(0x34), 0, "there is no queue 1");
    let mut data = [0xff; 4];
    m.bus.read(BASE + 0x1000, &mut data);
    assert_eq!(data, [0; 4], "empty slots read as zero");
    for beyond in [
        0,
        BASE - 4,
        platform::VIRTIO_MMIO_SLOTS as u64 * 0x1000 + BASE,
        u64::MAX,
    ] {
        let mut data = [0xff; 8];
        m.bus.read(beyond, &mut data);
        assert_eq!(data, [0; 8], "{beyond:#x} is no slot's");
    }
}

#[test]
fn guest_waits_for_what_only_the_device_knows() {
    for (offset, value) in [(0x70, 3), (0x14, 0)] {
        let m = Machine::new();
        assert_eq!(m.get(0x10), 0, "features are not known yet");
        m.set(0x70, 1);
        assert_eq!(m.get(0x70), 1, "that there is a device is known");
        std::thread::scope(|s| {
            let driver = s.spawn(|| {
                m.set(offset, value);
                (m.get(0x10), m.get(0x100), m.get(0x104))
            });
            std::thread::sleep(Duration::from_millis(30));
            assert!(!driver.is_finished(), "nothing is published yet");
            m.publish();
            let (features, low, high) = driver.join().unwrap();
            assert_ne!(features, 0);
            assert_eq!((low, high), (77, 0));
        });
    }
}

#[test]
fn what_is_read_follows_what_was_selected() {
    let m = Machine::of(VirtioKind::Blk, 1);
    m.publish();
    let features = |sel| {
        m.set(0x14, sel);
        m.get(0x10)
    };
    assert_eq!(features(1), 1, "VIRTIO_F_VERSION_1");
    assert_eq!(features(0) & 1 << 29, 1 << 29, "VIRTIO_RING_F_EVENT_IDX");
    assert_eq!(features(2), 0);
    m.set(0x30, 1);
    m.set(0x44, 1);
    assert_eq!(m.get(0x44), 1);
    m.set(0x30, 0);
    assert_eq!(m.get(0x44), 0, "another queue is not ready");
    m.set(0x30, 1);
    m.set(0x70, 0);
    assert_eq!((m.get(0x34), m.get(0x44), m.get(0x70)), (16, 0, 0));
    m.set(0x30, 1);
    assert_eq!(m.get(0x44), 0, "a reset is one of all queues");
    assert_eq!((m.get(0xb0), m.get(0xbc)), (u32::MAX, u32::MAX));
}

#[test]
fn interrupted_guest_does_not_wait() {
    let m = Machine::new();
    m.bus.interrupt_waits();
    let start = Instant::now();
    m.set(0x70, 3);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let m = Machine::new();
    m.publish();
    m.set(0x70, 3);
    m.set(0x20, 1 << 3);
    m.set(0x24, 1);
    m.set(0x20, 1);
    m.set(0x70, 11);
    assert_eq!(m.get(0x70) & 8, 0);
}

#[test]
fn read_request_travels_to_the_device_and_back() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    for round in 0..100u16 {
        m.offer_request(3, 4096, true);
        let (head, readable, writable) = m.device_pop();
        assert_eq!(readable, [3, 0].repeat(8));
        assert_eq!(writable.iter().map(|w| w.1).collect::<Vec<_>>(), [4096, 1]);
        assert_eq!(writable[0].0.0 % 4096, 0, "data is page aligned");
        let pattern = vec![round.to_le_bytes()[0]; 4096];
        m.device_memory
            .write_slice(&pattern, writable[0].0)
            .unwrap();
        m.device_memory.write_obj(0u8, writable[1].0).unwrap();
        m.memory.write_obj(0xffu8, GuestAddress(0x5003)).unwrap();
        m.device_complete(head, 4097);
        assert_eq!(m.used(), (3, 4097));
        let mut got = vec![0; 4096];
        m.memory
            .read_slice(&mut got, GuestAddress(0x16000))
            .unwrap();
        assert_eq!(got, pattern);
        assert_eq!(m.memory.read_obj::<u8>(GuestAddress(0x5003)).unwrap(), 0);
    }
    assert!(m.kick.take());
    assert_eq!(m.get(0x60), 1);
    m.set(0x64, 1);
    assert_eq!(m.get(0x60), 0);
}

#[test]
fn device_that_slept_is_heard_while_the_gate_watches_another() {
    let (slot, window, [_kick, call]) = plug(1, "rng0", VirtioKind::Rng, vec![QUEUE]);
    // As many CPUs as it takes for the gate to watch while the device works.
    let cpus = Cpus { host: 8, guest: 1 };
    let mut m = Machine::beside(VirtioKind::Blk, 0, cpus, vec![slot]);
    m.publish();
    m.start();
    let is_heard = |m: &Machine| {
        let mut all = m.bus.attachments();
        all.any(|(slot, attachment)| slot == 1 && attachment.phase == Phase::Serving)
    };
    let once = |m: &mut Machine| {
        m.offer_request(0, 512, false);
        let (head, ..) = m.device_pop();
        m.device_complete(head, 1);
        m.used();
    };
    // It finds that watching pays.
    for _ in 0..1000 {
        once(&mut m);
    }
    assert!(!is_heard(&m), "nothing is published yet");
    window.publish(u64::MAX, &[]);
    call.ring();
    let mut behind = 0;
    while !is_heard(&m) && behind < 1000 {
        once(&mut m);
        behind += 1;
    }
    assert!(behind <= 12, "{behind} requests went ahead");
}

#[test]
fn short_read_leaves_the_rest_of_the_guest_buffer_alone() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    m.memory
        .write_slice(&[9; 4096], GuestAddress(0x10000))
        .unwrap();
    m.offer_request(0, 4096, true);
    let (head, _, writable) = m.device_pop();
    m.device_memory
        .write_slice(&[5; 4096], writable[0].0)
        .unwrap();
    m.device_memory.write_obj(1u8, writable[1].0).unwrap();
    m.device_complete(head, 1 + 512);
    assert_eq!(m.used(), (0, 513));
    assert_eq!(
        m.memory
            .read_obj::<[u8; 2]>(GuestAddress(0x10000 + 511))
            .unwrap(),
        [5, 9]
    );
    assert_eq!(m.memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 1);
}

#[test]
fn indirect_descriptors_are_followed() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    let table = 0x8000u64;
    for (n, (len, flags)) in [(16u32, NEXT), (512, NEXT), (1, WRITE)]
        .into_iter()
        .enumerate()
    {
        let at = table + 16 * n as u64;
        m.memory
            .write_obj(0x10000u64 + 0x1000 * n as u64, GuestAddress(at))
            .unwrap();
        m.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        let next = u16::try_from(n + 1).unwrap();
        m.memory
            .write_obj([flags, next], GuestAddress(at + 12))
            .unwrap();
    }
    m.describe(7, table, 48, INDIRECT, 0);
    m.offer(7);
    let (head, readable, writable) = m.device_pop();
    assert_eq!((readable.len(), writable.len()), (528, 1));
    m.device_complete(head, 1);
    assert_eq!(m.used(), (7, 1));
}

#[test]
fn malformed_chains_need_a_reset_and_are_reported() {
    let bad: [&dyn Fn(&Machine); 7] = [
        &|m| m.describe(0, 0x4000, 16, NEXT, 0),    // loops
        &|m| m.describe(0, u64::MAX - 8, 16, 0, 0), // wraps around
        &|m| m.describe(0, MEMORY_BYTES as u64 - 4, 16, WRITE, 0), // outside
        &|m| m.describe(0, 0x4000, 0, 0, 0),        // empty
        &|m| m.describe(0, 0x4000, 16, NEXT, 999),  // leaves the table
        &|m| m.describe(0, 0x4000, 17, INDIRECT, 0), // half a descriptor
        &|m| {
            m.describe(0, 0x4000, 16, NEXT | WRITE, 1);
            m.describe(1, 0x4000, 16, 0, 0); // readable after writable
        },
    ];
    let mut m = Machine::new();
    m.publish();
    for (n, spoil) in bad.iter().enumerate() {
        m.start();
        spoil(&m);
        m.offer(0);
        let fault = m.wait_fault();
        assert!(
            matches!(fault, FromVcpu::GuestFault { slot: 0, .. }),
            "{n}: {fault:?}"
        );
        assert_ne!(m.get(0x70) & 0x40, 0, "{n}: DEVICE_NEEDS_RESET");
    }
    m.start();
    assert_eq!(m.get(0x70) & 0x40, 0, "a reset cures it");
    m.offer_request(0, 512, true);
    let (head, ..) = m.device_pop();
    m.device_complete(head, 1);
    assert_eq!(m.used(), (0, 1));
}

#[test]
fn request_larger_than_a_quarter_of_the_window_is_refused() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    m.offer_request(0, WINDOW_BYTES / 2, true);
    assert!(matches!(m.wait_fault(), FromVcpu::GuestFault { .. }));
}

#[test]
fn request_that_could_never_fit_is_refused_and_does_not_wait_for_ever() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    // Both parts begin on a page, so together they may need one page more than there is.
    let limit = u32::try_from(m.window.layout.request_bytes_max()).unwrap();
    m.describe(0, 0x4000, 16 + 1, NEXT, 1);
    m.describe(1, 0x10000, limit - 64, WRITE, 0);
    m.offer(0);
    m.wait("a fault or a request", |m| {
        let fault = m.bus.take_faults().pop().is_some();
        let request = m.device.pop_descriptor_chain(&m.device_memory).is_some();
        (fault || request).then_some(())
    });
}

#[test]
fn full_window_delays_requests_and_loses_none() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    let size = WINDOW_BYTES / 5;
    for first in [0, 3, 6, 9, 12] {
        m.offer_request(first, size, false);
    }
    let mut seen = Vec::new();
    for _ in 0..5 {
        let (head, readable, _) = m.device_pop();
        assert_eq!(readable.len(), 16 + size as usize);
        m.device_complete(head, 1);
        seen.push(m.used().0);
    }
    assert_eq!(seen, [0, 3, 6, 9, 12]);
}

#[test]
fn leftovers_of_a_reset_guest_are_not_answered_and_delay_the_next_start() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    m.offer_request(0, 512, true);
    let (old, _, writable) = m.device_pop();
    m.start();
    m.offer_request(3, 512, true);
    std::thread::sleep(Duration::from_millis(20));
    assert!(
        m.device.pop_descriptor_chain(&m.device_memory).is_none(),
        "not before the old one"
    );
    m.device_memory
        .write_slice(&[0xee; 512], writable[0].0)
        .unwrap();
    m.memory
        .write_slice(&[0; 512], GuestAddress(0x10000))
        .unwrap();
    m.device_complete(old, 513);
    let (head, ..) = m.device_pop();
    m.device_complete(head, 1);
    assert_eq!(
        m.used(),
        (3, 1),
        "the first used element is the new guest's"
    );
    assert_eq!(m.memory.read_obj::<u8>(GuestAddress(0x10000)).unwrap(), 0);
}

#[test]
fn lying_device_is_reported_and_its_requests_wait_for_what_becomes_of_it() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    m.offer_request(0, 512, true);
    let _request = m.device_pop();
    m.device_complete(2, 1);
    assert!(matches!(
        m.wait_fault(),
        FromVcpu::DeviceFault { slot: 0, .. }
    ));
    assert_eq!(
        m.get(0x70) & 0x40,
        0,
        "the guest has not been told anything"
    );
    m.bus.device_lost(0);
    assert_eq!(m.used(), (0, 1));
    assert_eq!(
        m.memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap(),
        1,
        "I/O error"
    );
    assert_ne!(m.get(0x70) & 0x40, 0);
}

#[test]
fn lost_device_answers_with_errors_and_never_hangs_the_guest() {
    let mut m = Machine::new();
    m.publish();
    m.start();
    m.offer_request(0, 512, false);
    m.bus.device_lost(0);
    assert_eq!(m.used(), (0, 1));
    m.offer_request(3, 512, true);
    assert_eq!(m.used(), (3, 1), "later requests too");
    m.start();
    m.offer_request(6, 512, true);
    assert_eq!(m.used(), (6, 1), "and after a reset");
}

#[test]
fn device_lost_before_it_published_does_not_hold_the_guest_up() {
    let m = Machine::new();
    m.bus.device_lost(0);
    let start = Instant::now();
    m.set(0x70, 3);
    assert_eq!((m.get(0x100), m.get(0x104)), (0, 0));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn device_that_says_it_failed_is_reported() {
    let mut m = Machine::new();
    m.window.set_device_state(DeviceState::Failed);
    m.call.ring();
    assert!(matches!(
        m.wait_fault(),
        FromVcpu::DeviceFault { slot: 0, .. }
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest writes, the gate neither panics nor hangs nor touches memory outside of
    /// the guest's, and a reset makes the device work again.
    #[test]
    fn nonsense_in_registers_and_rings_is_survived(
        rings in prop::collection::vec(any::<u8>(), 0x3000),
        small in any::<bool>(),
        registers in prop::collection::vec((0u64..0x110, any::<u32>()), 0..40),
        index in any::<u16>(),
    ) {
        let mut m = Machine::new();
        m.publish();
        m.start();
        let mut rings = rings;
        if small {
            // Plausible descriptors: addresses and lengths inside memory, next fields in range.
            for d in rings.chunks_mut(16).take(usize::from(QUEUE)) {
                d[2..8].fill(0);
                d[9] &= 0x1f;
                d[10..12].fill(0);
                d[12] &= 7;
                d[13] = 0;
                d[14] &= 0xf;
                d[15] = 0;
            }
        }
        m.memory.write_slice(&rings, GuestAddress(DESC)).unwrap();
        let index = if small { index % (QUEUE + 1) } else { index };
        m.memory.store(index, GuestAddress(AVAIL + 2), Ordering::Release).unwrap();
        m.bus.wiring()[0].notify[0].write(1).unwrap();
        for (offset, value) in registers {
            m.set(offset & !3, value);
            m.get(offset & !3);
        }
        // The device plays along with whatever reaches it.
        for _ in 0..50 {
            let next = m.device.pop_descriptor_chain(&m.device_memory).map(|c| {
                let head = c.head_index();
                let writable: u32 = c.filter(|d| d.is_write_only()).map(|d| d.len()).sum();
                (head, writable)
            });
            if let Some((head, writable)) = next {
                m.device_complete(head, writable);
            }
        }
        m.set(0x70, 0);
        let drain = Instant::now();
        while let Some(chain) = m.device.pop_descriptor_chain(&m.device_memory) {
            let head = chain.head_index();
            m.device_complete(head, 0);
            prop_assert!(drain.elapsed() < Duration::from_secs(5));
        }
        m.start();
        m.offer_request(0, 512, true);
        let (head, ..) = m.device_pop();
        m.device_complete(head, 1);
        prop_assert_eq!(m.used().0, 0);
    }
}
