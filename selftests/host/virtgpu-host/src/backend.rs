// SPDX-License-Identifier: GPL-2.0

//! The vhost-user back-end: virtqueues, interrupts, shared memory, and answers that come late.

use std::io;
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::json;
use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_gpu_protocol::{Wire, SHM_ID_HOST_VISIBLE};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

use crate::device::{Answer, Device, Incoming, MapWork, Outcome, QueueKind};
use crate::sys;
use crate::vring::{Memory, Ring};

/// The largest command that is read, in bytes.
const MAX_COMMAND: usize = 16 << 20;

/// How long the front-end takes at least from setting the memory to letting the guest go on.
const MAX_START: Duration = Duration::from_millis(1);

/// The queues, by number.
const QUEUES: [QueueKind; 2] = [QueueKind::Control, QueueKind::Cursor];

/// What the transport offers.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// The most entries of a queue.
    pub queue_size: u16,
    /// Offer indirect descriptors.
    pub indirect: bool,
    /// Offer notification suppression by index.
    pub event_idx: bool,
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            queue_size: 1024,
            indirect: true,
            event_idx: true,
        }
    }
}

/// Buffers of the guest that are to be given back.
struct Token {
    queue: usize,
    head: u16,
    writable: Vec<(GuestAddress, u32)>,
}

/// An answer whose time has not come.
struct Late {
    due: Instant,
    token: Token,
    answer: Answer,
}

/// What is behind the lock.
pub struct State {
    /// The device.
    pub device: Device,
    mem: Option<Memory>,
    rings: Vec<Ring>,
    late: Vec<Late>,
    /// The features of a DRIVER_OK that no queue was looked at after.
    starting: Option<u64>,
    backend: Option<Backend>,
    channel: Option<UnixStream>,
    /// The guest is to be told of a change when it is there.
    change_pending: bool,
    kicks: [u64; QUEUES.len()],
    /// Queues whose rings make no sense: not looked at until the next start.
    broken: [bool; QUEUES.len()],
    /// How often a queue was stopped: tokens from before are no longer ours.
    stops: u64,
    /// When the front-end was told that the guest's memory is known.
    mem_at: Instant,
}

impl State {
    /// Tells the guest that the configuration space changed; one that has not started the device, as soon as it does. QEMU 11
    /// ends if it has to interrupt a guest that has taken the device's interrupts away.
    pub fn config_changed(&mut self) -> io::Result<()> {
        if !self.device.is_running() {
            self.change_pending = true;
            return Ok(());
        }
        self.device.record.count("config_changes");
        match &self.channel {
            Some(channel) => sys::send_config_change(channel),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Interrupts the guest so many times for nothing.
    pub fn interrupt_storm(&mut self, number: u64) -> io::Result<()> {
        for _ in 0..number {
            for ring in &self.rings {
                ring.signal_used_queue()?;
            }
        }
        Ok(())
    }

    /// Gives buffers back. The caller interrupts the guest.
    fn deliver(&mut self, mem: &GuestMemoryMmap, token: &Token, answer: &Answer) {
        let mut rest = &answer.bytes[..];
        for &(addr, length) in &token.writable {
            let (now, later) = rest.split_at(rest.len().min(length as usize));
            rest = later;
            if mem.write_slice(now, addr).is_err() {
                self.device
                    .blame("buffer-outside-memory", "a buffer is not in guest memory");
            }
        }
        let ring = &self.rings[token.queue];
        let opened = match answer.open {
            true => open_chain(ring, mem, token.head),
            false => Ok(()),
        };
        let mut given = Ok(());
        for _ in 0..answer.times {
            given = match answer.id {
                None => ring.add_used(token.head, answer.used),
                Some(id) => push_used(ring, mem, id, answer.used),
            };
        }
        if let Err(error) = opened.and(given) {
            self.device
                .blame("ring", &format!("the ring cannot be written: {error}"));
        }
        if answer.promise {
            self.device.promise();
        }
    }

    /// Interrupts the guest if it wants to be.
    fn signal(&mut self, mem: &GuestMemoryMmap, queue: usize) {
        let ring = &self.rings[queue];
        let wanted = {
            let mut state = ring.get_mut();
            let suppressed = !state.get_queue().event_idx_enabled()
                && mem
                    .load::<u16>(
                        GuestAddress(state.get_queue().avail_ring()),
                        Ordering::Acquire,
                    )
                    .is_ok_and(|flags| u16::from_le(flags) & 1 != 0);
            // Without a used index in the guest's memory there is nobody to interrupt.
            !suppressed && state.needs_notification().unwrap_or(false)
        };
        if wanted && ring.signal_used_queue().is_ok() {
            let name = QUEUES[queue].name();
            self.device.record.count(&format!("interrupts_{name}"));
            self.device
                .record
                .line("interrupt", json!({ "queue": name }));
        }
    }
}

/// Has a chain of descriptors go on where it ends. A host must not write to them, and can.
fn open_chain(
    ring: &Ring,
    mem: &GuestMemoryMmap,
    mut index: u16,
) -> Result<(), virtio_queue::Error> {
    const NEXT: u16 = 1;
    let (table, size) = {
        let state = ring.get_ref();
        (state.get_queue().desc_table(), state.get_queue().size())
    };
    for _ in 0..size {
        let flags = GuestAddress(table + u64::from(index) * 16 + 12);
        let old: u16 = mem
            .read_obj(flags)
            .map_err(virtio_queue::Error::GuestMemory)?;
        if u16::from_le(old) & NEXT == 0 {
            let new = (u16::from_le(old) | NEXT).to_le();
            return mem
                .write_obj(new, flags)
                .map_err(virtio_queue::Error::GuestMemory);
        }
        let next: u16 = mem
            .read_obj(GuestAddress(flags.0 + 2))
            .map_err(virtio_queue::Error::GuestMemory)?;
        index = u16::from_le(next) % size;
    }
    Ok(())
}

/// Writes an entry of the used ring whose id is no descriptor's, which the crate refuses to do.
fn push_used(
    ring: &Ring,
    mem: &GuestMemoryMmap,
    id: Option<u32>,
    length: u32,
) -> Result<(), virtio_queue::Error> {
    let mut state = ring.get_mut();
    let queue = state.get_queue_mut();
    let (size, next) = (queue.size(), queue.next_used());
    let id = id.unwrap_or(u32::from(size) + 7);
    let used = queue.used_ring();
    let entry = u64::from(id.to_le()) | u64::from(length.to_le()) << 32;
    let place = used + 4 + u64::from(next % size) * 8;
    mem.write_obj(entry, GuestAddress(place))
        .map_err(virtio_queue::Error::GuestMemory)?;
    let next = next.wrapping_add(1);
    queue.set_next_used(next);
    mem.store(next.to_le(), GuestAddress(used + 2), Ordering::Release)
        .map_err(virtio_queue::Error::GuestMemory)?;
    // The crate does not know of the entry, and would not see that an interrupt is due.
    state
        .signal_used_queue()
        .map_err(|_| virtio_queue::Error::QueueNotReady)
}

/// The back-end.
pub struct Gpu {
    transport: Transport,
    state: Mutex<State>,
    /// Something was added to [`State::late`].
    later: Condvar,
    /// The descriptors that were open when the back-end was made.
    inherited: Vec<i32>,
}

impl Gpu {
    /// A back-end for `device`, with the thread that gives late answers.
    pub fn new(transport: Transport, device: Device) -> io::Result<Arc<Self>> {
        let gpu = Arc::new(Self {
            transport,
            state: Mutex::new(State {
                device,
                mem: None,
                rings: Vec::new(),
                late: Vec::new(),
                starting: None,
                backend: None,
                channel: None,
                change_pending: false,
                kicks: [0; QUEUES.len()],
                broken: [false; QUEUES.len()],
                stops: 0,
                mem_at: Instant::now(),
            }),
            later: Condvar::new(),
            inherited: sys::open_descriptors()?,
        });
        let clock = gpu.clone();
        std::thread::Builder::new()
            .name("late answers".into())
            .spawn(move || clock.answer_late())?;
        Ok(gpu)
    }

    /// The device and the queues.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A thread that panicked has said so; what it left is still of use to whoever asks.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Gives all late answers now, and returns how many there were.
    pub fn answer_now(&self) -> usize {
        let mut state = self.state();
        let now = Instant::now();
        for late in &mut state.late {
            late.due = now;
        }
        self.later.notify_one();
        state.late.len()
    }

    fn answer_late(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let due = |late: &Late| late.due <= now;
            if let Some(at) = state.late.iter().position(due) {
                let Late { token, answer, .. } = state.late.remove(at);
                if let Some(mem) = state.mem.clone() {
                    let mem = mem.memory();
                    state.deliver(&mem, &token, &answer);
                    state.signal(&mem, token.queue);
                }
                continue;
            }
            let next = state.late.iter().map(|late| late.due).min();
            let wait = next.map_or(Duration::from_secs(3600), |due| due - now);
            state = match self.later.wait_timeout(state, wait) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Maps and unmaps. The lock must not be held: the front-end may be waiting for an answer to
    /// a message of its own before it looks at this one.
    fn map(&self, backend: Option<Backend>, work: &[MapWork]) -> bool {
        let Some(backend) = backend else {
            return work.is_empty();
        };
        let mut made = true;
        for work in work {
            let request = VhostUserMMap {
                shmid: SHM_ID_HOST_VISIBLE,
                shm_offset: work.offset,
                len: work.length,
                flags: match work.file {
                    Some(_) => VhostUserMMapFlags::WRITABLE.bits(),
                    None => 0,
                },
                ..Default::default()
            };
            let result = match &work.file {
                Some(file) => backend.shmem_map(&request, file),
                None => backend.shmem_unmap(&request),
            };
            if let Err(error) = result {
                eprintln!("virtgpu-host: shared memory: {error}");
                made = false;
            }
        }
        made
    }

    /// Takes the next command from a queue.
    fn pop(&self, state: &mut State, mem: &GuestMemoryMmap, queue: usize) -> Option<Popped> {
        let chain = {
            let mut ring = state.rings[queue].get_mut();
            if !is_live(&ring) {
                return None;
            }
            let chain = ring
                .get_queue_mut()
                .iter(mem)
                .map(|mut chains| chains.next());
            drop(ring);
            match chain {
                Ok(chain) => chain?,
                Err(error) => {
                    state.device.blame("ring", &error.to_string());
                    state.broken[queue] = true;
                    return None;
                }
            }
        };
        let mut popped = Popped {
            token: Token {
                queue,
                head: chain.head_index(),
                writable: Vec::new(),
            },
            bytes: Vec::new(),
        };
        let mut more = true;
        for descriptor in chain {
            more = descriptor.has_next();
            if descriptor.is_write_only() {
                let place = (descriptor.addr(), descriptor.len());
                popped.token.writable.push(place);
                continue;
            }
            if !popped.token.writable.is_empty() {
                let text = "a readable buffer comes after a writable one";
                state.device.blame("descriptor-order", text);
            }
            let start = popped.bytes.len();
            let end = start + descriptor.len() as usize;
            if end > MAX_COMMAND {
                let text = format!("a command of more than {MAX_COMMAND} bytes");
                state.device.blame("huge-command", &text);
                break;
            }
            popped.bytes.resize(end, 0);
            if mem
                .read_slice(&mut popped.bytes[start..], descriptor.addr())
                .is_err()
            {
                let text = "a buffer is not in guest memory";
                state.device.blame("buffer-outside-memory", text);
            }
        }
        if more {
            let text = "a chain of descriptors without an end";
            state.device.blame("bad-chain", text);
        }
        Some(popped)
    }

    /// Gives buffers back now, later or never.
    fn give_back(&self, state: &mut State, mem: &GuestMemoryMmap, token: Token, answer: Answer) {
        match answer.delay {
            Some(Duration::ZERO) => state.deliver(mem, &token, &answer),
            Some(delay) => {
                state.late.push(Late {
                    due: Instant::now() + delay,
                    token,
                    answer,
                });
                self.later.notify_one();
            }
            None => {}
        }
    }

    /// Does everything that is on a queue.
    fn run(&self, queue: usize, rings: &[Ring]) {
        let mut state = self.state();
        if state.rings.is_empty() {
            state.rings = rings.to_vec();
        }
        let Some(mem) = state.mem.clone() else {
            return;
        };
        let mem = mem.memory();
        let mem = mem.deref();

        if let Some(features) = state.starting.take() {
            // The front-end waits for an answer when it sets the memory, and for none when it then
            // sets the addresses: if that was long ago, the guest may have gone on meanwhile.
            let (mem_at, rings) = (state.mem_at, state.rings.iter());
            let early = rings.map(|ring| ring.take_early(mem_at + MAX_START)).sum();
            let resumed = state.rings.iter().any(Ring::was_resumed);
            let work = state.device.start(features, resumed, early);
            let backend = state.backend.clone();
            if std::mem::take(&mut state.change_pending) {
                if let Err(error) = state.config_changed() {
                    eprintln!("virtgpu-host: no hotplug: {error}");
                }
            }
            drop(state);
            self.map(backend, &work);
            state = self.state();
        }

        let kicks = state.rings[queue].kicks();
        let new = kicks - state.kicks[queue];
        state.kicks[queue] = kicks;
        let counter = format!("kicks_{}", QUEUES[queue].name());
        state.device.record.add(&counter, new);

        while !state.broken[queue] {
            // Nothing can be suppressed on a queue that is not set up, and nothing is on it.
            let _ = state.rings[queue].disable_notification();
            let mut answered = false;
            while let Some(Popped { token, bytes }) = self.pop(&mut state, mem, queue) {
                let lengths = token.writable.iter().map(|&(_, length)| length as usize);
                let incoming = Incoming {
                    queue: QUEUES[queue],
                    kick: state.rings[queue].kicks(),
                    bytes: &bytes,
                    capacity: lengths.sum(),
                };
                let answer = match state.device.receive(mem, incoming) {
                    Outcome::Answer(answer) => answer,
                    Outcome::Map(work, unfinished) => {
                        let backend = state.backend.clone();
                        let stops = state.stops;
                        drop(state);
                        let made = self.map(backend, &work);
                        state = self.state();
                        let answer = state.device.mapped(&work, unfinished, made);
                        if stops != state.stops {
                            // Reset meanwhile: the buffers are no longer ours.
                            continue;
                        }
                        answer
                    }
                };
                self.give_back(&mut state, mem, token, answer);
                state.rings[queue].set_seen();
                answered = true;
            }
            if answered {
                state.signal(mem, queue);
            }
            let more = state.rings[queue].enable_notification();
            // What is on a queue that the guest has just reset stays there.
            if !is_live(&state.rings[queue].get_ref()) || !matches!(more, Ok(true)) {
                break;
            }
        }
    }
}

/// Whether commands may be taken from a queue.
fn is_live(ring: &VringState<Memory>) -> bool {
    ring.get_queue().ready() && ring.is_enabled()
}

struct Popped {
    token: Token,
    bytes: Vec<u8>,
}

impl VhostUserBackend for Gpu {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        QUEUES.len()
    }

    fn max_queue_size(&self) -> usize {
        self.transport.queue_size.into()
    }

    fn features(&self) -> u64 {
        let offered = self.state().device.options().features();
        offered
            | u64::from(self.transport.indirect) << VIRTIO_RING_F_INDIRECT_DESC
            | u64::from(self.transport.event_idx) << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_F_VERSION_1
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        // The queues' addresses follow; the device starts when they are looked at.
        let mut state = self.state();
        state.starting = Some(features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        state.broken = [false; QUEUES.len()];
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // Not STATUS: the crate cannot answer GET_STATUS.
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD;
        if self.state().device.options().host_visible > 0 {
            features |= VhostUserProtocolFeatures::SHMEM;
        }
        features
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = Vec::new();
        self.state()
            .device
            .config()
            .put(&mut |piece| config.extend_from_slice(piece));
        let mut config: Vec<u8> = config.into_iter().skip(offset as usize).collect();
        // The front-end may give the guest a larger space, or a smaller one.
        config.resize(size as usize, 0);
        config
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        self.state().device.write_config(offset as usize, buf);
        Ok(())
    }

    fn update_memory(&self, mem: Memory) -> io::Result<()> {
        let mut state = self.state();
        state.mem = Some(mem);
        state.mem_at = Instant::now();
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: Backend) {
        let mut state = self.state();
        state.backend = Some(backend);
        match sys::find_channel(&self.inherited) {
            Ok(channel) => state.channel = Some(channel),
            Err(error) => eprintln!("virtgpu-host: no hotplug: {error}"),
        }
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        let mut sizes = [0; SHM_ID_HOST_VISIBLE as usize + 1];
        sizes[usize::from(SHM_ID_HOST_VISIBLE)] = self.state().device.options().host_visible;
        Ok(VhostUserShMemConfig::new(1, &sizes))
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without it the thread that looks at the queues outlives the connection.
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let mut state = self.state();
        let queue = queue_index as usize;
        state.stops += 1;
        let late = state.late.len();
        state.late.retain(|late| late.token.queue != queue);
        let late = (late - state.late.len()) as u64;
        let waiting = state.rings.get(queue).map_or(0, Ring::waiting);
        state.device.stop(waiting + late);
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Ring],
        _thread_id: usize,
    ) -> io::Result<()> {
        let queue = usize::from(device_event);
        if queue < QUEUES.len() {
            self.run(queue, vrings);
        }
        Ok(())
    }
}
