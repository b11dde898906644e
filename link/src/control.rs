//! The Unix socket by which an operator talks to a running role.
//!
//! One connection carries one request and one reply, each one line of JSON:
//!
//! ```text
//!   {"command":"status"}                                    {"ok":{"pair":"shop", …}}
//!   {"command":"checkpoint"}                          ──►   {"ok":"checkpoint 12 committed"}
//!   {"command":"history"}                                   {"ok":[{"epoch":12, …}, …]}
//!   {"command":"flows","most":20}                           {"ok":{"protection":"lockstep: …", …}}
//!   {"command":"takeover","old_primary_is_off":true}        {"error":"the pair is protected: …"}
//!   {"command":"stop"}
//! ```
//!
//! Behind the reply to `{"command":"capture"}` follows a capture in pcapng, until the client closes its half of the connection.
//!
//! [`Server`] reads, bounds and parses; what a command means is decided by the role's loop, which gets
//! it as a [`ControlRequest`]. The socket belongs to the user who runs the role and to no one else.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::capture::Capture;
use crate::flows::Flows;
use crate::status::{CheckpointTrace, Status};

/// Longest request, in bytes.
const REQUEST_BYTES_MAX: usize = 4 * 1024;
/// Longest reply that a client reads, in bytes.
const REPLY_BYTES_MAX: u64 = 1024 * 1024;
/// Connections served at a time; more wait.
const CONNECTIONS_MAX: usize = 8;
/// A client must have sent its request, and taken its reply, within this.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// The role's loop must have replied within this.
const REPLY_LIMIT: Duration = Duration::from_secs(60);
/// After a failure to accept a connection (no file descriptor left), the next try waits this long.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What an operator may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub enum Command {
    /// How are you?
    Status,
    /// Take a checkpoint now and tell when it is committed.
    Checkpoint,
    /// What did the last checkpoints cost?
    History,
    /// Which of the VM's traffic is protected, and how?
    Flows {
        /// Flows to be listed, at most.
        most: u32,
    },
    /// What do both guests send, what is let out, and why? From now on.
    Capture,
    /// Go on without the primary.
    Takeover {
        /// The operator has made sure that the old primary does not run.
        old_primary_is_off: bool,
    },
    /// End in order.
    Stop,
}

/// The good news that a command may bring.
#[derive(Debug)]
pub enum Answer {
    /// To `status`.
    Status(Box<Status>),
    /// To `history`: the oldest first.
    History(Vec<CheckpointTrace>),
    /// To `flows`.
    Flows(Box<Flows>),
    /// To `capture`: where it comes from.
    Capture(Capture),
    /// To the others: what was done.
    Done(String),
}

/// A command on its way to the role's loop.
#[derive(Debug)]
pub struct ControlRequest {
    /// What is asked.
    pub command: Command,
    /// Where the answer goes, or the reason why there is none. Dropped without an answer, the client is told so.
    pub reply: oneshot::Sender<Result<Answer, String>>,
}

/// Why a control socket can't be served or asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The role answered with a refusal.
    #[error("{0}")]
    Refused(String),
    /// A live process serves the path.
    #[error("another role already serves {}: stop it first, or give this one another --control path", .0.display())]
    InUse(PathBuf),
    /// There is something else at the path.
    #[error("{} exists and is no socket: move it away, or give another --control path", .0.display())]
    NotASocket(PathBuf),
    /// The socket can't be made.
    #[error("can't make the control socket {}: check that its directory exists and is writable", path.display())]
    Create {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No socket at the path, or nobody behind it.
    #[error("no role answers at {}: is it running, and with this --control path?", .0.display())]
    NotRunning(PathBuf),
    /// The socket belongs to another user.
    #[error("no permission to use {}: run as the user that runs the role (often root)", .0.display())]
    Permission(PathBuf),
    /// The connection broke or took too long.
    #[error("the role at {} did not answer: it may be ending, or too busy; try again", path.display())]
    Unanswered {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The reply is not what this build understands.
    #[error("the role at {} answered something unknown: run the same tandem release as the role", .0.display())]
    Reply(PathBuf),
}

/// The socket of one role. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    inode: (u64, u64),
    task: JoinHandle<()>,
}

impl Server {
    /// Makes the socket at `path` and serves it. Must be called within the runtime.
    ///
    /// A socket that a dead process left behind is replaced.
    ///
    /// # Errors
    /// Fails if a live process serves the path, if something else lies there, or if it can't be made.
    pub fn start(path: &Path) -> Result<(Self, mpsc::Receiver<ControlRequest>), ControlError> {
        let listener = bind_at(path)?;
        let create = |source| ControlError::Create {
            path: path.to_owned(),
            source,
        };
        let metadata = path.symlink_metadata().map_err(create)?;
        let listener = UnixListener::from_std(listener).map_err(create)?;
        let (requests, receiver) = mpsc::channel(CONNECTIONS_MAX);
        let task = tokio::spawn(serve(listener, requests));
        Ok((
            Self {
                path: path.to_owned(),
                inode: (metadata.dev(), metadata.ino()),
                task,
            },
            receiver,
        ))
    }

    /// Returns where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|found| (found.dev(), found.ino()) == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Asks the role that serves `path`, and returns what it says under `ok`. Blocks, at most a little over a minute.
///
/// # Errors
/// Fails if nobody serves the path, if this user may not, if no answer comes, or if the role refuses.
pub fn ask(path: &Path, command: &Command) -> Result<Value, ControlError> {
    let stream = StdStream::connect(path).map_err(|error| unreachable_at(path, error))?;
    let line = exchange(&stream, command).map_err(|source| ControlError::Unanswered {
        path: path.to_owned(),
        source,
    })?;
    judge(path, &line)
}

/// Asks the primary that serves `path` for a capture, and returns the connection on which it comes as pcapng. Closing the sending half asks
/// for its end.
///
/// # Errors
/// As [`ask`]; and if the role is no primary.
pub async fn capture(path: &Path) -> Result<UnixStream, ControlError> {
    let mut stream = UnixStream::connect(path)
        .await
        .map_err(|error| unreachable_at(path, error))?;
    let exchange = async {
        let mut request = serde_json::to_vec(&Command::Capture)?;
        request.push(b'\n');
        stream.write_all(&request).await?;
        let mut line = Vec::new();
        // Nothing of what follows may be read with it.
        while line.last() != Some(&b'\n') && line.len() < REQUEST_BYTES_MAX {
            line.push(stream.read_u8().await?);
        }
        io::Result::Ok(line)
    };
    let unanswered = |source| ControlError::Unanswered {
        path: path.to_owned(),
        source,
    };
    let line = timeout(REPLY_LIMIT + CLIENT_LIMIT, exchange).await;
    let line = line.map_err(|late| unanswered(late.into()))?.map_err(unanswered)?;
    judge(path, &line)?;
    Ok(stream)
}

fn unreachable_at(path: &Path, error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NotRunning(path.to_owned()),
        io::ErrorKind::PermissionDenied => ControlError::Permission(path.to_owned()),
        _ => ControlError::Unanswered {
            path: path.to_owned(),
            source: error,
        },
    }
}

/// Returns what a reply says under `ok`.
fn judge(path: &Path, line: &[u8]) -> Result<Value, ControlError> {
    let mut reply: Value = serde_json::from_slice(line).map_err(|_| ControlError::Reply(path.to_owned()))?;
    if let Some(error) = reply.get("error").and_then(Value::as_str) {
        return Err(ControlError::Refused(error.to_owned()));
    }
    reply
        .get_mut("ok")
        .map(Value::take)
        .ok_or_else(|| ControlError::Reply(path.to_owned()))
}

/// Asks the role that serves `path` how it is.
///
/// # Errors
/// As [`ask`]; and if the report is not one that this build understands.
pub fn ask_status(path: &Path) -> Result<Status, ControlError> {
    serde_json::from_value(ask(path, &Command::Status)?).map_err(|_| ControlError::Reply(path.to_owned()))
}

/// Asks the primary that serves `path` what the last checkpoints cost; the oldest first.
///
/// # Errors
/// As [`ask_status`]; and if the role is no primary.
pub fn ask_history(path: &Path) -> Result<Vec<CheckpointTrace>, ControlError> {
    serde_json::from_value(ask(path, &Command::History)?).map_err(|_| ControlError::Reply(path.to_owned()))
}

/// Asks the primary that serves `path` what it knows of the VM's traffic, with at most `most` flows.
///
/// # Errors
/// As [`ask_status`]; and if the role is no primary.
pub fn ask_flows(path: &Path, most: u32) -> Result<Flows, ControlError> {
    serde_json::from_value(ask(path, &Command::Flows { most })?).map_err(|_| ControlError::Reply(path.to_owned()))
}

fn exchange(mut stream: &StdStream, command: &Command) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + REPLY_LIMIT + CLIENT_LIMIT;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let mut request = serde_json::to_vec(command)?;
    request.push(b'\n');
    stream.write_all(&request)?;
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    while line.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || line.len() as u64 > REPLY_BYTES_MAX {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => line.extend_from_slice(&piece[..count]),
        }
    }
    Ok(line)
}

/// Makes the socket, reachable for its owner only and from the moment it accepts connections only.
fn bind_at(path: &Path) -> Result<StdListener, ControlError> {
    let create = |source: io::Error| ControlError::Create {
        path: path.to_owned(),
        source,
    };
    // Two roles that start at once must not take each other's fresh socket for a stale one.
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let directory = File::open(directory).map_err(create)?;
    flock(&directory, FlockOperation::LockExclusive).map_err(|error| create(error.into()))?;
    remove_stale(path)?;
    let socket = || -> io::Result<StdListener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A socket's file is made with the mode of the socket; nobody can connect before `listen`.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
        listen(&socket, 16)?;
        Ok(StdListener::from(socket))
    };
    socket().map_err(create)
}

fn remove_stale(path: &Path) -> Result<(), ControlError> {
    let create = |source: io::Error| ControlError::Create {
        path: path.to_owned(),
        source,
    };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(create(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ControlError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match StdStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(create),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(ControlError::Permission(path.to_owned())),
        // Connected, or its queue is full: somebody lives there.
        _ => Err(ControlError::InUse(path.to_owned())),
    }
}

async fn serve(listener: UnixListener, requests: mpsc::Sender<ControlRequest>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let requests = requests.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_one(stream, &requests).await {
                        tracing::debug!(%error, "a client of the control socket went away");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection on the control socket");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve_one(mut stream: UnixStream, requests: &mpsc::Sender<ControlRequest>) -> io::Result<()> {
    let line = timeout(CLIENT_LIMIT, read_line(&mut stream)).await??;
    let reply = match line {
        None => json!({ "error": format!("the request is longer than {REQUEST_BYTES_MAX} bytes") }),
        Some(line) => match serde_json::from_slice::<Command>(&line) {
            Err(error) => json!({ "error": format!("not a request that this release knows: {error}") }),
            Ok(command) => match forward(command, requests).await {
                Ok(Answer::Status(status)) => json!({ "ok": status }),
                Ok(Answer::History(traces)) => json!({ "ok": traces }),
                Ok(Answer::Flows(flows)) => json!({ "ok": flows }),
                Ok(Answer::Capture(capture)) => {
                    timeout(CLIENT_LIMIT, stream.write_all(b"{\"ok\":\"capturing\"}\n")).await??;
                    capture.write_to(&mut stream).await?;
                    return stream.shutdown().await;
                }
                Ok(Answer::Done(text)) => json!({ "ok": text }),
                Err(reason) => json!({ "error": reason }),
            },
        },
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    timeout(CLIENT_LIMIT, stream.write_all(&bytes)).await??;
    stream.shutdown().await
}

/// Reads one line; `None` if it is too long.
async fn read_line(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut bounded = BufReader::new(stream).take(REQUEST_BYTES_MAX as u64);
    bounded.read_until(b'\n', &mut line).await?;
    if line.last() == Some(&b'\n') {
        return Ok(Some(line));
    }
    if line.len() == REQUEST_BYTES_MAX {
        Ok(None)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

async fn forward(command: Command, requests: &mpsc::Sender<ControlRequest>) -> Result<Answer, String> {
    let ending = || "the role is ending".to_owned();
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        requests
            .send(ControlRequest { command, reply })
            .await
            .map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?
    };
    let late = |_| format!("the role did not answer within {} seconds", REPLY_LIMIT.as_secs());
    timeout(REPLY_LIMIT, exchange).await.map_err(late)?
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    async fn asked(path: &Path, command: Command) -> Result<Value, ControlError> {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || ask(&path, &command)).await.unwrap()
    }

    async fn raw(path: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut reply = String::new();
        let _ = stream.read_to_string(&mut reply).await;
        reply
    }

    fn answer_all(mut requests: mpsc::Receiver<ControlRequest>) {
        tokio::spawn(async move {
            let mut captures = crate::capture::Captures::new(1);
            while let Some(request) = requests.recv().await {
                let answer = match request.command {
                    Command::Status => Ok(Answer::Status(Box::new(Status {
                        pid: 7,
                        ..Status::default()
                    }))),
                    Command::Takeover {
                        old_primary_is_off: true,
                    } => Ok(Answer::Done("took over".into())),
                    Command::Takeover { .. } => Err("is the old primary off?".into()),
                    Command::History => Ok(Answer::History(vec![CheckpointTrace {
                        epoch: 3,
                        ..CheckpointTrace::default()
                    }])),
                    Command::Flows { most } => Ok(Answer::Flows(Box::new(Flows {
                        left_out: most.into(),
                        ..Flows::default()
                    }))),
                    Command::Capture => captures.begin().map(Answer::Capture),
                    Command::Checkpoint | Command::Stop => continue,
                };
                let _ = request.reply.send(answer);
            }
        });
    }

    #[tokio::test]
    async fn a_capture_follows_its_reply_until_the_client_closes_its_half() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("role.sock");
        let (_server, requests) = Server::start(&path).unwrap();
        answer_all(requests);
        let mut stream = capture(&path).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes[..4], 0x0a0d_0d0a_u32.to_le_bytes());
        assert!(String::from_utf8_lossy(&bytes).contains("the capture was ended"));
        let nobody = capture(&directory.path().join("other.sock")).await.unwrap_err();
        assert!(matches!(nobody, ControlError::NotRunning(_)));
    }

    #[tokio::test]
    async fn requests_reach_the_loop_and_answers_the_client() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("role.sock");
        let (server, requests) = Server::start(&path).unwrap();
        assert_eq!(server.path().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        answer_all(requests);
        let status = tokio::task::spawn_blocking({
            let path = path.clone();
            move || ask_status(&path)
        });
        assert_eq!(status.await.unwrap().unwrap().pid, 7);
        let history = tokio::task::spawn_blocking({
            let path = path.clone();
            move || ask_history(&path)
        });
        assert_eq!(history.await.unwrap().unwrap()[0].epoch, 3);
        let done = asked(
            &path,
            Command::Takeover {
                old_primary_is_off: true,
            },
        )
        .await
        .unwrap();
        assert_eq!(done, "took over");
        let refused = asked(
            &path,
            Command::Takeover {
                old_primary_is_off: false,
            },
        )
        .await
        .unwrap_err();
        assert_eq!(refused.to_string(), "is the old primary off?");
        let ending = asked(&path, Command::Stop).await.unwrap_err();
        assert_eq!(ending.to_string(), "the role is ending");
        assert_eq!(
            raw(&path, b"{\"command\":\"takeover\",\"old_primary_is_off\":true}\n").await,
            "{\"ok\":\"took over\"}\n"
        );
    }

    #[tokio::test]
    async fn hostile_requests_are_told_so_and_harm_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("role.sock");
        let (_server, requests) = Server::start(&path).unwrap();
        answer_all(requests);
        let hostile: [&[u8]; 7] = [
            b"\n",
            b"{}\n",
            b"{\"command\":\"format\"}\n",
            b"{\"command\":\"takeover\"}\n",
            b"{\"command\":\"takeover\",\"old_primary_is_off\":\"yes\"}\n",
            b"\xff\xfe\n",
            &[b'['; 2 * REQUEST_BYTES_MAX],
        ];
        for request in hostile {
            let reply = raw(&path, request).await;
            assert!(reply.starts_with("{\"error\":"), "{reply:?}");
        }
        let silent = UnixStream::connect(&path).await.unwrap();
        let gone = UnixStream::connect(&path).await.unwrap();
        drop(gone);
        assert!(asked(&path, Command::Status).await.is_ok());
        drop(silent);
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("role.sock");
        drop(StdListener::bind(&path).unwrap());
        assert!(matches!(ask(&path, &Command::Status), Err(ControlError::NotRunning(_))));
        let (server, _requests) = Server::start(&path).unwrap();
        assert!(matches!(Server::start(&path), Err(ControlError::InUse(_))));
        drop(server);
        assert!(!path.exists());
        assert!(matches!(ask(&path, &Command::Status), Err(ControlError::NotRunning(_))));
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(Server::start(&path), Err(ControlError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        let nowhere = directory.path().join("missing").join("role.sock");
        assert!(matches!(Server::start(&nowhere), Err(ControlError::Create { .. })));
    }

    #[tokio::test]
    async fn a_socket_that_a_successor_made_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("role.sock");
        let (first, _requests) = Server::start(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (second, _more) = Server::start(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }
}
