//! How the secondary takes the primary's link.
//!
//! A task of its own accepts connections for as long as the [`Listener`] lives, bounds how many may be
//! half open and for how long, and turns away what is no tandem, of another version, or a second primary.
//! [`Listener::accept`] gets what is left and makes a link of it.
//!
//! What fits and what does not is the caller's judgement. A stranger's connection, whatever it sends or
//! does not send, changes nothing for the link that stands.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use checkpoint::Instant;
use checkpoint::wire::{Attach, Hello, Message, Refusal, Session, Welcome};
use rustix::net::{Shutdown, shutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

use crate::connect::STEP_LIMIT;
use crate::connection::{CloseCause, tune};
use crate::peer::{Agreement, Connection, Established};
use crate::{clock, entropy};

/// Connections that have not said who they are yet. One more ends the oldest.
const HALF_OPEN_MAX: usize = 64;
/// Connections that have said who they are and wait for [`Listener::accept`].
const OPENINGS_MAX: usize = 4;
/// Control messages that may come before the other connections stand.
const EARLY_MAX: usize = 64;
/// After a failure to accept a connection (no file descriptor left), the next try waits this long.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// A peer that is turned away has this long to read why.
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);

/// Why a secondary can't wait for its primary.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The port is taken.
    #[error("another program listens on {addr} already: stop it, or choose another --listen address")]
    InUse {
        /// Where.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// This host has no such address.
    #[error("this host has no address {}: choose one of its own with --listen, or 0.0.0.0 for all", addr.ip())]
    NoSuchAddress {
        /// Where.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("can't listen on {addr}")]
    Other {
        /// Where.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Waits for primaries. Dropping it ends the waiting, not the link.
#[derive(Debug)]
pub struct Listener {
    local: SocketAddr,
    openings: mpsc::Receiver<Opening>,
    occupancy: Arc<Occupancy>,
    task: JoinHandle<()>,
}

/// The place of the one primary is taken for as long as this lives.
#[derive(Debug)]
pub(crate) struct Occupied(Arc<Occupancy>);

/// The node that is followed, if one is.
#[derive(Debug, Default)]
struct Occupancy(Mutex<Option<String>>);

/// A connection that has said what it is.
#[derive(Debug)]
struct Opening {
    connection: Connection,
    from: SocketAddr,
    at: Instant,
    first: First,
}

#[derive(Debug)]
enum First {
    Hello(Box<Hello>),
    Attach(Attach),
}

impl Listener {
    /// Listens on `addr`. Must be called within the runtime.
    ///
    /// # Errors
    /// Fails if the port is taken or the address is not this host's.
    pub fn bind(addr: SocketAddr) -> Result<Self, ListenError> {
        let bound = || -> io::Result<TcpListener> {
            let listener = std::net::TcpListener::bind(addr)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let listener = bound().map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse { addr, source },
            io::ErrorKind::AddrNotAvailable => ListenError::NoSuchAddress { addr, source },
            _ => ListenError::Other { addr, source },
        })?;
        let local = listener
            .local_addr()
            .map_err(|source| ListenError::Other { addr, source })?;
        let occupancy = Arc::new(Occupancy::default());
        let (sender, openings) = mpsc::channel(OPENINGS_MAX);
        let task = tokio::spawn(listen(listener, Arc::clone(&occupancy), sender));
        Ok(Self {
            local,
            openings,
            occupancy,
            task,
        })
    }

    /// Returns the address that is listened on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Waits until a primary that `judge` welcomes has all its connections open.
    ///
    /// While the link lives, other primaries are told that this host is busy, until [`Link::close`] or its last
    /// handle is dropped. If the wait is given up, a handshake that is under way fails and leaves nothing behind.
    ///
    /// # Panics
    /// Panics if `judge` welcomes with another session than it was given.
    ///
    /// [`Link::close`]: crate::peer::Link::close
    pub async fn accept(&mut self, mut judge: impl FnMut(&Hello, Session) -> Result<Welcome, Refusal>) -> Established {
        loop {
            let Opening {
                connection,
                from,
                at,
                first,
            } = self.next_opening().await;
            let First::Hello(hello) = first else {
                tracing::warn!(%from, "a connection without a session");
                continue;
            };
            if clock::now().since(at) >= STEP_LIMIT.into() {
                continue;
            }
            let session = random_session();
            match judge(&hello, session) {
                Err(refusal) => {
                    tracing::warn!(%from, node = hello.node, %refusal, "turned a primary away");
                    tokio::spawn(refuse(connection, refusal));
                }
                Ok(welcome) => {
                    assert_eq!(
                        welcome.session, session,
                        "a welcome carries the session it was made for"
                    );
                    let Some(occupied) = Occupied::take(&self.occupancy, &hello.node) else {
                        let holder = self.occupancy.holder().unwrap_or_default();
                        tokio::spawn(refuse(connection, Refusal::Busy(holder)));
                        continue;
                    };
                    let agreement = Agreement {
                        hello: *hello,
                        welcome,
                        peer: from,
                        early: Vec::new(),
                        occupied: Some(occupied),
                    };
                    if let Some(established) = self.pair(connection, agreement).await {
                        return established;
                    }
                }
            }
        }
    }

    /// Welcomes the primary and waits for its other connections, in whatever order they come.
    async fn pair(&mut self, mut control: Connection, mut agreement: Agreement) -> Option<Established> {
        let from = agreement.peer;
        let welcome = agreement.welcome.clone();
        let node = agreement.hello.node.clone();
        // The data connection first, then the page streams.
        let mut places: Vec<Option<Connection>> = Vec::new();
        places.resize_with(1 + welcome.streams as usize, || None);
        let pairing = async {
            control
                .say(Message::Welcome(welcome.clone()))
                .await
                .map_err(|error| error.to_string())?;
            loop {
                tokio::select! {
                    heard = control.incoming.next() => match heard {
                        Ok((Message::Refuse(refusal), _)) => return Err(format!("it turned this host away: {refusal}")),
                        Ok(_) if agreement.early.len() == EARLY_MAX => return Err("it talks before its time".to_owned()),
                        Ok((message, _)) => agreement.early.push(message),
                        Err(cause) => return Err(cause.to_string()),
                    },
                    opening = self.next_opening() => match opening.first {
                        First::Attach(attach) => match place(&mut places, attach, welcome.session) {
                            Ok(place) => {
                                *place = Some(opening.connection);
                                if places.iter().all(Option::is_some) {
                                    return Ok(());
                                }
                            }
                            Err(why) => {
                                tracing::warn!(from = %opening.from, "turned a connection away: {why}");
                                let refusal = Refusal::Protocol(why.to_owned());
                                drop(tokio::spawn(refuse(opening.connection, refusal)));
                            }
                        },
                        First::Hello(_) => drop(tokio::spawn(refuse(opening.connection, Refusal::Busy(node.clone())))),
                    },
                }
            }
        };
        match timeout(STEP_LIMIT, pairing)
            .await
            .unwrap_or_else(|_| Err("it did not open its data connection and page streams".to_owned()))
        {
            Ok(()) => {
                let mut connections = places.into_iter().flatten();
                let data = connections.next().expect("all are there");
                Some(Established::start(control, data, connections.collect(), agreement))
            }
            Err(reason) => {
                tracing::warn!(%from, node, reason, "a primary did not complete its link");
                None
            }
        }
    }

    async fn next_opening(&mut self) -> Opening {
        self.openings
            .recv()
            .await
            .expect("the listening task lives as long as the listener")
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Occupancy {
    fn holder(&self) -> Option<String> {
        self.node().clone()
    }

    fn node(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Occupied {
    fn take(occupancy: &Arc<Occupancy>, node: &str) -> Option<Self> {
        let mut holder = occupancy.node();
        if holder.is_some() {
            return None;
        }
        *holder = Some(node.to_owned());
        Some(Self(Arc::clone(occupancy)))
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        *self.0.node() = None;
    }
}

async fn listen(listener: TcpListener, occupancy: Arc<Occupancy>, openings: mpsc::Sender<Opening>) {
    let mut half_open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                half_open.retain(|task| !task.is_finished());
                if half_open.len() == HALF_OPEN_MAX
                    && let Some(oldest) = half_open.pop_front()
                {
                    oldest.abort();
                }
                let receive = receive(stream, from, Arc::clone(&occupancy), openings.clone());
                half_open.push_back(tokio::spawn(receive).abort_handle());
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection from a peer");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Hears the first message of a connection and passes the connection on, or turns it away.
async fn receive(stream: TcpStream, from: SocketAddr, occupancy: Arc<Occupancy>, openings: mpsc::Sender<Opening>) {
    if tune(&stream).is_err() {
        return;
    }
    let mut connection = Connection::new(stream);
    let first = match timeout(STEP_LIMIT, connection.incoming.next()).await {
        Ok(Ok((Message::Hello(hello), _))) => match occupancy.holder() {
            Some(node) => return refuse(connection, Refusal::Busy(node)).await,
            None => First::Hello(Box::new(hello)),
        },
        Ok(Ok((Message::Attach(attach), _))) => First::Attach(attach),
        Ok(Ok(_)) => return refuse(connection, Refusal::Protocol("a message out of its place".to_owned())).await,
        Ok(Err(CloseCause::Garbage(error))) => {
            tracing::warn!(%from, %error, "turned a connection away");
            return refuse(connection, error.refusal()).await;
        }
        Ok(Err(cause)) => return tracing::debug!(%from, %cause, "a connection ended before it said what it is"),
        Err(_) => return tracing::debug!(%from, "a connection did not say what it is"),
    };
    // Given up, the connection is closed: nobody here follows a primary at the moment.
    let opening = Opening {
        connection,
        from,
        at: clock::now(),
        first,
    };
    let _ = timeout(STEP_LIMIT, openings.send(opening)).await;
}

/// Tells a peer why it is turned away.
async fn refuse(mut connection: Connection, refusal: Refusal) {
    let tell = async {
        if connection.say(Message::Refuse(refusal)).await.is_ok() {
            let _ = shutdown(connection.incoming.stream(), Shutdown::Write);
            // Closed at once, with bytes of the peer's unread, the connection would be reset and the reason lost.
            connection.incoming.discard().await;
        }
    };
    let _ = timeout(REFUSAL_LIMIT, tell).await;
}

/// Returns the place that a connection is to take, if it is free.
fn place(
    places: &mut [Option<Connection>],
    attach: Attach,
    session: Session,
) -> Result<&mut Option<Connection>, &'static str> {
    if attach.session != session {
        return Err("it belongs to another session");
    }
    let place = attach.stream.map_or(0, |stream| stream + 1);
    match places.get_mut(place) {
        None => Err("it is a page stream that was not agreed on"),
        Some(Some(_)) => Err("that connection is open already"),
        Some(place) => Ok(place),
    }
}

fn random_session() -> Session {
    let mut bytes = [0; 16];
    entropy::fill(&mut bytes);
    Session(u128::from_ne_bytes(bytes))
}
