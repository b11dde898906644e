//! How the primary opens the link: control connection, agreement, data connection, page streams.
//!
//! ```text
//!   primary                                  secondary
//!     control: Hello ──────────────────────────►  judges
//!              ◄────────────────────────── Welcome (session), or Refuse
//!     judges
//!     data:    Attach(session) ────────────────►
//!     pages:   Attach(session, stream) ────────► each, as many as the Welcome says
//! ```
//!
//! Every step has a time limit. What fits and what does not is the caller's judgement.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use checkpoint::wire::{Attach, Hello, Message, Refusal, Welcome, WireError};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::connection::{CloseCause, tune};
use crate::peer::{Agreement, Connection, Established};

/// Longest wait for one step of the handshake.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no link to the secondary.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody there.
    #[error("can't reach the secondary at {addr}: is it running, and is --peer its address?")]
    Unreachable {
        /// Where.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody, but no answer.
    #[error("{addr} does not answer: is a tandem secondary running there?")]
    Silent {
        /// Where.
        addr: SocketAddr,
    },
    /// The connection ended during the handshake.
    #[error("the secondary at {addr} ended the connection; it may not be ready yet")]
    Ended {
        /// Where.
        addr: SocketAddr,
        /// How.
        #[source]
        source: CloseCause,
    },
    /// The secondary turned this side away.
    #[error("the secondary at {addr} refuses: {refusal}")]
    Refused {
        /// Where.
        addr: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// This side turned the secondary away.
    #[error("the secondary at {addr} does not fit: {refusal}")]
    Unfit {
        /// Where.
        addr: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// What answers is no tandem.
    #[error("what answers at {addr} is no tandem secondary: check --peer")]
    Alien {
        /// Where.
        addr: SocketAddr,
        /// What it sent.
        #[source]
        source: Option<WireError>,
    },
}

impl ConnectError {
    /// Tells whether trying again later may help without anybody changing a setting.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::Ended { .. } => true,
            Self::Refused { refusal, .. } => matches!(refusal, Refusal::Busy(_)),
            Self::Unfit { .. } | Self::Alien { .. } => false,
        }
    }
}

/// Opens the link to the secondary at `addr`.
///
/// # Errors
/// Fails if nobody answers in time, if either side turns the other away, or if the answer is no tandem's.
pub async fn connect(
    addr: SocketAddr,
    hello: Hello,
    judge: impl FnOnce(&Welcome) -> Result<(), Refusal>,
) -> Result<Established, ConnectError> {
    let mut control = open(addr).await?;
    say(&control, Message::Hello(hello.clone()), addr).await?;
    let welcome = match hear(&mut control, addr).await? {
        Message::Welcome(welcome) => welcome,
        Message::Refuse(refusal) => return Err(ConnectError::Refused { addr, refusal }),
        _ => return Err(ConnectError::Alien { addr, source: None }),
    };
    if let Err(refusal) = judge(&welcome) {
        say(&control, Message::Refuse(refusal.clone()), addr).await?;
        return Err(ConnectError::Unfit { addr, refusal });
    }
    let session = welcome.session;
    let data = attach(addr, Attach { session, stream: None }).await?;
    let mut streams = Vec::new();
    for stream in 0..welcome.streams as usize {
        let stream = Some(stream);
        streams.push(attach(addr, Attach { session, stream }).await?);
    }
    let agreement = Agreement {
        hello,
        welcome,
        peer: addr,
        early: Vec::new(),
        occupied: None,
    };
    Ok(Established::start(control, data, streams, agreement))
}

async fn attach(addr: SocketAddr, attach: Attach) -> Result<Connection, ConnectError> {
    let connection = open(addr).await?;
    say(&connection, Message::Attach(attach), addr).await?;
    Ok(connection)
}

async fn open(addr: SocketAddr) -> Result<Connection, ConnectError> {
    let stream = timeout(STEP_LIMIT, TcpStream::connect(addr)).await;
    let stream = stream.map_err(|_| ConnectError::Silent { addr })?;
    let tuned = stream.and_then(|stream| tune(&stream).map(|()| stream));
    tuned
        .map(Connection::new)
        .map_err(|source| ConnectError::Unreachable { addr, source })
}

async fn say(connection: &Connection, message: Message, addr: SocketAddr) -> Result<(), ConnectError> {
    let said = timeout(STEP_LIMIT, connection.say(message)).await;
    said.map_err(|_| ConnectError::Silent { addr })?
        .map_err(|source| ConnectError::Ended { addr, source })
}

async fn hear(connection: &mut Connection, addr: SocketAddr) -> Result<Message, ConnectError> {
    let heard = timeout(STEP_LIMIT, connection.incoming.next()).await;
    match heard.map_err(|_| ConnectError::Silent { addr })? {
        Ok((message, _)) => Ok(message),
        Err(CloseCause::Garbage(error @ WireError::Version { .. })) => Err(ConnectError::Refused {
            addr,
            refusal: error.refusal(),
        }),
        Err(CloseCause::Garbage(error)) => Err(ConnectError::Alien {
            addr,
            source: Some(error),
        }),
        Err(source) => Err(ConnectError::Ended { addr, source }),
    }
}
