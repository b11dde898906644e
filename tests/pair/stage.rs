//! Two hosts in a laboratory, with everything a pair needs, and real roles started on them.
//!
//! A stage is one pair: networks, images, a witness, a folder for logs and sockets. Stages take turns, since the
//! machine is small and timing matters. What a test waits for is always a fact that a role tells; the limits
//! here only end a test that would wait for ever. Dropping a stage kills what still runs and checks that
//! nothing is left behind; after a failure it first shows the end of each log.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{panicking, sleep};
use std::time::{Duration, Instant};

use link::control::{self, ControlError, ask, ask_status};
use link::status::{State, Status};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use storage::DirectoryWitness;
use tandem::clients::{Target, http_get};
use tandem::lab::{Host, Lab, TAP};
use tandem::settings::Mac;
use tempfile::TempDir;

use crate::program;

/// Ends a test that would wait for ever. Facts are waited for, so a slow machine only makes a test slow.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);
const PAIR: &str = "test";
pub(crate) const PORT: u16 = 7100;
const LOG_LINES_SHOWN: usize = 40;

/// What a stage is made with.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) witness: bool,
    pub(crate) memory: &'static str,
    pub(crate) image_bytes: u64,
    pub(crate) takeover_limit: &'static str,
    /// What is said of the network card beyond its TAP.
    pub(crate) card: &'static str,
    /// More options for both roles.
    pub(crate) more: Vec<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            witness: true,
            memory: "64M",
            image_bytes: 64 << 20,
            takeover_limit: "300ms",
            card: "",
            more: Vec::new(),
        }
    }
}

pub(crate) struct Stage {
    /// In the order of their starts; the last of a host is the one that counts.
    roles: Vec<Role>,
    pub(crate) lab: Lab,
    folder: TempDir,
    setup: Setup,
    _turn: MutexGuard<'static, ()>,
}

struct Role {
    host: Host,
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    control: PathBuf,
    log: PathBuf,
}

impl Stage {
    /// Makes a stage; without KVM or root it says so and returns nothing.
    pub(crate) fn new(setup: Setup) -> Option<Self> {
        let turn = turn();
        if let Err(lack) = machine::host_check() {
            return skip(&lack.to_string());
        }
        let lab = match Lab::new() {
            Ok(lab) => lab,
            Err(lack) => return skip(&lack.to_string()),
        };
        let folder = TempDir::with_prefix("tandem-pair-").expect("a folder can be made");
        fs::create_dir(folder.path().join("witness")).expect("a folder can be made");
        program::path();
        let stage = Self {
            roles: Vec::new(),
            lab,
            folder,
            setup,
            _turn: turn,
        };
        for host in [Host::A, Host::B] {
            let image = File::create(stage.image(host)).expect("an image can be made");
            image.set_len(stage.setup.image_bytes).expect("an image can be made");
        }
        Some(stage)
    }

    /// Starts the secondary on one host and the primary on the other, and waits for protection.
    pub(crate) fn pair(&mut self, primary: Host) {
        self.start(primary.other(), "secondary");
        self.start(primary, "primary");
        self.await_protected();
        self.await_guest();
    }

    pub(crate) fn image(&self, host: Host) -> PathBuf {
        self.folder.path().join(format!("{}.img", host.name()))
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn control(&self, host: Host) -> PathBuf {
        self.folder.path().join(format!("{}.sock", host.name()))
    }

    pub(crate) fn listen_address(host: Host) -> SocketAddr {
        (host.replication_address(), PORT).into()
    }

    /// Returns the words that start a role on a host, as an operator would write them.
    pub(crate) fn words(&self, host: Host, role: &str) -> Vec<String> {
        let path = |path: PathBuf| path.display().to_string();
        let mut words = vec![role.to_owned()];
        let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
        option("--name", host.name().to_owned());
        option("--image", path(self.image(host)));
        option("--memory", self.setup.memory.to_owned());
        option("--tap", format!("{TAP}{}", self.setup.card));
        option("--control", path(self.control(host)));
        if role == "run" {
            // The clients know the VM by the address that the pair gave it.
            option("--mac", Mac::derived(PAIR).to_string());
        } else {
            option("--pair", PAIR.to_owned());
            option("--takeover-limit", self.setup.takeover_limit.to_owned());
            option("--listen", Self::listen_address(host).to_string());
            option("--peer", Self::listen_address(host.other()).to_string());
            if self.setup.witness {
                option("--witness", format!("dir:{}", path(self.folder.path().join("witness"))));
            }
            words.extend(self.setup.more.iter().map(|&word| word.to_owned()));
        }
        words
    }

    pub(crate) fn start(&mut self, host: Host, role: &str) {
        self.start_with(host, self.words(host, role));
    }

    /// Starts the program with these words on a host.
    pub(crate) fn start_with(&mut self, host: Host, words: Vec<String>) {
        self.start_within(host, &[], words);
    }

    /// As `start_with`, by way of another program that starts this one.
    fn start_within(&mut self, host: Host, wrapper: &[&str], words: Vec<String>) {
        let name = format!("{}-{}-{}", self.roles.len(), words[0], host.name());
        let log = self.folder.path().join(format!("{name}.log"));
        let out = File::create(&log).expect("a log can be made");
        let program = word(program::path());
        let mut line = wrapper.iter().copied().chain([program.as_str()]);
        let mut command = Command::new(line.next().expect("the program at least"));
        command.args(line).args(&words);
        command.args(["--parent", &std::process::id().to_string()]);
        command
            .stdin(Stdio::null())
            .stderr(out.try_clone().expect("a log can be made"));
        command.stdout(out);
        let child = self.lab.spawn_in(host, command).expect("the program starts");
        let control = words
            .windows(2)
            .find(|pair| pair[0] == "--control")
            .map_or_else(|| self.control(host), |pair| PathBuf::from(&pair[1]));
        self.roles.push(Role {
            host,
            name,
            child,
            ended: None,
            control,
            log,
        });
    }

    /// Runs the program with these words on a host until it ends, and returns how, and all it printed.
    pub(crate) fn run(&mut self, host: Host, words: Vec<String>) -> (ExitStatus, String) {
        self.run_within(host, &[], words)
    }

    /// As `run`, by way of another program that starts this one.
    pub(crate) fn run_within(&mut self, host: Host, wrapper: &[&str], words: Vec<String>) -> (ExitStatus, String) {
        self.start_within(host, wrapper, words);
        let status = self.await_end(host);
        let role = self.roles.pop().expect("just started");
        (status, role.text())
    }

    /// Returns what a command for operators answers.
    pub(crate) fn operate(&mut self, host: Host, words: &[&str]) -> (ExitStatus, String) {
        let control = self.control(host).display().to_string();
        let words = words.iter().copied().chain(["--control", &control]);
        let words = words.map(str::to_owned).collect();
        self.run(host, words)
    }

    fn role(&mut self, host: Host) -> &mut Role {
        let found = self.roles.iter_mut().rev().find(|role| role.host == host);
        found.expect("a role was started there")
    }

    /// Returns what the role on a host tells, or nothing while it does not answer. Panics if it has ended.
    pub(crate) fn status(&mut self, host: Host) -> Option<Status> {
        let role = self.role(host);
        let answer = ask_status(&role.control);
        if answer.is_err()
            && let Some(status) = role.poll()
        {
            panic!("{} ended: {status}; it should run", role.name);
        }
        answer.ok()
    }

    pub(crate) fn ask(&mut self, host: Host, command: &control::Command) -> Result<Value, ControlError> {
        ask(&self.role(host).control, command)
    }

    pub(crate) fn is_running(&mut self, host: Host) -> bool {
        self.role(host).poll().is_none()
    }

    /// Waits for what the role on a host tells to fulfil a condition.
    pub(crate) fn await_status(&mut self, host: Host, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        await_fact(&format!("{} on {}", what, host.name()), || {
            self.status(host).filter(|status| is_so(status))
        })
    }

    pub(crate) fn await_state(&mut self, host: Host, state: State) -> Status {
        self.await_status(host, state.name(), |status| status.state == state)
    }

    /// Waits until both sides say that they are protected.
    pub(crate) fn await_protected(&mut self) {
        await_fact("protection", || {
            let both = [Host::A, Host::B].map(|host| self.status(host));
            let protected = |status: &Option<Status>| status.as_ref().is_some_and(|status| status.state.is_protected());
            both.iter().all(protected).then_some(())
        });
    }

    pub(crate) fn await_guest(&mut self) {
        await_fact("an answer of the guest", || {
            let asked = self.get("/", Duration::from_secs(1));
            asked.ok().filter(|(status, _)| *status == 200).map(drop)
        });
    }

    /// Asks the guest for a page.
    pub(crate) fn get(&self, path: &str, limit: Duration) -> Result<(u16, Vec<u8>), String> {
        let path = path.to_owned();
        let answer = self
            .lab
            .client()
            .run(move || http_get(Target::bundled().http_address(), &path, limit));
        answer
            .map(|answer| (answer.status, answer.body))
            .map_err(|error| error.to_string())
    }

    /// Kills the role on a host as a power cut would.
    pub(crate) fn kill(&mut self, host: Host) -> Instant {
        let role = self.role(host);
        if let Some(status) = role.poll() {
            panic!("{} ended: {status}; it should run until it is killed", role.name);
        }
        let moment = Instant::now();
        role.child.kill().expect("a process may be killed");
        let status = await_fact("the death of a process", || self.role(host).poll());
        assert_eq!(
            status.signal(),
            Some(Signal::KILL.as_raw()),
            "killed, not ended otherwise"
        );
        moment
    }

    /// Asks the role on a host to end in order.
    pub(crate) fn terminate(&mut self, host: Host) {
        let pid = i32::try_from(self.role(host).child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process has a number"), Signal::TERM).expect("a process may be ended");
    }

    pub(crate) fn await_end(&mut self, host: Host) -> ExitStatus {
        let what = format!("the end of {}", self.role(host).name);
        await_fact(&what, || self.role(host).poll())
    }

    pub(crate) fn pid(&mut self, host: Host) -> u32 {
        self.role(host).child.id()
    }

    /// Returns all that the last role on a host has printed.
    pub(crate) fn log(&mut self, host: Host) -> String {
        self.role(host).text()
    }

    /// Returns the last term and whose it is.
    pub(crate) fn owner(&self) -> (u64, String) {
        self.latest_term().expect("a pair that has run owns a term")
    }

    /// Returns the last term and whose it is, if any was taken.
    pub(crate) fn latest_term(&self) -> Option<(u64, String)> {
        let witness = DirectoryWitness::open(self.folder.path().join("witness"), PAIR, "observer", None);
        let latest = witness.and_then(|witness| witness.latest());
        let latest = latest.expect("the witness can be read");
        latest.map(|(term, owner)| (term.0, owner))
    }

    pub(crate) fn image_bytes(&self, host: Host) -> Vec<u8> {
        fs::read(self.image(host)).expect("an image can be read")
    }

    fn kill_all(&mut self) {
        for role in &mut self.roles {
            // Ended already is as good.
            let _ = role.child.kill();
            let _ = role.child.wait();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let failed = panicking();
        self.kill_all();
        if failed {
            for role in &self.roles {
                eprintln!("--- {}, {:?}:\n{}", role.name, role.ended, last_lines(&role.text()));
            }
            return;
        }
        let end = Instant::now() + Duration::from_secs(10);
        while let Some(process) = leftover() {
            assert!(Instant::now() < end, "process {process} of a dead role is left behind");
            sleep(POLL);
        }
    }
}

impl Role {
    fn poll(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("a child can be waited for");
        }
        self.ended
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

/// Waits until there is something to be found.
pub(crate) fn await_fact<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < end, "waited for {what} in vain");
        sleep(POLL);
    }
}

/// Says loudly that a test does nothing, or fails if it must not.
/// Waits until nobody else has the machine.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn skip<T>(lack: &str) -> Option<T> {
    assert!(
        std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
        "TANDEM_REQUIRE_KVM is set, and this machine can't run the test: {lack}"
    );
    eprintln!("SKIPPED, nothing was tested: {lack}");
    None
}

/// Finds a process that still runs the program: a role, or a role's sentinel.
fn leftover() -> Option<i32> {
    let processes = fs::read_dir("/proc").ok()?;
    processes.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let running = fs::read_link(entry.path().join("exe")).ok()?;
        (running == program::path() && is_ours(&entry.path())).then_some(pid)
    })
}

/// Somebody may run a demo with the same program: theirs is not in one of our folders.
fn is_ours(process: &Path) -> bool {
    let read = || -> io::Result<bool> {
        let words = fs::read(process.join("cmdline"))?;
        let of_stage = words
            .split(|byte| *byte == 0)
            .any(|word| contains(word, b"tandem-pair-"));
        let status = fs::read_to_string(process.join("status"))?;
        let orphan = status.lines().any(|line| line.split_whitespace().eq(["PPid:", "1"]));
        Ok(of_stage || orphan)
    };
    read().unwrap_or(false)
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
    shown.iter().map(|line| format!("  | {line}\n")).collect()
}

/// Makes words of what may be a path.
pub(crate) fn word(text: impl AsRef<OsStr>) -> String {
    text.as_ref().to_string_lossy().into_owned()
}
