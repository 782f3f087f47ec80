//! Dates of the proleptic Gregorian calendar and seconds since 1970, both ways.

/// A date and time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DateTime {
    /// Year, such as 2026.
    pub(crate) year: i64,
    /// Month from 1 to 12.
    pub(crate) month: u8,
    /// Day of the month from 1 to 31.
    pub(crate) day: u8,
    /// Hour from 0 to 23.
    pub(crate) hour: u8,
    /// Minute.
    pub(crate) minute: u8,
    /// Second.
    pub(crate) second: u8,
}

const DAY_SECONDS: i64 = 86_400;
/// Days of 400 years.
const ERA_DAYS: i64 = 146_097;
/// Days from the start of the era (1 March of the year 0) to 1 January 1970.
const EPOCH_DAYS: i64 = 719_468;

impl DateTime {
    /// The date and time at `seconds` since 1970.
    pub(crate) fn from_seconds(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY_SECONDS);
        let rest = seconds.rem_euclid(DAY_SECONDS);
        // Years that start in March end with the leap day, which makes them regular.
        let shifted = days + EPOCH_DAYS;
        let era = shifted.div_euclid(ERA_DAYS);
        let of_era = shifted.rem_euclid(ERA_DAYS);
        let year_of_era =
            (of_era - of_era / 1_460 + of_era / 36_524 - of_era / (ERA_DAYS - 1)) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: small(month),
            day: small(day),
            hour: small(rest / 3600),
            minute: small(rest / 60 % 60),
            second: small(rest % 60),
        }
    }

    /// Seconds since 1970, or `None` when there is no such date or time.
    pub(crate) fn to_seconds(self) -> Option<i64> {
        if self.hour > 23 || self.minute > 59 || self.second > 59 {
            return None;
        }
        if !(1..=12).contains(&self.month) || !(1..=9999).contains(&self.year) || self.day == 0 {
            return None;
        }
        let month = i64::from(self.month);
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let shifted_month = (month + 9) % 12;
        let of_year = (153 * shifted_month + 2) / 5 + i64::from(self.day) - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA_DAYS + of_era - EPOCH_DAYS;
        let of_day =
            i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        let seconds = days * DAY_SECONDS + of_day;
        // The 31st of a shorter month would come out as a day of the next.
        (Self::from_seconds(seconds) == self).then_some(seconds)
    }

    /// Day of the week at `seconds` since 1970, from 1 (Sunday) to 7, as the MC146818 counts.
    pub(crate) fn weekday(seconds: i64) -> u8 {
        // 1 January 1970 was a Thursday.
        small((seconds.div_euclid(DAY_SECONDS) + 4).rem_euclid(7) + 1)
    }
}

fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn date(year: i64, month: u8, day: u8) -> DateTime {
        DateTime {
            year,
            month,
            day,
            hour: 0,
            minute: 0,
            second: 0,
        }
    }

    #[test]
    fn known_dates_are_right() {
        for (y, m, d, days, weekday) in [
            (1970, 1, 1, 0, 5),
            (2000, 2, 29, 11_016, 3),
            (2000, 3, 1, 11_017, 4),
            (2026, 11, 22, 20_779, 1),
            (1900, 3, 1, -25_508, 5),
        ] {
            let seconds = date(y, m, d).to_seconds().unwrap();
            assert_eq!(seconds, days * DAY_SECONDS, "{y}-{m}-{d}");
            assert_eq!(DateTime::weekday(seconds), weekday, "{y}-{m}-{d}");
        }
    }

    #[test]
    fn dates_that_do_not_exist_are_refused() {
        for (y, m, d) in [
            (2023, 2, 29),
            (1900, 2, 29),
            (2024, 4, 31),
            (2024, 13, 1),
            (2024, 0, 1),
            (2024, 1, 0),
        ] {
            assert_eq!(date(y, m, d).to_seconds(), None, "{y}-{m}-{d}");
        }
    }

    proptest! {
        #[test]
        fn both_ways_agree(seconds in -60_000_000_000i64..250_000_000_000) {
            prop_assert_eq!(DateTime::from_seconds(seconds).to_seconds(), Some(seconds));
        }

        #[test]
        fn next_day_is_the_next_weekday(seconds in -60_000_000_000i64..250_000_000_000) {
            let (a, b) = (DateTime::weekday(seconds), DateTime::weekday(seconds + DAY_SECONDS));
            prop_assert_eq!(b, a % 7 + 1);
        }
    }
}
