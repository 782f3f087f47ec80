//! Flow control in both directions (virtio 1.2, section 5.10.6.3). All counts are modulo 2^32.

/// Bytes of one connection that are kept for a client which does not read.
pub(crate) const BUFFER_BYTES: u32 = 64 * 1024;
/// Bytes passed on that the guest does not know of, from which on it is told.
const UNTOLD_BYTES_MAX: u32 = BUFFER_BYTES / 4;

/// What each side knows of the other's room.
#[derive(Debug, Default)]
pub(crate) struct Credit {
    guest_room: u32,
    guest_passed: u32,
    sent: u32,
    received: u32,
    passed: u32,
    told: u32,
}

impl Credit {
    /// The guest has told its room. Returns whether that is news.
    pub(crate) fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) -> bool {
        let before = (self.guest_room, self.guest_passed);
        (self.guest_room, self.guest_passed) = (buf_alloc, fwd_cnt);
        before != (buf_alloc, fwd_cnt)
    }

    /// Bytes that the guest has room for. A guest that claims to have passed on more than it got is
    /// sent nothing.
    pub(crate) const fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_passed);
        self.guest_room.saturating_sub(under_way)
    }

    /// `n` bytes have been sent to the guest.
    pub(crate) const fn send(&mut self, n: u32) {
        self.sent = self.sent.wrapping_add(n);
    }

    /// `n` bytes have come from the guest. Returns whether it had room for them.
    #[must_use]
    pub(crate) const fn receive(&mut self, n: u32) -> bool {
        let kept = self.received.wrapping_sub(self.passed);
        if n > BUFFER_BYTES.saturating_sub(kept) {
            return false;
        }
        self.received = self.received.wrapping_add(n);
        true
    }

    /// `n` bytes of the guest have been passed on to the client.
    pub(crate) const fn pass_on(&mut self, n: u32) {
        self.passed = self.passed.wrapping_add(n);
    }

    /// Whether the guest should be told of its room.
    pub(crate) const fn is_worth_telling(&self) -> bool {
        self.passed.wrapping_sub(self.told) >= UNTOLD_BYTES_MAX
    }

    /// What the guest is told with every packet: `buf_alloc` and `fwd_cnt`.
    pub(crate) const fn tell(&mut self) -> (u32, u32) {
        self.told = self.passed;
        (BUFFER_BYTES, self.passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn guest_is_sent_no_more_than_it_has_room_for() {
        let mut credit = Credit::default();
        assert_eq!(
            credit.room(),
            0,
            "a guest that has said nothing has no room"
        );
        assert!(credit.hear(100, 0));
        credit.send(70);
        assert_eq!(credit.room(), 30);
        assert!(credit.hear(100, 50));
        assert_eq!(credit.room(), 80);
        assert!(!credit.hear(100, 50));
        credit.hear(10, 50);
        assert_eq!(credit.room(), 0, "a guest may take room back");
    }

    #[test]
    fn guest_that_claims_what_it_never_got_is_sent_nothing() {
        let mut credit = Credit::default();
        credit.hear(1000, 1);
        assert_eq!(credit.room(), 0);
    }

    #[test]
    fn guest_that_sends_too_much_is_found_out() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUFFER_BYTES));
        assert!(!credit.receive(1));
        credit.pass_on(1);
        assert!(credit.receive(1));
        assert!(!credit.receive(1));
    }

    proptest! {
        #[test]
        fn a_guest_without_room_is_told_when_all_is_passed_on(
            start in any::<u32>(), parts in prop::collection::vec(1u32..BUFFER_BYTES, 1..200),
        ) {
            let mut credit = Credit { received: start, passed: start, told: start, ..Credit::default() };
            let mut known = start;
            for part in parts {
                let room = BUFFER_BYTES - credit.received.wrapping_sub(known);
                let n = part.min(room);
                prop_assert!(credit.receive(n));
                credit.pass_on(n);
                if credit.is_worth_telling() {
                    known = credit.tell().1;
                }
                prop_assert!(BUFFER_BYTES - credit.received.wrapping_sub(known) > 0);
            }
        }
    }
}
