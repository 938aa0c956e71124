// SPDX-License-Identifier: GPL-2.0

//! A virtqueue that counts what the guest does before and with its notifications.

use std::fs::File;
use std::io::{self, Read};
use std::num::Wrapping;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory, which the front-end may replace.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What is counted.
#[derive(Default)]
struct Counts {
    /// The notifications so far.
    kicks: AtomicU64,
    /// The commands that were queued when the addresses were set, and when that was.
    early: Mutex<Option<(u64, Instant)>>,
    /// Where the queue started: 0 after a reset.
    base: AtomicU64,
    /// Whether a command was taken since the start.
    seen: AtomicBool,
    /// The notifications, to be read with their number.
    kick: Mutex<Option<File>>,
}

/// A virtqueue. The clones are the same queue.
#[derive(Clone)]
pub struct Ring {
    inner: VringMutex<Memory>,
    mem: Memory,
    counts: Arc<Counts>,
}

impl Ring {
    /// The number of notifications so far.
    pub fn kicks(&self) -> u64 {
        self.counts.kicks.load(Ordering::Relaxed)
    }

    /// A command was taken.
    pub fn set_seen(&self) {
        self.counts.seen.store(true, Ordering::Relaxed);
    }

    /// The number of commands that were queued before DRIVER_OK, once. If the addresses were set
    /// after `latest`, that is not known, and 0.
    pub fn take_early(&self, latest: Instant) -> u64 {
        let early = self.counts.early.lock().unwrap().take();
        early.map_or(0, |(number, at)| if at < latest { number } else { 0 })
    }

    /// Whether the queue started where it had stopped, instead of anew.
    pub fn was_resumed(&self) -> bool {
        self.counts.base.load(Ordering::Relaxed) != 0
    }

    /// The number of commands on the queue that were not looked at.
    pub fn waiting(&self) -> u64 {
        let mem = self.mem.memory();
        let state = self.get_ref();
        let queue = state.get_queue();
        queue
            .avail_idx(mem.deref(), Ordering::Acquire)
            .map_or(0, |index| (index - Wrapping(queue.next_avail())).0.into())
    }
}

impl<'a> VringStateGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Ring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Self {
            inner: VringMutex::new(mem.clone(), max_queue_size)?,
            mem,
            counts: Arc::default(),
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), Error> {
        self.inner.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.counts.base.store(base.into(), Ordering::Relaxed);
        self.inner.set_queue_next_avail(base);
    }

    /// What the crate does last when it is told the addresses.
    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
        self.counts.seen.store(false, Ordering::Relaxed);
        if !self.was_resumed() {
            let early = self.waiting();
            *self.counts.early.lock().unwrap() = Some((early, Instant::now()));
        }
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let copy = file.as_ref().and_then(|file| file.try_clone().ok());
        *self.counts.kick.lock().unwrap() = copy;
        self.inner.set_kick(file);
    }

    /// Reads the event, whose value is the number of notifications since it was last read.
    fn read_kick(&self) -> io::Result<bool> {
        let mut number = [0; 8];
        if let Some(kick) = &*self.counts.kick.lock().unwrap() {
            match (&mut &*kick).read(&mut number) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let mut number = u64::from_ne_bytes(number);
        if !self.counts.seen.load(Ordering::Relaxed) {
            // The front-end notifies when it starts a queue, in case it missed something.
            number = number.min(1).min(self.waiting());
        }
        self.counts.kicks.fetch_add(number, Ordering::Relaxed);
        Ok(self.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
