//! A network namespace with a thread that carries out what is to happen there, and what is asked of its network.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};

use futures_util::TryStreamExt;
use machine::netns::unshare_network;
use rtnetlink::packet_route::link::BridgeStpState;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::LabError;

/// A network namespace with a thread in it.
#[derive(Debug)]
pub struct Namespace {
    name: &'static str,
    pub(super) fd: Arc<OwnedFd>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl Namespace {
    /// Makes an empty namespace and starts its thread.
    ///
    /// # Errors
    /// Fails without root.
    pub fn new(name: &'static str) -> Result<Self, LabError> {
        Self::with_thread(name, unshare_network)
    }

    /// Takes the namespace that this process is in, and starts a thread for it.
    ///
    /// # Errors
    /// Fails if the host has no thread left.
    pub fn here(name: &'static str) -> Result<Self, LabError> {
        Self::with_thread(name, || Ok(()))
    }

    fn with_thread(name: &'static str, enter: fn() -> io::Result<()>) -> Result<Self, LabError> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (made, result) = mpsc::channel();
        let thread = Builder::new()
            .name(format!("lab-{name}"))
            .spawn(move || {
                let opened = enter().and_then(|()| fs::File::open("/proc/thread-self/ns/net"));
                let ready = opened.is_ok();
                let told = made.send(opened.map(OwnedFd::from));
                if ready && told.is_ok() {
                    inbox.into_iter().for_each(|job| job());
                }
            })
            .map_err(LabError::Namespace)?;
        let fd = result
            .recv()
            .expect("the thread answers")
            .map_err(LabError::Namespace)?;
        Ok(Self {
            name,
            fd: Arc::new(fd),
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Runs a function on the namespace's thread and returns what it returns.
    ///
    /// # Panics
    /// Panics if the function panics.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            // The receiver below waits for it.
            let _ = done.send(job());
        });
        self.jobs
            .as_ref()
            .expect("set until dropped")
            .send(job)
            .expect("the namespace's thread runs");
        result.recv().expect("the job ran to its end")
    }

    /// Starts a process in the namespace. It is the child of the namespace's thread, which outlives it as
    /// long as the namespace is kept: the child may ask for a signal at its parent's death.
    ///
    /// # Errors
    /// Fails as [`Command::spawn`] does.
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        self.run(move || command.spawn())
    }

    /// Starts a thread of its own in the namespace: its sockets belong there.
    ///
    /// # Errors
    /// Fails if the host has no thread left.
    ///
    /// # Panics
    /// The new thread panics if it can't enter the namespace, which it may whenever the lab could be made.
    pub fn thread<T: Send + 'static>(
        &self,
        name: &str,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let fd = Arc::clone(&self.fd);
        Builder::new().name(name.to_owned()).spawn(move || {
            move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network)).expect("may enter the namespace");
            drop(fd);
            body()
        })
    }

    /// Carries out netlink requests in the namespace.
    ///
    /// # Errors
    /// Fails with the first of them that fails.
    pub fn netlink<T: Send + 'static>(
        &self,
        requests: impl AsyncFnOnce(&Netlink) -> Result<T, LabError> + Send + 'static,
    ) -> Result<T, LabError> {
        let place = self.name;
        self.run(move || {
            let unusable = |source| LabError::Host {
                what: "use netlink".into(),
                place,
                source,
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(unusable)?;
            runtime.block_on(async move {
                let (connection, handle, _) = rtnetlink::new_connection().map_err(unusable)?;
                tokio::spawn(connection);
                requests(&Netlink { handle, place }).await
            })
        })
    }

    pub(crate) fn sysctl(&self, name: &'static str, value: &'static str) -> Result<(), LabError> {
        let place = self.name;
        let path = format!("/proc/sys/net/{name}");
        // A kernel without IPv6 has nothing to be silenced.
        self.run(move || {
            if fs::exists(&path)? {
                fs::write(&path, value)
            } else {
                Ok(())
            }
        })
        .map_err(|source| LabError::Host {
            what: format!("set net/{name}"),
            place,
            source,
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic in a job was reported by `run`.
            let _ = thread.join();
        }
    }
}

/// The requests that the lab makes of one namespace's network.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    place: &'static str,
}

impl Netlink {
    /// Gives an interface an address.
    ///
    /// # Errors
    /// Fails if there is no such interface.
    pub async fn add_address(&self, name: &str, address: IpAddr, prefix: u8) -> Result<(), LabError> {
        let index = self.index(name).await?;
        self.told(
            format!("give {name} the address {address}"),
            self.handle.address().add(index, address, prefix).execute(),
        )
        .await
    }

    /// Gives an interface a hardware address.
    ///
    /// # Errors
    /// Fails if there is no such interface, or if it is up and can't change it.
    pub async fn set_mac(&self, name: &str, mac: [u8; 6]) -> Result<(), LabError> {
        let message = LinkUnspec::new_with_name(name).address(mac.to_vec()).build();
        let request = self.handle.link().change(message).execute();
        self.told(format!("give {name} a hardware address"), request).await
    }

    /// Gives an interface room for so many frames that wait to be taken.
    ///
    /// # Errors
    /// Fails if there is no such interface.
    pub async fn set_queue(&self, name: &str, frames: u32) -> Result<(), LabError> {
        let message = LinkUnspec::new_with_name(name).txqueuelen(frames).build();
        let request = self.handle.link().change(message).execute();
        self.told(format!("give {name} room for {frames} frames"), request)
            .await
    }

    /// Takes an address from an interface.
    pub(super) async fn remove_address(&self, name: &str, address: IpAddr, prefix: u8) -> Result<(), LabError> {
        let index = self.index(name).await?;
        let what = format!("take the address {address} from {name}");
        let gone = self.handle.address().add(index, address, prefix).message_mut().clone();
        self.told(what, self.handle.address().del(gone).execute()).await
    }

    /// Brings an interface up.
    ///
    /// # Errors
    /// Fails if there is no such interface.
    pub async fn up(&self, name: &str) -> Result<(), LabError> {
        let message = LinkUnspec::new_with_name(name).up().build();
        self.told(format!("bring {name} up"), self.handle.link().change(message).execute())
            .await
    }

    /// Brings an interface down.
    ///
    /// # Errors
    /// Fails if there is no such interface.
    pub async fn down(&self, name: &str) -> Result<(), LabError> {
        let message = LinkUnspec::new_with_name(name).down().build();
        self.told(
            format!("bring {name} down"),
            self.handle.link().change(message).execute(),
        )
        .await
    }

    /// Makes a bridge that forwards at once and says nothing of its own, and brings it up.
    pub(crate) async fn add_bridge(&self, name: &str) -> Result<(), LabError> {
        let bridge = LinkBridge::new(name)
            .forward_delay(0)
            .stp_state(BridgeStpState::Disabled)
            .mcast_snooping(false)
            .up()
            .build();
        self.told(
            format!("make the bridge {name}"),
            self.handle.link().add(bridge).execute(),
        )
        .await
    }

    /// Makes a cable from `near`, here, to `far`, in another namespace.
    pub(super) async fn add_veth(&self, near: &str, far: &str, target: RawFd) -> Result<(), LabError> {
        let passing = format!("{near}-far");
        self.told(
            format!("make the cable {near}"),
            self.handle.link().add(LinkVeth::new(near, &passing).build()).execute(),
        )
        .await?;
        let index = self.index(&passing).await?;
        let message = LinkUnspec::new_with_index(index).name(far).setns_by_fd(target).build();
        self.told(
            format!("hand over the cable {near}"),
            self.handle.link().change(message).execute(),
        )
        .await
    }

    pub(crate) async fn join_bridge(&self, port: &str, bridge: &str) -> Result<(), LabError> {
        let index = self.index(bridge).await?;
        let message = LinkUnspec::new_with_name(port).controller(index).build();
        self.told(
            format!("put {port} into the bridge {bridge}"),
            self.handle.link().change(message).execute(),
        )
        .await
    }

    pub(super) async fn leave_bridge(&self, port: &str) -> Result<(), LabError> {
        let message = LinkUnspec::new_with_name(port).nocontroller().build();
        self.told(
            format!("take {port} out of its bridge"),
            self.handle.link().change(message).execute(),
        )
        .await
    }

    async fn index(&self, name: &str) -> Result<u32, LabError> {
        let mut links = self.handle.link().get().match_name(name.to_owned()).execute();
        let found = self.told(format!("find {name}"), links.try_next()).await?;
        Ok(found.map_or(0, |link| link.header.index))
    }

    async fn told<T>(
        &self,
        what: String,
        request: impl Future<Output = Result<T, rtnetlink::Error>>,
    ) -> Result<T, LabError> {
        request.await.map_err(|source| LabError::Netlink {
            what,
            place: self.place,
            source,
        })
    }
}
