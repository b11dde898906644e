//! Starts that must fail, or must not lead to a pair: each says what is wrong and what to do, and leaves nothing.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use link::status::State;
use storage::Record;
use tandem::lab::Host;

use crate::stage::{PORT, Setup, Stage, await_fact, word};

const FAILED: i32 = 1;
const MISUSED: i32 = 2;

type Change = dyn Fn(&Stage, &mut Vec<String>);

/// A start, as the right words with something changed; how it ends; and what it must tell.
struct Wrong {
    what: &'static str,
    role: &'static str,
    change: Box<Change>,
    code: i32,
    told: &'static [&'static str],
}

fn wrong(
    what: &'static str,
    role: &'static str,
    code: i32,
    told: &'static [&'static str],
    change: impl Fn(&Stage, &mut Vec<String>) + 'static,
) -> Wrong {
    Wrong {
        what,
        role,
        change: Box::new(change),
        code,
        told,
    }
}

fn set(words: &mut Vec<String>, option: &str, value: impl Into<String>) {
    let value = value.into();
    match words.iter().position(|word| word == option) {
        Some(at) => words[at + 1] = value,
        None => words.extend([option.to_owned(), value]),
    }
}

fn unset(words: &mut Vec<String>, option: &str) {
    let at = words
        .iter()
        .position(|word| word == option)
        .expect("the option is there");
    words.drain(at..at + 2);
}

fn file(stage: &Stage, name: &str, text: &str) -> String {
    let path = stage.folder().join(name);
    fs::write(&path, text).expect("a file can be written");
    word(path)
}

fn wrong_starts() -> Vec<Wrong> {
    vec![
        wrong(
            "no such TAP",
            "primary",
            FAILED,
            &["TAP device nosuch does not exist", "ip tuntap add dev nosuch"],
            |_, words| set(words, "--tap", "nosuch"),
        ),
        wrong(
            "no TAP",
            "primary",
            FAILED,
            &["uplink exists, but is no TAP device"],
            |_, words| {
                set(words, "--tap", "uplink");
            },
        ),
        wrong(
            "no image",
            "secondary",
            FAILED,
            &["there is no disk image", "truncate -s"],
            |_, words| set(words, "--image", "/nowhere/disk.img"),
        ),
        wrong(
            "an empty image",
            "primary",
            FAILED,
            &["is empty", "truncate -s"],
            |stage, words| {
                set(words, "--image", file(stage, "empty.img", ""));
            },
        ),
        wrong(
            "an odd image",
            "primary",
            FAILED,
            &["not a multiple of 512", "qemu-img convert"],
            |stage, words| {
                set(words, "--image", file(stage, "odd.img", "some text"));
            },
        ),
        wrong(
            "a damaged record",
            "primary",
            FAILED,
            &["is damaged", "delete the file"],
            |stage, words| {
                let image = file(stage, "other.img", &" ".repeat(1 << 20));
                fs::write(Record::path_for(image.as_ref()), "no record").expect("a file can be written");
                set(words, "--image", image);
            },
        ),
        wrong(
            "no witness directory",
            "secondary",
            FAILED,
            &["the witness directory /nowhere/w does not exist", "mount the share"],
            |_, words| set(words, "--witness", "dir:/nowhere/w"),
        ),
        wrong(
            "a foreign address",
            "secondary",
            FAILED,
            &["no address 10.99.0.77", "--listen"],
            |_, words| {
                set(words, "--listen", format!("10.99.0.77:{PORT}"));
            },
        ),
        wrong(
            "no folder for the socket",
            "primary",
            FAILED,
            &["can't make the control socket"],
            |_, words| {
                set(words, "--control", "/nowhere/a.sock");
            },
        ),
        wrong(
            "an unknown option",
            "primary",
            MISUSED,
            &["--takeover-limt", "--takeover-limit"],
            |_, words| {
                words.extend(["--takeover-limt".to_owned(), "1s".to_owned()]);
            },
        ),
        wrong(
            "an unknown key",
            "primary",
            MISUSED,
            &["unknown key 'memroy'", "did you mean 'memory'?"],
            |stage, words| {
                set(
                    words,
                    "--config",
                    file(stage, "pair.toml", "tap = \"tap0\"\nmemroy = \"64M\"\n"),
                );
            },
        ),
        wrong(
            "no TOML",
            "primary",
            MISUSED,
            &["pair.toml is no valid TOML"],
            |stage, words| {
                set(words, "--config", file(stage, "pair.toml", "tap = \n"));
            },
        ),
        wrong(
            "no such file",
            "primary",
            MISUSED,
            &["can't read the configuration file", "--config"],
            |_, words| {
                set(words, "--config", "/nowhere/pair.toml");
            },
        ),
        wrong(
            "no name of the pair",
            "primary",
            MISUSED,
            &["--pair is missing"],
            |_, words| unset(words, "--pair"),
        ),
        wrong(
            "odd memory",
            "primary",
            MISUSED,
            &["--memory 65M", "take 66M"],
            |_, words| {
                set(words, "--memory", "65M");
            },
        ),
        wrong("no size", "primary", MISUSED, &["'lots' is no size"], |_, words| {
            set(words, "--memory", "lots")
        }),
        wrong(
            "a short limit",
            "primary",
            MISUSED,
            &["--takeover-limit 1ms: must be from"],
            |_, words| {
                set(words, "--takeover-limit", "1ms");
            },
        ),
        wrong(
            "a guest's setting",
            "primary",
            MISUSED,
            &["unknown setting 'ipp'"],
            |_, words| {
                set(words, "--cmdline", "ipp=10.0.0.1/24");
            },
        ),
        wrong(
            "another witness",
            "primary",
            MISUSED,
            &["'etcd:x' is no witness"],
            |_, words| {
                set(words, "--witness", "etcd:x");
            },
        ),
        wrong(
            "a group's address",
            "primary",
            MISUSED,
            &["can't be the address of one device"],
            |_, words| {
                set(words, "--mac", "01:00:5e:00:00:01");
            },
        ),
        wrong(
            "nobody to follow",
            "secondary",
            FAILED,
            &["a secondary needs --listen"],
            |_, words| {
                unset(words, "--listen");
            },
        ),
    ]
}

#[test]
fn a_wrong_start_says_why_and_leaves_nothing() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    for case in wrong_starts() {
        let mut words = stage.words(Host::A, case.role);
        (case.change)(&stage, &mut words);
        assert_fails(&mut stage, case.what, words, case.code, case.told);
        assert_nothing_left(&stage, case.what);
    }
}

/// What another process holds can't be had.
#[test]
fn what_is_taken_is_told() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    let taken = stage
        .lab
        .host(Host::B)
        .run(|| TcpListener::bind(Stage::listen_address(Host::B)));
    let taken = taken.expect("the port is free");
    let words = stage.words(Host::B, "secondary");
    let (status, told) = stage.run(Host::B, words);
    assert_eq!(status.code(), Some(FAILED), "{told}");
    assert!(told.contains("another program listens on 10.99.0.2:7100"), "{told}");
    drop(taken);

    stage.pair(Host::A);
    let term = stage.owner();
    let second = stage.folder().join("second.img");
    fs::copy(stage.image(Host::B), &second).expect("an image can be copied");
    let elsewhere = word(stage.folder().join("second.sock"));
    let locked = &["in use by process", "stop that process first"];
    let busy = &["the TAP device tap0 is in use by another process"];
    for (what, image, told) in [
        ("a locked image", stage.image(Host::A), locked as &[_]),
        ("a busy TAP", second, busy),
    ] {
        let mut words = stage.words(Host::A, "run");
        set(&mut words, "--image", word(&image));
        set(&mut words, "--control", &elsewhere);
        assert_fails(&mut stage, what, words, FAILED, told);
    }
    assert!(
        !PathBuf::from(elsewhere).exists(),
        "a socket of a role that did not start"
    );
    stage.await_protected();
    assert_eq!(stage.owner(), term);
}

/// What a peer has otherwise is told by both sides; neither is paired, and the right one is, afterwards.
#[test]
fn case_32_44_a_peer_that_does_not_fit_is_refused_with_both_values() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    let large = stage.folder().join("large.img");
    let image = fs::File::create(&large).expect("an image can be made");
    image.set_len(80 << 20).expect("an image can be made");
    stage.start(Host::A, "primary");
    stage.await_state(Host::A, State::Alone);
    type Unfit = Box<dyn Fn(&mut Vec<String>)>;
    let unfit: [(&[&str], Unfit); 7] = [
        (
            &["67108864", "83886080"],
            Box::new(move |words| set(words, "--image", word(&large))),
        ),
        (
            &["67108864", "134217728"],
            Box::new(|words| set(words, "--memory", "128M")),
        ),
        (
            &["02:00:00:00:00:01"],
            Box::new(|words| set(words, "--mac", "02:00:00:00:00:01")),
        ),
        (&["'test'", "'shop'"], Box::new(|words| set(words, "--pair", "shop"))),
        (
            &["both hosts are called 'host-a'", "--name"],
            Box::new(|words| set(words, "--name", "host-a")),
        ),
        (
            &["takeover limit", "300 ms", "700 ms"],
            Box::new(|words| set(words, "--takeover-limit", "700ms")),
        ),
        (&["witness", "one", "none"], Box::new(|words| unset(words, "--witness"))),
    ];
    for (told, change) in unfit {
        let mut words = stage.words(Host::B, "secondary");
        change(&mut words);
        stage.start_with(Host::B, words);
        for host in [Host::A, Host::B] {
            await_fact(&format!("{told:?} in the log of {}", host.name()), || {
                let log = stage.log(host);
                let tells = |line: &str| told.iter().all(|part| line.contains(part));
                log.lines().any(tells).then_some(())
            });
        }
        let status = stage.status(Host::B).expect("it waits for a primary that fits");
        assert_eq!(status.state, State::Starting);
        stage.terminate(Host::B);
        assert_eq!(stage.await_end(Host::B).code(), Some(0));
        assert!(
            !Record::path_for(&stage.image(Host::B)).exists(),
            "a record of a pair that never was"
        );
    }
    stage.start(Host::B, "secondary");
    stage.await_protected();
}

/// A waiting secondary answers its operator while a primary's handshake is under way, and keeps both.
#[test]
fn questions_during_a_handshake_do_not_end_it() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.start(Host::B, "secondary");
    stage.await_state(Host::B, State::Starting);
    stage.start(Host::A, "primary");
    for _ in 0..300 {
        stage.status(Host::B).expect("it answers");
    }
    stage.await_protected();
    assert!(
        !stage.log(Host::B).contains("without a session"),
        "a handshake was given up"
    );
}

/// A primary that finds a secondary which does not fit starts nothing.
#[test]
fn a_start_against_an_unfit_secondary_fails() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.start(Host::B, "secondary");
    stage.await_state(Host::B, State::Starting);
    let mut words = stage.words(Host::A, "primary");
    set(&mut words, "--memory", "128M");
    let told = &["134217728", "67108864"];
    assert_fails(&mut stage, "another memory size", words, FAILED, told);
    assert!(
        !Record::path_for(&stage.image(Host::A)).exists(),
        "a record of a start that failed"
    );
    stage.start(Host::A, "primary");
    stage.await_protected();
}

#[test]
fn a_host_that_can_not_run_a_vm_says_why() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    let hidden = "mount -t tmpfs none /dev && exec \"$0\" \"$@\"";
    let replaced = "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\"";
    let cases: [(&str, &[&str]); 2] = [
        (hidden, &["there is no /dev/kvm", "load the module"]),
        (replaced, &["/dev/kvm"]),
    ];
    for (script, expected) in cases {
        for role in ["primary", "secondary", "run"] {
            let words = stage.words(Host::A, role);
            let (status, told) = stage.run_within(Host::A, &["unshare", "--mount", "sh", "-c", script], words);
            assert_eq!(status.code(), Some(FAILED), "{role}, {script}: {told}");
            assert!(
                expected.iter().all(|part| told.contains(part)),
                "{role}, {script}: {told}"
            );
            assert_nothing_left(&stage, script);
        }
    }
}

#[test]
fn a_role_without_the_right_to_a_tap_says_so() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    // A TAP without an owner is anybody's.
    let made = stage.lab.host(Host::A).run(|| {
        let ip = |words: &str| Command::new("ip").args(words.split(' ')).status();
        ip("tuntap add dev owned mode tap user 65534").and_then(|_| ip("link set owned up"))
    });
    assert!(made.expect("iproute2 is installed").success(), "a TAP can be made");
    let mut words = stage.words(Host::A, "primary");
    set(&mut words, "--tap", "owned");
    let wrapper = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"];
    let (status, told) = stage.run_within(Host::A, &wrapper, words);
    assert_eq!(status.code(), Some(FAILED), "{told}");
    for part in ["not permitted to use the TAP device owned", "CAP_NET_ADMIN"] {
        assert!(told.contains(part), "'{part}' is not in: {told}");
    }
    assert_nothing_left(&stage, "no right");
}

fn assert_fails(stage: &mut Stage, what: &str, words: Vec<String>, code: i32, expected: &[&str]) {
    let (status, told) = stage.run(Host::A, words);
    assert_eq!(status.code(), Some(code), "{what}: {told}");
    for part in expected {
        assert!(told.contains(part), "{what}: '{part}' is not in: {told}");
    }
}

/// No socket, no record, no term: a later right start begins from nothing.
fn assert_nothing_left(stage: &Stage, what: &str) {
    assert!(!stage.control(Host::A).exists(), "{what}: the socket is left");
    assert!(
        !Record::path_for(&stage.image(Host::A)).exists(),
        "{what}: a record is left"
    );
    assert!(
        !Record::journal_for(&stage.image(Host::A)).exists(),
        "{what}: a journal is left"
    );
    assert_eq!(stage.latest_term(), None, "{what}: a term was taken");
}
