//! The vCPU: a thread that runs the guest, and the handle that stops it.
//!
//! ```text
//!              resume                 idle doorbell
//!   Stopped ──────────► Running ◄───────────────────► Waiting
//!      ▲                   │    device or deadline       │
//!      └──── Stopping ◄────┴──────── pause ──────────────┘
//! ```
//!
//! The thread owns the vCPU from `resume` until it reports that it has stopped; in between, the
//! handle's owner may read and write the registers. When it stops it first completes the instruction
//! that left the guest: only then do the registers say what is to happen next. A guest that waits at
//! its doorbell stops as one that waits, with its deadline. Of several vCPUs each has a thread; all are asked to stop
//! before the first is waited for.
//!
//! The guest ends on its own by a power register or by a crash; the vCPU then stops and says so
//! through the [`PowerHook`], again at each `resume`, until other registers are loaded. Other vCPUs go on until they are stopped.

mod exit;
pub(crate) mod state;

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::abi::{POWER_OFF, POWER_PANIC, POWER_RESET};
use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::VcpuFd;
use rustix::process::setpriority_process;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

pub(crate) use self::exit::Board;
use self::exit::Request;
use self::state::{MsrList, RegisterError, Registers};
use crate::clock::{self, GuestClock};
use crate::doorbell::Woken;
use crate::kvm::Chips;
use crate::memory::GuestRam;
use crate::state::{Reader, StateError, Writer};

/// How long a vCPU may take to stop, which is a matter of microseconds: so many looks, at most so long after each other. A host that stood
/// still in between was no fault of the vCPU's, and makes one look late, not all.
const STOP_LOOKS: u32 = 50;
const STOP_LOOK: Duration = Duration::from_millis(100);
/// The nice level of a vCPU's thread. What wakes up for a guest's sake, for each frame that comes, would else take the processor from it where there
/// is no idle one, and both leaving a guest and coming back cost more than what was to be done: it may wait until the guest does.
const NICE: i32 = -5;
/// Parts of one instruction, at most; KVM looks at the exit request every 1024 repetitions.
const PARTS_MAX: u32 = 1 << 16;

/// How the guest has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// In order.
    Off,
    /// It wants to start again.
    Reset,
    /// It can't go on; its console says why.
    Panic,
    /// The processor can't go on.
    Crashed {
        /// What happened.
        reason: String,
    },
}

/// Called on the vCPU's thread when the guest has ended; this vCPU is stopped then, others may run. It must not wait
/// for long, and must not drop the machine.
pub type PowerHook = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// What belongs to the vCPU; whoever may touch it, the thread or the handle's owner, holds its lock.
pub(crate) struct Cpu {
    fd: VcpuFd,
    /// The guest writes it for as long as `fd` is open.
    _ram: GuestRam,
    /// The clock of a guest that reads it from a page; others have KVM's.
    pub(crate) clock: Option<GuestClock>,
    /// The guest waits at its doorbell for this guest time (0: however long).
    waiting: Option<u64>,
    ended: Option<PowerEvent>,
    /// The last instruction is only complete once the vCPU is entered again.
    incomplete: bool,
}

/// A vCPU and its thread.
pub(crate) struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    cpu: Mutex<Cpu>,
    phase: Mutex<Phase>,
    changed: Condvar,
    stop: AtomicBool,
    exit_at_once: ExitAtOnce,
    board: Arc<Board>,
    hook: PowerHook,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Stopped,
    Running,
    Finished,
}

impl Vcpu {
    /// Starts the thread of a vCPU; the guest stays stopped.
    pub(crate) fn new(
        mut fd: VcpuFd,
        ram: GuestRam,
        clock: Option<GuestClock>,
        board: &Arc<Board>,
        hook: &PowerHook,
    ) -> io::Result<Self> {
        install_kick()?;
        let exit_at_once = ExitAtOnce(&raw mut fd.get_kvm_run().immediate_exit);
        let cpu = Cpu {
            fd,
            _ram: ram,
            clock,
            waiting: None,
            ended: None,
            incomplete: false,
        };
        let shared = Arc::new(Shared {
            cpu: Mutex::new(cpu),
            phase: Mutex::new(Phase::Stopped),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            exit_at_once,
            board: Arc::clone(board),
            hook: Arc::clone(hook),
        });
        let thread = thread::Builder::new().name("vcpu".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                // Without the right to it the guest is slower where processors are few; nothing else is lost.
                let _ = setpriority_process(None, NICE);
                shared.live()
            }
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Lets the guest run.
    pub(crate) fn resume(&mut self) {
        let shared = &*self.shared;
        let mut phase = lock(&shared.phase);
        if *phase == Phase::Stopped {
            shared.stop.store(false, Ordering::Release);
            shared.exit_at_once.set(false);
            if let Some(doorbell) = &shared.board.doorbell {
                doorbell.pause(false);
            }
            *phase = Phase::Running;
            shared.changed.notify_all();
        }
    }

    /// Asks the guest to stop between two instructions.
    pub(crate) fn ask_to_stop(&self) -> io::Result<()> {
        let shared = &*self.shared;
        shared.stop.store(true, Ordering::Release);
        shared.exit_at_once.set(true);
        if let Some(doorbell) = &shared.board.doorbell {
            doorbell.pause(true);
        }
        if *lock(&shared.phase) == Phase::Running
            && let Some(thread) = &self.thread
        {
            thread.kill(SIGRTMIN())?;
        }
        Ok(())
    }

    /// Waits until a guest that was asked to has stopped.
    pub(crate) fn wait_until_stopped(&self) -> io::Result<()> {
        let shared = &*self.shared;
        let mut phase = lock(&shared.phase);
        let running = |phase: &mut Phase| *phase == Phase::Running;
        for _ in 0..STOP_LOOKS {
            let wait = shared.changed.wait_timeout_while(phase, STOP_LOOK, running);
            let (stopped, outcome) = wait.unwrap_or_else(PoisonError::into_inner);
            if !outcome.timed_out() {
                return Ok(());
            }
            phase = stopped;
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Says whether it was asked to stop, and not to go on since.
    pub(crate) fn is_asked_to_stop(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Gives access to the registers of a stopped vCPU.
    pub(crate) fn cpu(&mut self) -> MutexGuard<'_, Cpu> {
        assert!(
            *lock(&self.shared.phase) != Phase::Running,
            "registers belong to the thread while the guest runs"
        );
        lock(&self.shared.cpu)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if let Err(error) = self.ask_to_stop().and_then(|()| self.wait_until_stopped()) {
            tracing::error!(%error, "the vCPU does not stop; its thread is left behind");
            return;
        }
        *lock(&self.shared.phase) = Phase::Finished;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vCPU's thread has panicked");
        }
    }
}

/// What the thread does next; the vCPU is its own while it holds the lock.
enum State<'a> {
    Stopped,
    Running(MutexGuard<'a, Cpu>),
    Waiting(MutexGuard<'a, Cpu>, u64),
    Stopping(MutexGuard<'a, Cpu>),
    Finished,
}

impl Shared {
    fn live(&self) {
        prepare_thread();
        let mut state = State::Stopped;
        loop {
            state = match state {
                State::Stopped => self.stopped(),
                State::Running(cpu) => self.running(cpu),
                State::Waiting(cpu, deadline) => self.waiting(cpu, deadline),
                State::Stopping(cpu) => self.stopping(cpu),
                State::Finished => return,
            }
        }
    }

    fn stopped(&self) -> State<'_> {
        let stopped = |phase: &mut Phase| *phase == Phase::Stopped;
        let phase = self
            .changed
            .wait_while(lock(&self.phase), stopped)
            .unwrap_or_else(PoisonError::into_inner);
        match *phase {
            Phase::Stopped => State::Stopped,
            Phase::Running => State::Running(lock(&self.cpu)),
            Phase::Finished => State::Finished,
        }
    }

    fn running<'a>(&'a self, mut cpu: MutexGuard<'a, Cpu>) -> State<'a> {
        loop {
            if self.stop.load(Ordering::Acquire) || cpu.ended.is_some() {
                return State::Stopping(cpu);
            }
            if let Some(deadline) = cpu.waiting {
                return State::Waiting(cpu, deadline);
            }
            cpu.enter(&self.board);
        }
    }

    fn waiting<'a>(&'a self, mut cpu: MutexGuard<'a, Cpu>, deadline: u64) -> State<'a> {
        let (Some(doorbell), Some(clock)) = (&self.board.doorbell, &cpu.clock) else {
            unreachable!("only a guest with a doorbell waits at it");
        };
        let at = (deadline != 0)
            .then(|| Instant::now().checked_add(clock.until(deadline)))
            .flatten();
        match doorbell.wait(at) {
            Woken::Guest => {
                cpu.waiting = None;
                State::Running(cpu)
            }
            Woken::Pause => State::Stopping(cpu),
        }
    }

    fn stopping<'a>(&'a self, mut cpu: MutexGuard<'a, Cpu>) -> State<'a> {
        self.exit_at_once.set(true);
        cpu.complete(&self.board);
        let ended = cpu.ended.clone();
        drop(cpu);
        *lock(&self.phase) = Phase::Stopped;
        self.changed.notify_all();
        if let Some(event) = ended {
            (self.hook)(event);
        }
        State::Stopped
    }
}

impl Cpu {
    /// Enters the guest once, and carries out what it left for.
    fn enter(&mut self, board: &Board) {
        let (request, incomplete) = match self.fd.run() {
            Ok(exit) => exit::handle(exit, board),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => (Request::Continue, false),
            Err(error) => (
                Request::End(PowerEvent::Crashed {
                    reason: format!("KVM can't run it ({error})"),
                }),
                false,
            ),
        };
        self.incomplete = incomplete;
        match request {
            Request::Continue => {}
            Request::Wait(deadline) => self.waiting = Some(deadline),
            Request::End(event) => self.ended = Some(event),
        }
    }

    /// Completes the last instruction; the exit request is set, so the guest does not go on after it.
    fn complete(&mut self, board: &Board) {
        for _ in 0..PARTS_MAX {
            if !self.incomplete {
                return;
            }
            self.enter(board);
        }
        self.ended = Some(PowerEvent::Crashed {
            reason: "one instruction of it has no end".to_owned(),
        });
    }

    /// Sets the registers with which the guest starts.
    pub(crate) fn edit(&self, change: impl FnOnce(&mut Registers), msrs: &MsrList) -> Result<(), RegisterError> {
        let at = clock::host_tsc();
        let mut registers = Registers::save(&self.fd, msrs, at)?;
        change(&mut registers);
        registers.load(&self.fd, at)
    }

    /// Reads the MSRs that can't be set any more once this vCPU has run.
    pub(crate) fn lasting_msrs(&self, msrs: &MsrList) -> Result<Vec<kvm_msr_entry>, RegisterError> {
        msrs.read_lasting(&self.fd)
    }

    /// Says how the guest has ended, if it has.
    pub(crate) fn ended(&self) -> Option<&PowerEvent> {
        self.ended.as_ref()
    }

    /// Saves everything of the vCPU, at the host's counter `at`. The guest has not crashed.
    pub(crate) fn save(&self, msrs: &MsrList, at: u64) -> Result<CpuState, RegisterError> {
        Ok(CpuState {
            registers: Registers::save(&self.fd, msrs, at)?,
            waiting: self.waiting,
            ended: self.ended.clone(),
            now: self.clock.map_or(0, |clock| clock.now()),
        })
    }

    /// Tells a guest that has KVM's clock that it was stopped, so that it doesn't take the time for a hang of its own.
    pub(crate) fn tell_of_pause(&self) {
        // Fails where the guest doesn't use the clock, and then there is nobody to tell.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Becomes what was saved, at the host's counter `at`. After an error this vCPU must never run.
    pub(crate) fn load(&mut self, state: &CpuState, at: u64) -> Result<(), RegisterError> {
        if self.incomplete {
            let source = io::ErrorKind::ResourceBusy.into();
            return Err(RegisterError::Refused {
                register: "general registers",
                source,
            });
        }
        state.registers.load(&self.fd, at)?;
        self.waiting = state.waiting;
        self.ended.clone_from(&state.ended);
        Ok(())
    }
}

/// A vCPU's saved state.
pub(crate) struct CpuState {
    pub(crate) registers: Registers,
    waiting: Option<u64>,
    ended: Option<PowerEvent>,
    /// Guest time of the stop by the clock page.
    pub(crate) now: u64,
}

impl CpuState {
    pub(crate) fn encode(&self, to: &mut Writer) {
        let ended = match &self.ended {
            None | Some(PowerEvent::Crashed { .. }) => 0,
            Some(PowerEvent::Off) => POWER_OFF,
            Some(PowerEvent::Reset) => POWER_RESET,
            Some(PowerEvent::Panic) => POWER_PANIC,
        };
        to.u64(self.now).u32(ended);
        to.u8(self.waiting.is_some().into()).u64(self.waiting.unwrap_or(0));
        self.registers.encode(to);
    }

    pub(crate) fn decode(from: &mut Reader<'_>, chips: Chips) -> Result<Self, StateError> {
        let now = from.u64("the guest time")?;
        let ended = match from.u32("the power register")? {
            0 => None,
            POWER_OFF => Some(PowerEvent::Off),
            POWER_RESET => Some(PowerEvent::Reset),
            POWER_PANIC => Some(PowerEvent::Panic),
            _ => return Err(from.value("the power register")),
        };
        let waits = from.bool("whether the guest waits")?;
        let deadline = from.u64("the guest's deadline")?;
        let registers = Registers::decode(from, chips)?;
        Ok(Self {
            registers,
            waiting: waits.then_some(deadline),
            ended,
            now,
        })
    }
}

/// The byte that makes KVM_RUN return before it enters the guest.
struct ExitAtOnce(*mut u8);

// SAFETY: the byte is part of the vCPU's mapping, which belongs to no thread, and is accessed atomically.
unsafe impl Send for ExitAtOnce {}
// SAFETY: as above.
unsafe impl Sync for ExitAtOnce {}

impl ExitAtOnce {
    fn set(&self, exit: bool) {
        // SAFETY: the byte lies in the mapping of the `VcpuFd` in the same `Shared`, so it lives as long
        // as `self`; it has no other accesses than this one and the kernel's.
        let byte = unsafe { AtomicU8::from_ptr(self.0) };
        byte.store(exit.into(), Ordering::SeqCst);
    }
}

/// Makes the signal by which vCPU threads are called back do nothing but interrupt.
fn install_kick() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    Ok(register_signal_handler(SIGRTMIN(), ignore)?)
}

/// Lets the thread be called back by signal, and wake from its doorbell on time.
fn prepare_thread() {
    if let Err(error) = unblock_signal(SIGRTMIN()) {
        tracing::warn!(?error, "the vCPU's signal can't be unblocked: pauses may take long");
    }
    if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
        tracing::debug!(%error, "the host keeps its timer slack: the guest's deadlines are 50 µs late");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
