//! vCPUs on one side of the page, legacy processes that die on the other.

use super::*;
use crate::kick::Kick;
use bulkhead_ipc::legacy_page::LEGACY_PAGE_BYTES;
use bulkhead_ipc::shared::sealed_memfd;

const SCRATCH: u16 = COM1_PORT + 7;
const STATUS: u16 = COM1_PORT + 5;
const RECEIVE: u16 = COM1_PORT;

struct Desk {
    client: Arc<LegacyClient>,
    page: LegacyPage,
}

fn desk() -> Desk {
    let fd = sealed_memfd("l", LEGACY_PAGE_BYTES).unwrap();
    let page = LegacyPage::map(fd.try_clone().unwrap()).unwrap();
    let bell = || Doorbell::new().unwrap();
    let wiring = LegacyWiring {
        page: LegacyPage::map(fd).unwrap(),
        kick: bell(),
        reply: bell(),
        interrupt: bell(),
    };
    let group = Group::new(Vec::new(), Kick::install().unwrap(), bell());
    let client = LegacyClient::new(wiring, 1, 100, Arc::new(group));
    Desk {
        client: Arc::new(client),
        page,
    }
}

impl Desk {
    /// A vCPU that reads a port.
    fn reader(&self, port: u16) -> std::thread::JoinHandle<u8> {
        let client = Arc::clone(&self.client);
        std::thread::spawn(move || client.read(port))
    }

    fn save(&self, number: u32, taken: u32, answered: u32, reply: u32) {
        let progress = Progress {
            taken,
            answered,
            reply,
            input_position: 0,
        };
        self.page.save(number, progress, b"state");
    }

    fn serve(&self, generation: u32) {
        self.page.set_serving(generation);
        assert_eq!(self.client.take_service(), Some(generation));
        assert_eq!(self.client.take_service(), None);
    }
}

fn is_waiting(reader: &std::thread::JoinHandle<u8>) -> bool {
    std::thread::sleep(Duration::from_millis(20));
    !reader.is_finished()
}

#[test]
fn writes_of_a_dead_process_are_carried_out_once_by_its_successor() {
    let desk = desk();
    for byte in b"abcd" {
        desk.client.write(COM1_PORT, *byte);
    }
    // It had stored two, and reported one of them.
    desk.save(1, 2, 0, 0);
    desk.page.set_consumed(1);
    let prepared = desk.client.prepare(2).unwrap();
    assert_eq!(prepared.output_position, 102);
    desk.client.write(COM1_PORT, b'e');
    let (progress, state) = desk.page.saved().unwrap();
    assert_eq!((progress.taken, &state[..]), (2, &b"state"[..]));
    for (number, byte) in (2..).zip(b"cde") {
        let write = desk.page.take_posted(number).unwrap();
        assert_eq!(
            (write.value, write.stream_position),
            (u32::from(*byte), 100 + u64::from(number))
        );
    }
    assert_eq!(desk.page.take_posted(5), None);
}

#[test]
fn answer_that_a_dead_process_had_found_is_given_and_another_is_asked_for() {
    let desk = desk();
    let reader = desk.reader(RECEIVE);
    while desk.page.take_call(0).is_none() {}
    // It had left its state, but not answered.
    desk.save(1, 0, 1, 0x42);
    assert!(is_waiting(&reader));
    desk.client.prepare(2).unwrap();
    assert_eq!(reader.join().unwrap(), 0x42);
    assert_eq!(desk.page.take_call(1), None, "it is not asked again");

    desk.serve(2);
    let reader = desk.reader(RECEIVE);
    while desk.page.take_call(1).is_none() {}
    desk.client.prepare(3).unwrap();
    assert!(is_waiting(&reader));
    let (number, call) = desk.page.take_call(1).unwrap();
    assert_eq!((number, call.port), (2, RECEIVE));
    desk.page.answer(2, 0x43);
    assert_eq!(reader.join().unwrap(), 0x43);
}

#[test]
fn registers_are_not_read_from_a_page_that_nobody_has_filled() {
    let desk = desk();
    desk.page.set_mirror(5, 0x60);
    assert_eq!(desk.client.read(STATUS), 0x60);
    desk.client.prepare(2).unwrap();
    let readers = [STATUS, SCRATCH].map(|port| desk.reader(port));
    assert!(readers.iter().all(is_waiting));
    desk.page.set_mirror(5, 0x61);
    desk.page.set_mirror(7, 0x5a);
    desk.serve(2);
    assert_eq!(readers.map(|reader| reader.join().unwrap()), [0x61, 0x5a]);
}

#[test]
fn first_process_may_come_later_than_a_guest_and_has_its_time_from_then_on() {
    let desk = desk();
    let reader = desk.reader(RECEIVE);
    std::thread::sleep(PATIENCE + Duration::from_millis(200));
    assert!(is_waiting(&reader));
    desk.page.set_serving(1);
    assert!(is_waiting(&reader));
    assert_eq!(desk.client.take_fault(), None);
    desk.page.answer(1, 0x17);
    assert_eq!(reader.join().unwrap(), 0x17);
}

#[test]
fn silent_process_is_complained_of_once_and_its_successor_answers() {
    let desk = desk();
    desk.page.set_serving(1);
    let reader = desk.reader(RECEIVE);
    std::thread::sleep(PATIENCE + Duration::from_millis(200));
    assert!(
        desk.client
            .take_fault()
            .unwrap()
            .contains("within a second")
    );
    assert!(is_waiting(&reader));
    assert_eq!(desk.client.take_fault(), None);
    desk.client.prepare(2).unwrap();
    desk.serve(2);
    desk.page.answer(1, 7);
    assert_eq!(reader.join().unwrap(), 7);
}

#[test]
fn lies_about_progress_are_not_believed() {
    let lies: [(u32, u32); 4] = [(5, 0), (u32::MAX, 0), (1, 1), (1, u32::MAX)];
    for (taken, answered) in lies {
        let desk = desk();
        for byte in b"abcd" {
            desk.client.write(COM1_PORT, *byte);
        }
        desk.page.set_consumed(1);
        desk.save(1, taken, answered, 0);
        desk.client.prepare(2).unwrap();
        let (progress, state) = desk.page.saved().unwrap();
        assert_eq!(
            (progress.taken, progress.answered),
            (1, 0),
            "{taken} {answered}"
        );
        assert!(state.is_empty(), "and the state is none");
        assert_eq!(desk.page.take_posted(1).unwrap().value, u32::from(b'b'));
    }
}

#[test]
fn lost_process_reads_as_all_ones_until_there_is_another() {
    let desk = desk();
    let reader = desk.reader(RECEIVE);
    desk.client.set_lost();
    assert_eq!(reader.join().unwrap(), ALL_ONES);
    desk.client.write(COM1_PORT, b'x');
    desk.client.prepare(2).unwrap();
    desk.page.set_mirror(5, 0x60);
    desk.serve(2);
    assert_eq!(desk.client.read(STATUS), 0x60);
    desk.client.write(COM1_PORT, b'y');
    assert_eq!(desk.page.take_posted(0).unwrap().value, u32::from(b'y'));
}

#[test]
fn asked_again_the_same_is_said_and_old_generations_change_nothing() {
    let desk = desk();
    let first = desk.client.prepare(3).unwrap();
    assert_eq!(desk.client.prepare(3), Some(first));
    assert_eq!(desk.client.prepare(2), None);
    desk.serve(3);
    assert_eq!(desk.client.prepare(3), None);
}
