//! The floor: the same guest in this very process, stopped with nothing around it.
//!
//! Its network is a laboratory of its own, so that it is told what to write exactly as the pair's guest is. What is
//! measured is `machine::floor`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use machine::devices::net::FRAME_BYTES_MAX;
use machine::devices::{block, net};
use machine::floor::Stop;
use machine::tap::Tap;
use machine::{CardConfig, CopyBuffer, KvmVm, MachineConfig, Mapping, Platform, Vm};

use crate::bundle::GUEST_IMAGE;
use crate::clients::{Target, http_get};
use crate::lab::{Host, Lab, TAP};
use crate::stage::tidy::Tidy;
use crate::units::ByteSize;

const MAC: [u8; 6] = [2, 0x74, 0x61, 0x6e, 0x64, 0x66];
const DISK_BYTES: usize = 4 << 20;
const BOOT_LIMIT: Duration = Duration::from_secs(30);
const WRITE_LIMIT: Duration = Duration::from_secs(60);

/// The machine, running.
pub(super) struct Floor {
    /// Dropped before its network.
    vm: KvmVm,
    buffer: CopyBuffer,
    lab: Lab,
}

impl Floor {
    /// Makes and boots it.
    pub(super) fn start(memory: ByteSize, tidy: &Tidy) -> Result<Self> {
        let lab = Lab::new().context("can't build the laboratory of the floor")?;
        let tap = lab
            .host(Host::A)
            .run(|| Tap::open(TAP))
            .context("can't open the floor's TAP")?;
        let config = MachineConfig {
            memory_bytes: memory.0,
            cpu: machine::CpuModel::host()?,
            mapping: Mapping::Shared,
            platform: Platform::Bundled,
            cards: vec![CardConfig {
                mac: MAC,
                offloads: false,
                queues: 1,
            }],
            console: Box::new(io::sink()),
            // A guest that has ended no longer answers, and that is told.
            on_power: Arc::new(|event| tracing::warn!(?event, "the floor's guest has ended")),
        };
        let network = Network {
            tap,
            frame: vec![0; FRAME_BYTES_MAX],
            waiting: None,
        };
        let mut vm = KvmVm::new(config, vec![Box::new(network)], Box::new(Disk(vec![0; DISK_BYTES])))
            .context("can't make the floor's VM")?;
        vm.boot(GUEST_IMAGE, "").context("can't boot the floor's VM")?;
        vm.resume().context("the floor's VM does not run")?;
        let buffer = CopyBuffer::new(usize::try_from(vm.ram().pages()).context("too much memory")?);
        let mut floor = Self { vm, buffer, lab };
        let deadline = Instant::now() + BOOT_LIMIT;
        while let Err(error) = floor.get("/", Duration::from_secs(1)) {
            if Instant::now() > deadline {
                return Err(error);
            }
            tidy.sleep(Duration::from_millis(5))?;
        }
        floor.stop()?;
        Ok(floor)
    }

    /// Has the guest write, as `/write/` tells.
    pub(super) fn write(&self, what: &str) -> Result<()> {
        self.get(&format!("/write/{what}"), WRITE_LIMIT)
    }

    /// Stops the machine once and lets it go on.
    pub(super) fn stop(&mut self) -> Result<Stop> {
        machine::floor::measure(&mut self.vm, &mut self.buffer).context("the floor's VM can't be stopped")
    }

    fn get(&self, path: &str, limit: Duration) -> Result<()> {
        let asked = path.to_owned();
        let client = self.lab.client();
        let answer = client.run(move || http_get(Target::bundled().http_address(), &asked, limit));
        let answer = answer.with_context(|| format!("the floor's guest does not answer {path}"))?;
        anyhow::ensure!(answer.status == 200, "the floor's guest refuses {path}");
        Ok(())
    }
}

struct Network {
    tap: Tap,
    frame: Vec<u8>,
    /// A frame that the guest had too few buffers for.
    waiting: Option<Bytes>,
}

impl net::Backend for Network {
    fn transmit(&mut self, frame: &[u8]) {
        // A frame lost is sent again.
        let _ = self.tap.send(frame);
    }

    fn receive(&mut self) -> Option<Bytes> {
        if let Some(frame) = self.waiting.take() {
            return Some(frame);
        }
        let length = self.tap.recv(&mut self.frame).ok().flatten()?;
        Some(Bytes::copy_from_slice(&self.frame[..length]))
    }

    fn put_back(&mut self, frame: Bytes) {
        self.waiting = Some(frame);
    }

    fn delivered(&mut self, _: Bytes) {}

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.tap.as_fd()]
    }
}

/// A disk in memory: the floor's guest only formats it.
struct Disk(Vec<u8>);

impl Disk {
    fn part(&mut self, offset: u64, bytes: usize) -> io::Result<&mut [u8]> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        self.0
            .get_mut(start..end)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl block::Backend for Disk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(self.part(offset, data.len())?);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.part(offset, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        self.part(offset, length)?.fill(0);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
