//! Used rings, where `virtio-queue` does less than is needed: several elements that the other side sees
//! in one step, and whether it wants to hear of what was put since it was last told.

use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes before the first element: flags and index.
const HEADER_BYTES: u64 = 4;
/// Bytes of one element.
const ELEMENT_BYTES: u64 = 8;
/// Where in the ring its index is.
const INDEX_AT: u64 = 2;

/// Puts elements (head descriptor, bytes written) so that the other side sees all of them or none. More than
/// the queue is long are refused, for they would overwrite each other.
///
/// # Errors
/// When a head is none, or the ring is not in `memory`: nothing is seen then.
pub fn put_together<M: GuestMemoryBackend>(
    queue: &mut Queue,
    memory: &M,
    elements: &[(u16, u32)],
) -> Result<(), Error> {
    let size = queue.size();
    if elements.len() > usize::from(size) {
        return Err(Error::InvalidChain);
    }
    let ring = queue.used_ring();
    let mut next = queue.next_used();
    for &(head, written) in elements {
        if head >= size {
            return Err(Error::InvalidDescriptorIndex);
        }
        let place = u64::from(next % size);
        let mut element = [0; 8];
        let (id, len) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_le_bytes());
        len.copy_from_slice(&written.to_le_bytes());
        let at = ring + HEADER_BYTES + ELEMENT_BYTES * place;
        memory
            .write_slice(&element, GuestAddress(at))
            .map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    memory
        .store(
            next.to_le(),
            GuestAddress(ring + INDEX_AT),
            Ordering::Release,
        )
        .map_err(Error::GuestMemory)?;
    queue.set_next_used(next);
    Ok(())
}

/// Whether the other side of a queue with event indexes wants to hear of the elements that were put since
/// `told`, which is where its used ring was then and is moved on.
///
/// # Errors
/// When the avail ring is not in `memory`.
pub fn wants_news<M: GuestMemoryBackend>(
    queue: &Queue,
    memory: &M,
    told: &mut u16,
) -> Result<bool, Error> {
    let old = std::mem::replace(told, queue.next_used());
    let new = *told;
    if new == old {
        return Ok(false);
    }
    // The index must be visible before the event is read: whoever changes the event looks at the index
    // afterwards.
    fence(Ordering::SeqCst);
    let at = queue.avail_ring() + HEADER_BYTES + 2 * u64::from(queue.size());
    let event = memory
        .load::<u16>(GuestAddress(at), Ordering::Relaxed)
        .map_err(Error::GuestMemory)?;
    let event = u16::from_le(event);
    Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    const USED: u32 = 0x2000;
    const AVAIL: u32 = 0x1000;

    fn queue(size: u16) -> (GuestMemoryMmap, Queue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_avail_ring_address(Some(AVAIL), Some(0));
        queue.set_used_ring_address(Some(USED), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        (memory, queue)
    }

    fn index(memory: &GuestMemoryMmap) -> u16 {
        memory.read_obj(GuestAddress(u64::from(USED) + 2)).unwrap()
    }

    #[test]
    fn elements_are_as_one_by_one_and_the_index_moves_once() {
        let (memory, mut together) = queue(8);
        let (other, mut singly) = queue(8);
        for start in [0u16, 6, 65534] {
            together.set_next_used(start);
            singly.set_next_used(start);
            let elements = [(3, 10), (0, 20), (7, 30)];
            put_together(&mut together, &memory, &elements).unwrap();
            for (head, written) in elements {
                singly.add_used(&other, head, written).unwrap();
            }
            let (mut a, mut b) = ([0; 70], [0; 70]);
            memory
                .read_slice(&mut a, GuestAddress(u64::from(USED)))
                .unwrap();
            other
                .read_slice(&mut b, GuestAddress(u64::from(USED)))
                .unwrap();
            assert_eq!(a, b, "from {start}");
            assert_eq!(together.next_used(), singly.next_used());
        }
    }

    #[test]
    fn what_is_not_sound_is_not_seen() {
        let (memory, mut q) = queue(4);
        assert!(put_together(&mut q, &memory, &[(0, 1), (4, 1)]).is_err());
        assert!(put_together(&mut q, &memory, &[(0, 1); 5]).is_err());
        q.set_used_ring_address(Some(0x3fff_f000), Some(0));
        assert!(put_together(&mut q, &memory, &[(0, 1)]).is_err());
        assert_eq!((q.next_used(), index(&memory)), (0, 0));
    }

    proptest! {
        #[test]
        fn news_are_wanted_when_the_event_is_passed(told: u16, count in 0u16..9, event: u16) {
            let (memory, mut q) = queue(8);
            q.set_next_used(told);
            put_together(&mut q, &memory, &vec![(0, 0); count.into()]).unwrap();
            memory.write_obj(event, GuestAddress(u64::from(AVAIL) + 4 + 16)).unwrap();
            let mut mark = told;
            let wanted = wants_news(&q, &memory, &mut mark).unwrap();
            prop_assert_eq!(mark, told.wrapping_add(count));
            let passed = (0..count).any(|n| told.wrapping_add(n) == event);
            prop_assert_eq!(wanted, passed);
            prop_assert!(!wants_news(&q, &memory, &mut mark).unwrap());
        }
    }
}
