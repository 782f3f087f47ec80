//! Claims about the clock.

use super::*;
use proptest::prelude::*;

/// 2026-11-22T14:58:03.25Z, a Sunday.
const NOW: Duration = Duration::new(1_795_359_483, 250_000_000);

fn cmos(rtc: &mut Rtc, index: u8, now: Duration) -> u8 {
    rtc.select(index);
    rtc.read(now)
}

fn set(rtc: &mut Rtc, index: u8, value: u8, now: Duration) {
    rtc.select(index);
    rtc.write(value, now);
}

fn time(rtc: &mut Rtc, now: Duration) -> Vec<u8> {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY]
        .map(|index| cmos(rtc, index, now))
        .to_vec()
}

#[test]
fn clock_shows_the_hosts_time_in_every_format() {
    let mut rtc = Rtc::new(0, NOW);
    assert_eq!(
        time(&mut rtc, NOW),
        [0x20, 0x26, 0x11, 0x22, 0x14, 0x58, 0x03, 0x01]
    );
    set(&mut rtc, STATUS_B, B_24_HOURS | B_BINARY, NOW);
    assert_eq!(time(&mut rtc, NOW), [20, 26, 11, 22, 14, 58, 3, 1]);
    set(&mut rtc, STATUS_B, 0, NOW);
    assert_eq!(cmos(&mut rtc, HOURS, NOW), 0x82);
}

#[test]
fn offset_is_added() {
    let mut rtc = Rtc::new(3600, NOW);
    assert_eq!(cmos(&mut rtc, HOURS, NOW), 0x15);
    let mut rtc = Rtc::new(-86_400, NOW);
    assert_eq!(cmos(&mut rtc, DAY, NOW), 0x21);
}

#[test]
fn update_in_progress_warns_just_before_each_second() {
    let mut rtc = Rtc::new(0, NOW);
    assert_eq!(cmos(&mut rtc, STATUS_A, NOW), 0x26);
    let late = Duration::new(NOW.as_secs(), 999_800_000);
    assert_eq!(cmos(&mut rtc, STATUS_A, late), 0xa6);
}

/// The steps of Linux's `mc146818_set_time`.
fn set_as_linux_does(rtc: &mut Rtc, fields: [u8; 7], now: Duration) {
    let b = cmos(rtc, STATUS_B, now);
    set(rtc, STATUS_B, b | B_SET, now);
    let a = cmos(rtc, STATUS_A, now);
    set(rtc, STATUS_A, a | 0x70, now);
    for (index, value) in [YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, CENTURY]
        .into_iter()
        .zip(fields)
    {
        set(rtc, index, value, now);
    }
    set(rtc, STATUS_B, b, now);
    set(rtc, STATUS_A, a, now);
}

#[test]
fn setting_the_clock_as_linux_does_starts_it_half_a_second_on() {
    let mut rtc = Rtc::new(0, NOW);
    set_as_linux_does(&mut rtc, [0x99, 0x12, 0x31, 0x23, 0x59, 0x58, 0x19], NOW);
    assert_eq!(cmos(&mut rtc, SECONDS, NOW), 0x58);
    let later = NOW + Duration::from_millis(499);
    assert_eq!(cmos(&mut rtc, SECONDS, later), 0x58);
    let later = NOW + Duration::from_millis(501);
    assert_eq!(cmos(&mut rtc, SECONDS, later), 0x59);
    let next_year = NOW + Duration::from_millis(1501);
    assert_eq!(
        time(&mut rtc, next_year),
        [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 0x07]
    );
}

#[test]
fn clock_stands_while_it_is_being_set() {
    let mut rtc = Rtc::new(0, NOW);
    set(&mut rtc, STATUS_B, B_24_HOURS | B_SET, NOW);
    let later = NOW + Duration::from_secs(30);
    assert_eq!(cmos(&mut rtc, SECONDS, later), 0x03);
    set(&mut rtc, MINUTES, 0x30, later);
    assert_eq!(cmos(&mut rtc, MINUTES, later), 0x30);
    set(&mut rtc, STATUS_B, B_24_HOURS, later);
    assert_eq!(cmos(&mut rtc, SECONDS, later), 0x03);
    assert_eq!(cmos(&mut rtc, MINUTES, later), 0x30);
}

#[test]
fn impossible_times_leave_the_clock_going() {
    let mut rtc = Rtc::new(0, NOW);
    set_as_linux_does(&mut rtc, [0x26, 0x13, 0x42, 0x25, 0x61, 0x61, 0x20], NOW);
    assert_eq!(cmos(&mut rtc, MINUTES, NOW), 0x58);
}

#[test]
fn memory_keeps_its_bytes_and_status_d_says_so() {
    let mut rtc = Rtc::new(0, NOW);
    for index in (0x0e..0x80).filter(|&i| i != CENTURY) {
        set(&mut rtc, index, index ^ 0x5a, NOW);
    }
    for index in (0x0e..0x80).filter(|&i| i != CENTURY) {
        assert_eq!(cmos(&mut rtc, index, NOW), index ^ 0x5a);
    }
    assert_eq!(cmos(&mut rtc, STATUS_D, NOW), 0x80);
}

#[test]
fn update_interrupt_comes_at_the_next_second_and_reading_c_ends_it() {
    let mut rtc = Rtc::new(0, NOW);
    assert_eq!(rtc.deadline(NOW), None);
    set(&mut rtc, STATUS_B, B_24_HOURS | B_UPDATE, NOW);
    assert_eq!(rtc.deadline(NOW), Some(Duration::from_millis(750)));
    let tick = NOW + Duration::from_millis(750);
    rtc.look(tick);
    assert!(rtc.is_requesting());
    assert_eq!(
        rtc.deadline(tick),
        None,
        "no second edge before the first is taken"
    );
    let events = cmos(&mut rtc, STATUS_C, tick);
    assert_eq!(events & (C_REQUEST | B_UPDATE), C_REQUEST | B_UPDATE);
    assert!(!rtc.is_requesting());
    assert_eq!(rtc.deadline(tick), Some(Duration::from_secs(1)));
}

#[test]
fn periodic_interrupt_has_the_rate_of_register_a() {
    let mut rtc = Rtc::new(0, Duration::ZERO);
    set(&mut rtc, STATUS_B, B_24_HOURS | B_PERIODIC, Duration::ZERO);
    for (rate, hz) in [(6, 1024), (13, 8), (15, 2), (1, 256), (2, 128), (3, 8192)] {
        set(&mut rtc, STATUS_A, 0x20 | rate, Duration::ZERO);
        cmos(&mut rtc, STATUS_C, Duration::ZERO);
        let expected = Duration::from_nanos(1_000_000_000 / hz);
        assert_eq!(rtc.deadline(Duration::ZERO), Some(expected), "rate {rate}");
    }
    set(&mut rtc, STATUS_A, 0x20, Duration::ZERO);
    assert_eq!(rtc.deadline(Duration::ZERO), None);
}

#[test]
fn alarm_rings_at_its_time_of_day() {
    let mut rtc = Rtc::new(0, NOW);
    set(&mut rtc, SECONDS_ALARM, 0x10, NOW);
    set(&mut rtc, MINUTES_ALARM, 0x59, NOW);
    set(&mut rtc, HOURS_ALARM, 0x14, NOW);
    set(&mut rtc, STATUS_B, B_24_HOURS | B_ALARM, NOW);
    let wait = rtc.deadline(NOW).unwrap();
    assert_eq!(wait, Duration::from_millis(66_750));
    rtc.look(NOW + wait - Duration::from_millis(1));
    assert!(!rtc.is_requesting());
    rtc.look(NOW + wait);
    assert!(rtc.is_requesting());
}

#[test]
fn alarm_with_wildcards_rings_each_minute() {
    let mut rtc = Rtc::new(0, NOW);
    set(&mut rtc, SECONDS_ALARM, 0x00, NOW);
    set(&mut rtc, MINUTES_ALARM, 0xff, NOW);
    set(&mut rtc, HOURS_ALARM, 0xc0, NOW);
    set(&mut rtc, STATUS_B, B_24_HOURS | B_ALARM, NOW);
    assert_eq!(rtc.deadline(NOW), Some(Duration::from_millis(56_750)));
}

#[test]
fn alarm_at_no_time_never_rings() {
    let mut rtc = Rtc::new(0, NOW);
    set(&mut rtc, SECONDS_ALARM, 0x61, NOW);
    set(&mut rtc, STATUS_B, B_24_HOURS | B_ALARM, NOW);
    assert_eq!(rtc.deadline(NOW), None);
}

#[test]
fn events_are_visible_without_interrupts() {
    let mut rtc = Rtc::new(0, NOW);
    cmos(&mut rtc, STATUS_C, NOW);
    let later = NOW + Duration::from_secs(1);
    assert_eq!(cmos(&mut rtc, STATUS_C, later), B_UPDATE | B_PERIODIC);
}

proptest! {
    #[test]
    fn any_sequence_of_accesses_is_survived(
        steps in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u8>(), 0u64..5_000_000), 0..200),
        offset in any::<i64>(),
    ) {
        let mut now = NOW;
        let mut rtc = Rtc::new(offset, now);
        for (write, index, value, us) in steps {
            now += Duration::from_micros(us);
            rtc.select(index);
            if write {
                rtc.write(value, now);
            } else {
                rtc.read(now);
            }
            rtc.look(now);
            rtc.deadline(now);
        }
    }

    #[test]
    fn what_is_set_is_read_back(seconds in -60_000_000_000i64..250_000_000_000, binary: bool, hours_24: bool) {
        let mut rtc = Rtc::new(0, NOW);
        let mode = if binary { B_BINARY } else { 0 } | if hours_24 { B_24_HOURS } else { 0 };
        set(&mut rtc, STATUS_B, mode, NOW);
        // What a chip of the right time shows, put into one of the wrong time.
        let wanted = seconds - i64::try_from(NOW.as_secs()).unwrap();
        let mut other = Rtc::new(wanted, NOW);
        set(&mut other, STATUS_B, mode, NOW);
        let date = time(&mut other, NOW);
        let fields = [date[1], date[2], date[3], date[4], date[5], date[6], date[0]];
        set_as_linux_does(&mut rtc, fields, NOW);
        prop_assert_eq!(time(&mut rtc, NOW), date);
    }
}
