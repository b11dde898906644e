//! The CMOS clock: the host's time of day (UTC), and a little memory.
//!
//! The guest reads time only; what it sets is not kept, and alarms never ring. The registers of one reading belong
//! together: reading the seconds, or status A, notes the time, and the others tell that one for up to a second.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::acpi::CENTURY;
use crate::bus::BusDevice;
use crate::state::{Reader, Section, StateError, Writer};

/// The name of the clock's section.
pub(crate) const SECTION: &str = "cmos";

const VERSION: u32 = 1;
const BYTES: usize = 128;
/// The highest bit of the index masks the NMI, which there is none of.
const INDEX: u8 = 0x7f;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 10;
const STATUS_B: u8 = 11;
const STATUS_C: u8 = 12;
const STATUS_D: u8 = 13;

/// The divider of a clock that goes; an update is never in progress.
const GOING: u8 = 0x26;
const HOURS_24: u8 = 1 << 1;
const BINARY: u8 = 1 << 2;
const AFTERNOON: u8 = 1 << 7;
/// The memory is valid: the battery has never been empty.
const VALID: u8 = 1 << 7;

/// The clock of one machine.
pub(crate) struct Cmos {
    now: Box<dyn Fn() -> SystemTime + Send + Sync>,
    inner: Mutex<Inner>,
}

struct Inner {
    index: u8,
    memory: [u8; BYTES],
    noted: SystemTime,
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new(Box::new(SystemTime::now))
    }
}

impl Cmos {
    fn new(now: Box<dyn Fn() -> SystemTime + Send + Sync>) -> Self {
        let mut memory = [0; BYTES];
        memory[usize::from(STATUS_A)] = GOING;
        memory[usize::from(STATUS_B)] = HOURS_24;
        Self {
            now,
            inner: Mutex::new(Inner {
                index: 0,
                memory,
                noted: UNIX_EPOCH,
            }),
        }
    }

    /// Saves what the clock is, apart from the time.
    pub(crate) fn state(&self) -> Section {
        let inner = self.lock();
        let mut writer = Writer::new();
        writer.u8(inner.index).fixed(&inner.memory);
        writer.finish(SECTION, VERSION)
    }

    /// Says whether a state can be restored.
    pub(crate) fn check(&self, state: &Section) -> Result<(), StateError> {
        decode(state).map(|_| ())
    }

    /// Becomes what was saved.
    pub(crate) fn restore(&self, state: &Section) -> Result<(), StateError> {
        let (index, memory) = decode(state)?;
        *self.lock() = Inner {
            index,
            memory,
            noted: UNIX_EPOCH,
        };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, inner: &mut Inner) -> u8 {
        let register = inner.index;
        let now = (self.now)();
        // A clock that was set back makes this an error, and the noted time old.
        let fresh = now
            .duration_since(inner.noted)
            .is_ok_and(|age| age < Duration::from_secs(1));
        if register == SECONDS || register == STATUS_A || !fresh {
            inner.noted = now;
        }
        let time = Time::at(inner.noted);
        let status = inner.memory[usize::from(STATUS_B)];
        let value = match register {
            SECONDS => time.second,
            MINUTES => time.minute,
            HOURS => return hours(time.hour, status),
            WEEKDAY => time.weekday,
            DAY => time.day,
            MONTH => time.month,
            YEAR => time.year,
            CENTURY => time.century,
            STATUS_C => return 0,
            STATUS_D => return VALID,
            other => return inner.memory[usize::from(other)],
        };
        encoded(value, status)
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        for (port, byte) in (offset..).zip(data) {
            // The index can only be written.
            if port == 1 {
                *byte = self.get(&mut inner);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (port, byte) in (offset..).zip(data) {
            if port == 0 {
                inner.index = byte & INDEX;
            } else {
                inner.set(*byte);
            }
        }
    }
}

impl Inner {
    /// Keeps the byte; where time is read, nobody will see it.
    fn set(&mut self, value: u8) {
        let value = if self.index == STATUS_A {
            // Whether an update is in progress is only read.
            value & INDEX
        } else {
            value
        };
        self.memory[usize::from(self.index)] = value;
    }
}

fn decode(section: &Section) -> Result<(u8, [u8; BYTES]), StateError> {
    let mut reader = Reader::new(section, VERSION)?;
    let index = reader.u8("the clock's index")?;
    if index > INDEX {
        return Err(reader.value("the clock's index"));
    }
    let memory: [u8; BYTES] = reader.array("the clock's memory")?;
    if memory[usize::from(STATUS_A)] > INDEX {
        return Err(reader.value("the clock's status"));
    }
    reader.end()?;
    Ok((index, memory))
}

fn encoded(value: u8, status: u8) -> u8 {
    if status & BINARY != 0 {
        value
    } else {
        ((value / 10) << 4) | (value % 10)
    }
}

fn hours(hour: u8, status: u8) -> u8 {
    if status & HOURS_24 != 0 {
        return encoded(hour, status);
    }
    let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
    encoded((hour + 11) % 12 + 1, status) | afternoon
}

#[derive(Debug, PartialEq, Eq)]
struct Time {
    century: u8,
    year: u8,
    month: u8,
    day: u8,
    /// Sunday is 1.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Time {
    /// The time of day and the date in the Gregorian calendar; before 1970 it is 1970.
    fn at(time: SystemTime) -> Self {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let days = seconds / 86_400;
        // Years that begin in March end with the day that is there or not, in cycles of 400 years.
        let day = days + 719_468;
        let (cycle, day) = (day / 146_097, day % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = (month + 2) % 12 + 1;
        let year = cycle * 400 + year + u64::from(month <= 2);
        let small = |value: u64| u8::try_from(value % 100).expect("less than 100");
        Self {
            century: small(year / 100),
            year: small(year),
            month: small(month),
            day: small(day),
            weekday: small((days + 4) % 7 + 1),
            hour: small(seconds / 3600 % 24),
            minute: small(seconds / 60 % 60),
            second: small(seconds % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A clock at this time, and the milliseconds that it goes by.
    fn clock(seconds: u64) -> (Cmos, Arc<AtomicU64>) {
        let time = Arc::new(AtomicU64::new(seconds * 1000));
        let now = Arc::clone(&time);
        let cmos = Cmos::new(Box::new(move || {
            UNIX_EPOCH + Duration::from_millis(now.load(Ordering::Relaxed))
        }));
        (cmos, time)
    }

    fn read(cmos: &Cmos, register: u8) -> u8 {
        cmos.write(0, &[register]);
        let mut data = [0xff];
        cmos.read(1, &mut data);
        data[0]
    }

    fn write(cmos: &Cmos, register: u8, value: u8) {
        cmos.write(0, &[register]);
        cmos.write(1, &[value]);
    }

    const DATE: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

    #[test]
    fn tells_the_time_in_each_form() {
        // Thursday, 29 February 2024, 23:59:58 UTC.
        let (cmos, _) = clock(1_709_251_198);
        let all = |cmos: &Cmos| DATE.map(|register| read(cmos, register));
        assert_eq!(all(&cmos), [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        write(&cmos, STATUS_B, HOURS_24 | BINARY);
        assert_eq!(all(&cmos), [58, 59, 23, 5, 29, 2, 24, 20]);
        write(&cmos, STATUS_B, BINARY);
        assert_eq!(read(&cmos, HOURS), 11 | AFTERNOON);
        write(&cmos, STATUS_B, 0);
        assert_eq!(read(&cmos, HOURS), 0x11 | AFTERNOON);
        let (midnight, _) = clock(0);
        write(&midnight, STATUS_B, 0);
        assert_eq!(read(&midnight, HOURS), 0x12);
        let (noon, _) = clock(43_200);
        write(&noon, STATUS_B, 0);
        assert_eq!(read(&noon, HOURS), 0x12 | AFTERNOON);
    }

    #[test]
    fn a_reading_belongs_together() {
        let (cmos, time) = clock(0);
        time.store(59_900, Ordering::Relaxed);
        assert_eq!(read(&cmos, SECONDS), 0x59);
        time.store(60_100, Ordering::Relaxed);
        assert_eq!(read(&cmos, MINUTES), 0, "the minute of the seconds that were read");
        assert_eq!(read(&cmos, SECONDS), 0);
        assert_eq!(read(&cmos, MINUTES), 1);
        time.store(3_600_000, Ordering::Relaxed);
        assert_eq!(read(&cmos, HOURS), 1, "an old reading is not told");
        time.store(0, Ordering::Relaxed);
        assert_eq!(read(&cmos, HOURS), 0, "nor one from the future");
    }

    #[test]
    fn is_never_busy_and_always_valid() {
        let (cmos, _) = clock(1);
        write(&cmos, STATUS_A, 0xff);
        assert_eq!(read(&cmos, STATUS_A), 0x7f);
        assert_eq!(read(&cmos, STATUS_C), 0);
        assert_eq!(read(&cmos, STATUS_D), 0x80);
    }

    #[test]
    fn keeps_memory_and_alarms_but_not_the_time() {
        let (cmos, _) = clock(0);
        for register in [1, 3, 5, 14, 127] {
            write(&cmos, register, 0xa0 | register);
        }
        write(&cmos, YEAR, 0x99);
        let state = cmos.state();
        let (other, _) = clock(0);
        other.check(&state).unwrap();
        other.restore(&state).unwrap();
        assert_eq!(other.state(), state);
        for register in [1, 3, 5, 14, 127] {
            assert_eq!(read(&other, register), 0xa0 | register);
        }
        assert_eq!(read(&other, YEAR), 0x70);
    }

    #[test]
    fn refuses_what_it_never_saves() {
        let (cmos, _) = clock(0);
        for at in [0, 1 + usize::from(STATUS_A)] {
            let mut state = cmos.state();
            state.bytes[at] = 0x80;
            assert!(matches!(cmos.check(&state), Err(StateError::Value { .. })));
        }
    }

    #[test]
    fn leap_years_and_centuries() {
        for (seconds, date) in [
            (951_782_399, (20, 0, 2, 28)),
            (951_782_400, (20, 0, 2, 29)),
            (4_107_542_399, (21, 0, 2, 28)),
            (4_107_542_400, (21, 0, 3, 1)),
            (946_684_799, (19, 99, 12, 31)),
            (1_798_761_600, (20, 27, 1, 1)),
        ] {
            let time = Time::at(UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!((time.century, time.year, time.month, time.day), date);
        }
    }

    proptest! {
        #[test]
        fn days_follow_each_other(day in 0..200_000_u64) {
            let at = |day: u64| Time::at(UNIX_EPOCH + Duration::from_secs(day * 86_400));
            let (today, next) = (at(day), at(day + 1));
            prop_assert_eq!(next.weekday, today.weekday % 7 + 1);
            if next.day == 1 {
                prop_assert!((28..=31).contains(&today.day));
                prop_assert_eq!(next.month, today.month % 12 + 1);
            } else {
                prop_assert_eq!((next.day, next.month), (today.day + 1, today.month));
            }
        }

        #[test]
        fn never_panics(accesses in proptest::collection::vec((0..2_u64, any::<u8>()), 0..100), seconds in any::<u32>()) {
            let (cmos, _) = clock(seconds.into());
            for (port, value) in accesses {
                cmos.write(port, &[value]);
                cmos.read(port, &mut [0; 2]);
            }
        }
    }
}
