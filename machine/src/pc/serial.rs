//! The serial port, a 16550 at COM1: what the guest writes goes to a writer at once, byte by byte.
//!
//! Input waits here until the guest takes it, up to [`INPUT_BYTES_MAX`]; all that waits is state of the machine.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{Error, NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};

use crate::bus::BusDevice;
use crate::devices::Interrupt;
use crate::devices::virtio::Complaints;
use crate::state::{Reader, Section, StateError, Writer};

/// The name of the port's section.
pub(crate) const SECTION: &str = "serial";
/// Input that waits for the guest, at most; of what comes then nothing is taken.
pub(crate) const INPUT_BYTES_MAX: usize = 4096;

const VERSION: u32 = 1;
/// What the receiver's queue of the chip holds.
const QUEUE_BYTES: usize = 64;
const DATA_READY: u8 = 1;

/// A serial port.
pub struct Serial {
    line: Arc<dyn Interrupt>,
    inner: Mutex<Inner>,
}

struct Inner {
    uart: Uart<Line, NoEvents, Box<dyn Write + Send>>,
    waiting: VecDeque<u8>,
    complaints: Complaints,
}

/// The interrupt as the chip raises it.
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

impl Serial {
    /// Makes a port that prints to `output`, which should not block for long: the vCPU waits for it.
    pub(crate) fn new(output: Box<dyn Write + Send>, line: Arc<dyn Interrupt>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                uart: Uart::new(Line(Arc::clone(&line)), output),
                waiting: VecDeque::new(),
                complaints: Complaints::default(),
            }),
            line,
        }
    }

    /// Gives the guest input, and says how much of it was taken: there is only so much room.
    pub fn input(&self, input: &[u8]) -> usize {
        let mut inner = self.lock();
        let taken = input.len().min(INPUT_BYTES_MAX - inner.waiting.len());
        inner.waiting.extend(&input[..taken]);
        inner.deliver();
        taken
    }

    /// Saves what the port is.
    pub(crate) fn state(&self) -> Section {
        let inner = self.lock();
        let uart = inner.uart.state();
        let mut writer = Writer::new();
        writer.fixed(&registers(&uart)).bytes(&uart.in_buffer);
        let (first, second) = inner.waiting.as_slices();
        writer.bytes(&[first, second].concat());
        writer.finish(SECTION, VERSION)
    }

    /// Says whether a state can be restored.
    pub(crate) fn check(&self, state: &Section) -> Result<(), StateError> {
        decode(state).map(|_| ())
    }

    /// Becomes what was saved. An interrupt that the guest has not answered yet comes again.
    pub(crate) fn restore(&self, state: &Section) -> Result<(), StateError> {
        let (state, waiting) = decode(state)?;
        let mut inner = self.lock();
        let none = Uart::new(Line(Arc::clone(&self.line)), Box::new(io::sink()) as _);
        let output = mem::replace(&mut inner.uart, none).into_writer();
        inner.uart = Uart::from_state(&state, Line(Arc::clone(&self.line)), NoEvents, output)
            .expect("the queue's length was checked, and the interrupt can't fail");
        inner.waiting = waiting;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Gives the chip as much input as it takes. While it listens to itself it takes none.
    fn deliver(&mut self) {
        let count = self.waiting.len().min(self.uart.fifo_capacity());
        if count > 0 {
            let input: Vec<u8> = self.waiting.range(..count).copied().collect();
            let taken = self.uart.enqueue_raw_bytes(&input).expect("there is room");
            self.waiting.drain(..taken);
        }
    }

    fn write(&mut self, register: u8, value: u8) {
        if let Err(Error::IOError(error)) = self.uart.write(register, value)
            && let Some(count) = self.complaints.due()
        {
            tracing::warn!(%error, count, "what the guest prints on its serial port can't be written");
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        for (register, byte) in (offset..).zip(data) {
            *byte = inner.uart.read(number(register));
        }
        inner.deliver();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (register, byte) in (offset..).zip(data) {
            inner.write(number(register), *byte);
        }
        inner.deliver();
    }
}

fn number(register: u64) -> u8 {
    u8::try_from(register).expect("the port has eight registers")
}

fn registers(state: &SerialState) -> [u8; 9] {
    [
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
    ]
}

fn decode(section: &Section) -> Result<(SerialState, VecDeque<u8>), StateError> {
    let mut reader = Reader::new(section, VERSION)?;
    let [
        low,
        high,
        enable,
        identification,
        control,
        status,
        modem,
        lines,
        scratch,
    ] = reader.array("the serial port's registers")?;
    let queue = reader.bytes("the serial port's queue", QUEUE_BYTES)?;
    if (status & DATA_READY == 0) != queue.is_empty() {
        return Err(reader.value("the serial port's line status"));
    }
    let waiting = reader.bytes("the serial port's input", INPUT_BYTES_MAX)?;
    let state = SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: control,
        line_status: status,
        modem_control: modem,
        modem_status: lines,
        scratch,
        in_buffer: queue.to_vec(),
    };
    let waiting = waiting.iter().copied().collect();
    reader.end()?;
    Ok((state, waiting))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    const DATA: u64 = 0;
    const ENABLE: u64 = 1;
    const IDENTIFICATION: u64 = 2;
    const MODEM: u64 = 4;
    const STATUS: u64 = 5;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Interrupt for Count {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, Arc<Count>, Paper) {
        let (count, paper) = (Arc::new(Count::default()), Paper::default());
        let serial = Serial::new(Box::new(paper.clone()), Arc::clone(&count) as _);
        (serial, count, paper)
    }

    fn read(serial: &Serial, register: u64) -> u8 {
        let mut data = [0xff];
        serial.read(register, &mut data);
        data[0]
    }

    fn drain(serial: &Serial) -> Vec<u8> {
        let mut input = Vec::new();
        while read(serial, STATUS) & DATA_READY != 0 {
            input.push(read(serial, DATA));
        }
        input
    }

    #[test]
    fn prints_and_interrupts() {
        let (serial, count, paper) = port();
        serial.write(DATA, b"a");
        assert_eq!(count.0.load(Ordering::Relaxed), 0, "not enabled yet");
        serial.write(ENABLE, &[2]);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(read(&serial, IDENTIFICATION) & 0xf, 2);
        serial.write(DATA, b"b");
        assert_eq!(count.0.load(Ordering::Relaxed), 2);
        assert_eq!(*paper.0.lock().unwrap(), b"ab");
    }

    #[test]
    fn takes_input_up_to_its_limit_and_in_order() {
        let (serial, count, _) = port();
        serial.write(ENABLE, &[1]);
        let input: Vec<u8> = (0..=u8::MAX).cycle().take(INPUT_BYTES_MAX + 200).collect();
        let first = serial.input(&input);
        assert_eq!(first, INPUT_BYTES_MAX);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        let second = serial.input(&input[first..]);
        assert_eq!(second, QUEUE_BYTES, "what the chip took made room");
        assert_eq!(serial.input(&input[first + second..]), 0);
        assert_eq!(drain(&serial), input[..first + second]);
    }

    #[test]
    fn input_waits_while_the_port_listens_to_itself() {
        let (serial, ..) = port();
        serial.write(MODEM, &[0x10]);
        serial.input(b"later");
        serial.write(DATA, b"x");
        assert_eq!(drain(&serial), b"x");
        serial.write(MODEM, &[0]);
        assert_eq!(drain(&serial), b"later");
    }

    #[test]
    fn goes_on_elsewhere_as_it_was() {
        let (serial, ..) = port();
        serial.write(ENABLE, &[3]);
        let input: Vec<u8> = (0..100).collect();
        serial.input(&input);
        assert_eq!(read(&serial, DATA), 0);
        let state = serial.state();
        let (other, count, paper) = port();
        other.check(&state).unwrap();
        other.restore(&state).unwrap();
        assert_eq!(other.state(), state);
        assert!(count.0.load(Ordering::Relaxed) > 0, "the interrupt comes again");
        assert_eq!(drain(&other), input[1..]);
        other.write(DATA, b"z");
        assert_eq!(*paper.0.lock().unwrap(), b"z");
    }

    #[test]
    fn refuses_a_status_that_no_chip_has() {
        let (serial, ..) = port();
        let mut state = serial.state();
        state.bytes[5] |= DATA_READY;
        assert!(matches!(serial.check(&state), Err(StateError::Value { .. })));
    }

    proptest! {
        #[test]
        fn never_panics(accesses in proptest::collection::vec((0..8_u64, any::<u8>(), any::<bool>()), 0..200)) {
            let (serial, ..) = port();
            for (register, value, write) in accesses {
                if write {
                    serial.write(register, &[value]);
                } else {
                    read(&serial, register);
                }
                serial.input(&[value; 7]);
            }
            let state = serial.state();
            prop_assert_eq!(serial.restore(&state), Ok(()));
            prop_assert_eq!(serial.state(), state);
        }

        #[test]
        fn refuses_or_takes_any_state(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let (serial, ..) = port();
            let state = Section { name: SECTION.into(), version: VERSION, bytes };
            prop_assert_eq!(serial.check(&state).is_ok(), serial.restore(&state).is_ok());
        }
    }
}
