// SPDX-License-Identifier: GPL-2.0

//! Virtqueues that own what the device has been given.
//!
//! All the virtqueues of a device are one object, [`Virtqueues`]. It exists before they are found,
//! and after they are gone; in between it is *connected*. For every buffer in a queue it keeps the
//! memory that the device may access, and a token of the driver's. Both stay there until the device
//! has given the buffer back, see [`Guard::get`], or cannot give it back any more, see
//! [`Virtqueues::stop`].
//!
//! What the device says is not trusted: it cannot make this module hand out a buffer twice, look at
//! memory that the device did not get, or believe in an answer that is longer than its buffer.

use super::{
    buffer::DmaPages,
    Device, //
};
use crate::{
    bindings,
    container_of,
    device::Bound,
    error::to_result,
    new_mutex,
    new_spinlock_irq,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        lock::{
            mutex::MutexGuard,
            spinlock::SpinLockIrqGuard, //
        },
        rcu,
        Arc,
        ArcBorrow,
        CondVar,
        CondVarTimeoutResult,
        Mutex,
        SpinLockIrq, //
    },
    time::Jiffies,
    types::ScopeGuard,
    workqueue::{
        HasWork,
        Work,
        WorkItem, //
    }, //
};
use core::{
    array,
    mem::{
        self,
        size_of, //
    },
    ops::Deref,
    ptr::{
        self,
        NonNull, //
    }, //
};

pub use super::buffer::{
    Payload,
    ResponseBuf, //
};

/// The length of the longest request that [`Guard::add`] takes, in bytes.
pub const REQUEST_MAX: usize = 104;

/// The length of the longest response that needs no [`ResponseBuf`], in bytes.
pub const RESPONSE_INLINE: usize = 40;

/// How far apart requests are in memory that is shared with the device.
const REQUEST_STRIDE: usize = 128;

/// How far apart inline responses are in memory that is shared with the device. No cache line is
/// longer: where DMA is not coherent, writing to one of them must not write back another.
const RESPONSE_STRIDE: usize = 128;

/// What a driver does with its virtqueues.
///
/// An instance is part of its [`Virtqueues`], where [`Virtqueues::handler`] finds it.
///
/// If it contains a [`Work`] for the [`Virtqueues`], and implements [`HasWork`] and [`WorkItem`]
/// for it, an [`Arc`] of the [`Virtqueues`] can be enqueued as a work item, and
/// [`Handler::interrupt`] can do so. It is up to the driver to [flush](Work::flush) it after
/// [`Virtqueues::stop`], so that it does not run any more when the module is unloaded.
pub trait Handler<const N: usize>: Send + Sync + Sized + 'static {
    /// What the driver wants to know again when a buffer comes back.
    type Token: Send + 'static;

    /// What the lock of a queue protects beside the queue.
    type State: Send + Unpin + 'static;

    /// The device has given back buffers of the queue `index`, or there is something wrong with it.
    ///
    /// Called in interrupt context, and by [`Virtqueues::notify`] in its caller's and with its
    /// caller's locks; only while the queues are being connected, are connected or are being
    /// disconnected. It may be called several times at once, for the same queue, too.
    fn interrupt(queues: ArcBorrow<'_, Virtqueues<Self, N>>, index: usize);
}

/// What the device may write to, see [`Guard::add`].
pub enum Response {
    /// So many bytes, up to [`RESPONSE_INLINE`], which the queue has room for itself.
    Inline(usize),
    /// Any number of bytes.
    Pages(ResponseBuf),
    /// Nothing.
    None,
}

/// What the device wrote, out of its reach. See [`Guard::get`].
#[derive(Default)]
pub struct Answer {
    inline: [u64; RESPONSE_INLINE / size_of::<u64>()],
    /// Where the answer is if it is not `inline`.
    pages: Option<ResponseBuf>,
    /// How many bytes of `inline` it is.
    len: usize,
}

impl Answer {
    /// Returns the bytes that the device says it has written, and none if it says that it has
    /// written more than it could.
    pub fn as_slice(&self) -> &[u8] {
        match &self.pages {
            Some(buf) => buf.as_slice(),
            None => self.inline.as_bytes().get(..self.len).unwrap_or(&[]),
        }
    }
}

/// A buffer that the device has given back, see [`Guard::get`].
pub struct Completed<T> {
    /// The driver's token.
    pub token: T,
    /// The device-readable memory that came with the request. It must not be dropped with a lock
    /// held.
    pub payload: Option<Arc<Payload>>,
}

/// Why [`Guard::add`] failed, and the driver's token.
pub struct AddError<T> {
    /// The reason.
    pub error: Error,
    /// The driver's token.
    pub token: T,
}

/// What belongs to a buffer that the device has.
#[derive(Default)]
struct Slot {
    /// Whether there is one.
    busy: bool,
    /// How much the device may write.
    capacity: usize,
    /// Where it writes, if not to the inline response of the slot.
    pages: Option<ResponseBuf>,
    payload: Option<Arc<Payload>>,
}

/// A virtqueue that is connected to the device, and the memory that the device may access.
///
/// All that does not depend on the driver, so that there is one of it in the kernel.
///
/// # Invariants
///
/// - `vq` is a valid virtqueue, which has not been deleted. It is only used by whoever has access
///   to this structure, apart from `virtqueue_notify()` and the interrupt handler.
/// - `slots` has as many elements as the ring, and `requests` and `responses` have room for as many
///   of each.
/// - `lists` has two elements for each slot, which are lists of one entry: the slot's request, and
///   its inline response.
/// - `free` has the index of every element of `slots` that is not busy, and room for all.
/// - The buffers in the virtqueue are those in `slots`; what the virtqueue knows as `data` is one
///   more than the index of the slot.
struct Ring {
    vq: NonNull<bindings::virtqueue>,
    indirect: bool,
    slots: KVVec<Slot>,
    free: KVVec<usize>,
    lists: KVVec<[bindings::scatterlist; 2]>,
    requests: DmaPages,
    responses: DmaPages,
}

// SAFETY: A virtqueue can be used from any thread, one at a time, and everything else is owned.
unsafe impl Send for Ring {}

impl Ring {
    /// # Safety
    ///
    /// `vq` must be a valid virtqueue without buffers, which nobody else uses, apart from
    /// `virtqueue_notify()` and the interrupt handler. It must not be deleted as long as this
    /// structure is used for anything but to be dropped, and its device must not access what was
    /// added when that happens.
    unsafe fn new(vq: NonNull<bindings::virtqueue>, indirect: bool) -> Result<Self> {
        // SAFETY: By the safety requirements, `vq` is a valid virtqueue.
        let size = unsafe { bindings::virtqueue_get_vring_size(vq.as_ptr()) } as usize;
        let mut slots = KVVec::with_capacity(size, GFP_KERNEL)?;
        let mut free = KVVec::with_capacity(size, GFP_KERNEL)?;
        let mut lists = KVVec::with_capacity(size, GFP_KERNEL)?;
        let requests = DmaPages::new(size * REQUEST_STRIDE)?;
        let responses = DmaPages::new(size * RESPONSE_STRIDE)?;

        for slot in (0..size).rev() {
            slots.push(Slot::default(), GFP_KERNEL)?;
            free.push(slot, GFP_KERNEL)?;
        }
        for slot in 0..size {
            let mut pair = <[bindings::scatterlist; 2]>::zeroed();
            let memory = [
                requests.as_ptr(slot * REQUEST_STRIDE, REQUEST_STRIDE)?,
                responses.as_ptr(slot * RESPONSE_STRIDE, RESPONSE_STRIDE)?,
            ];

            for ((list, memory), len) in pair
                .iter_mut()
                .zip(memory)
                .zip([REQUEST_MAX, RESPONSE_INLINE])
            {
                // SAFETY: `list` is valid for writes. The memory is in the linear map, and as long
                // as the stride.
                unsafe { bindings::sg_init_one(list, memory.cast(), len as c_uint) };
            }
            lists.push(pair, GFP_KERNEL)?;
        }

        // INVARIANT: There are no buffers yet, and as many free slots as the ring has descriptors.
        // The lists were set up above; they can be moved.
        Ok(Self {
            vq,
            indirect,
            slots,
            free,
            lists,
            requests,
            responses,
        })
    }

    /// Adds a buffer, and returns its slot. Takes [`Response::Pages`], and leaves
    /// [`Response::None`]; on error everything is as before.
    fn add(
        &mut self,
        request: &[u8],
        payload: Option<&Arc<Payload>>,
        response: &mut Response,
    ) -> Result<usize> {
        if request.is_empty() || request.len() > REQUEST_MAX {
            return Err(EINVAL);
        }

        let pieces = 1
            + payload.map_or(0, |payload| payload.pieces())
            + usize::from(!matches!(response, Response::None));

        // SAFETY: By the type invariant, `vq` is a valid virtqueue.
        let free = unsafe { (*self.vq.as_ptr()).num_free } as usize;

        check_room(pieces, free, self.slots.len(), self.indirect)?;

        let idle = self.free.len() == self.slots.len();
        let index = *self.free.last().ok_or(ENOSPC)?;
        let slot = self.slots.get_mut(index).ok_or(EINVAL)?;
        let [request_list, response_list] = self.lists.get_mut(index).ok_or(EINVAL)?;
        let mut pages_list = bindings::scatterlist::zeroed();
        let mut lists: [*mut bindings::scatterlist; 3] = [ptr::null_mut(); 3];
        let mut out = 1;
        let mut ins = 1;

        self.requests.write(index * REQUEST_STRIDE, request)?;
        request_list.length = request.len() as c_uint;
        lists[0] = request_list;

        if let Some(payload) = payload {
            lists[out] = payload.sgl();
            out += 1;
        }

        let capacity = match response {
            Response::Inline(len) => {
                if *len == 0 || *len > RESPONSE_INLINE {
                    return Err(EINVAL);
                }
                // An answer that is not written must not look like the one before it.
                self.responses.clear(index * RESPONSE_STRIDE, *len)?;
                response_list.length = *len as c_uint;
                lists[out] = response_list;
                *len
            }
            Response::Pages(buf) => {
                // SAFETY: `pages_list` is valid for writes. The memory is in the linear map and has
                // room for `capacity` bytes.
                unsafe {
                    bindings::sg_init_one(
                        &mut pages_list,
                        buf.shared()?.cast(),
                        buf.capacity() as c_uint,
                    )
                };
                lists[out] = &mut pages_list;
                buf.capacity()
            }
            Response::None => {
                ins = 0;
                0
            }
        };

        // SAFETY: By the type invariant, `vq` is a valid virtqueue and nobody else uses it.
        // `lists` has `out` lists of device-readable memory followed by `ins` lists of
        // device-writable memory. They are not written to, and only used for the duration of the
        // call. The memory is that of the slot, or is given to it below, and lives until the device
        // cannot access it any more. `data` is not null.
        let ret = unsafe {
            bindings::virtqueue_add_sgs(
                self.vq.as_ptr(),
                lists.as_mut_ptr(),
                out as c_uint,
                ins,
                ptr::without_provenance_mut(index + 1),
                (GFP_ATOMIC | __GFP_NOWARN).as_raw(),
            )
        };

        to_result(ret).map_err(|e| {
            // There was room, but no memory for an indirect table, nor as many descriptors without
            // one; in an empty ring there are.
            if e == ENOSPC && idle {
                ENOMEM
            } else {
                e
            }
        })?;

        self.free.pop();
        slot.busy = true;
        slot.capacity = capacity;
        if let Some(payload) = payload {
            slot.payload = Some(payload.clone());
        }
        if matches!(response, Response::Pages(_)) {
            if let Response::Pages(buf) = mem::replace(response, Response::None) {
                slot.pages = Some(buf);
            }
        }
        Ok(index)
    }

    /// Takes a buffer that the device has given back, and returns its slot and its payload. What
    /// the device wrote is in `answer` then.
    fn get(&mut self, answer: &mut Answer) -> Option<Result<(usize, Option<Arc<Payload>>)>> {
        let mut written: c_uint = 0;

        // SAFETY: By the type invariant, `vq` is a valid virtqueue and nobody else uses it.
        let data = unsafe { bindings::virtqueue_get_buf(self.vq.as_ptr(), &mut written) };

        if data.is_null() {
            return None;
        }

        let index = data.addr() - 1;
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.busy) else {
            return Some(Err(EPROTO));
        };

        slot.busy = false;
        // `free` has room for all slots.
        let _ = self.free.push_within_capacity(index);

        let mut len = written as usize;

        if len > slot.capacity {
            len = 0;
        }
        answer.len = 0;
        answer.pages = slot.pages.take();
        if let Some(buf) = &mut answer.pages {
            buf.complete(len);
        } else if self
            .responses
            .read_words(index * RESPONSE_STRIDE, len, &mut answer.inline)
            .is_ok()
        {
            answer.len = len;
        }

        Some(Ok((index, slot.payload.take())))
    }
}

/// A virtqueue that is connected to the device, and the driver's tokens for the buffers in it.
///
/// # Invariants
///
/// `tokens` has as many elements as the ring has slots.
struct Connected<T> {
    ring: Ring,
    tokens: KVVec<Option<T>>,
    /// Something was added since [`Guard::kick_prepare`] was called last.
    added: bool,
}

impl<T> Connected<T> {
    fn new(ring: Ring) -> Result<Self> {
        let mut tokens = KVVec::with_capacity(ring.slots.len(), GFP_KERNEL)?;

        for _ in 0..ring.slots.len() {
            tokens.push(None, GFP_KERNEL)?;
        }

        // INVARIANT: As many were pushed.
        Ok(Self {
            ring,
            tokens,
            added: false,
        })
    }
}

/// What the lock of a queue protects.
struct Locked<T, S> {
    connected: Option<Connected<T>>,
    state: S,
}

#[pin_data]
struct Queue<T, S> {
    #[pin]
    locked: SpinLockIrq<Locked<T, S>>,
    /// The virtqueue while it is connected, for whoever has an RCU read lock.
    notify: Atomic<*mut bindings::virtqueue>,
}

/// A queue of [`Virtqueues`], locked, with interrupts disabled.
pub struct Guard<'a, T, S: Unpin>(SpinLockIrqGuard<'a, Locked<T, S>>);

impl<T, S: Unpin> Guard<'_, T, S> {
    fn ring(&self) -> Option<&Ring> {
        self.0.connected.as_ref().map(|connected| &connected.ring)
    }

    fn ring_mut(&mut self) -> Option<&mut Ring> {
        self.0
            .connected
            .as_mut()
            .map(|connected| &mut connected.ring)
    }

    /// Returns the driver's state.
    pub fn state(&mut self) -> &mut S {
        let locked: &mut Locked<T, S> = &mut self.0;

        &mut locked.state
    }

    /// Releases the lock and waits for a notification of `condvar`, for `jiffies` at the most.
    ///
    /// Returns how much of `jiffies` is left, which is zero only on a timeout. The queue may have
    /// been disconnected in the meantime. Process context, with no other lock of that kind held.
    #[must_use]
    pub fn wait(&mut self, condvar: &CondVar, jiffies: Jiffies) -> Jiffies {
        condvar.wait_timeout(&mut self.0, jiffies)
    }

    /// Like [`Guard::wait`], but a fatal signal ends the wait with [`ERESTARTSYS`].
    pub fn wait_killable(&mut self, condvar: &CondVar, jiffies: Jiffies) -> Result<Jiffies> {
        match condvar.wait_killable_timeout(&mut self.0, jiffies) {
            CondVarTimeoutResult::Timeout => Ok(0),
            CondVarTimeoutResult::Woken { jiffies } => Ok(jiffies),
            CondVarTimeoutResult::Signal { .. } => Err(ERESTARTSYS),
        }
    }

    /// Returns whether the device broke the rules of the queue, or has been removed. It gives back
    /// nothing any more, and has to be reset.
    pub fn is_broken(&self) -> bool {
        self.ring().is_some_and(|ring| {
            // SAFETY: By its type invariant, `vq` is a valid virtqueue.
            unsafe { bindings::virtqueue_is_broken(ring.vq.as_ptr()) }
        })
    }

    /// Returns how many buffers the device has.
    pub fn in_flight(&self) -> usize {
        self.ring()
            .map_or(0, |ring| ring.slots.len() - ring.free.len())
    }

    /// Gives a buffer to the device: `request`, followed by `payload`, which the device may read,
    /// and `response`, which it may write to.
    ///
    /// `request` is copied, and a reference to `payload` is taken. [`Response::Pages`] becomes
    /// [`Response::None`]. The device learns of the buffer when it is notified, see
    /// [`Guard::kick_prepare`]. No memory is allocated, unless the ring uses indirect descriptors.
    ///
    /// Errors, upon which everything is as before: [`ENOSPC`] if the ring is full until other
    /// buffers come back, [`E2BIG`] if it is too small, [`ENODEV`] if the queue is not
    /// connected, [`EIO`] if it is broken, [`EINVAL`] if `request` is empty or longer than
    /// [`REQUEST_MAX`], or an inline response is empty or longer than [`RESPONSE_INLINE`], and
    /// [`ENOMEM`].
    pub fn add(
        &mut self,
        request: &[u8],
        payload: Option<&Arc<Payload>>,
        response: &mut Response,
        token: T,
    ) -> Result<(), AddError<T>> {
        let Some(Connected {
            ring,
            tokens,
            added,
        }) = &mut self.0.connected
        else {
            return Err(AddError {
                error: ENODEV,
                token,
            });
        };

        match ring.add(request, payload, response) {
            Ok(slot) => {
                tokens[slot] = Some(token);
                *added = true;
                Ok(())
            }
            Err(error) => Err(AddError { error, token }),
        }
    }

    /// Returns whether the device has to be notified of what was added since the last call, with
    /// [`Virtqueues::notify`]. Never if nothing was.
    #[must_use]
    pub fn kick_prepare(&mut self) -> bool {
        let Some(Connected { ring, added, .. }) = &mut self.0.connected else {
            return false;
        };

        // SAFETY: By its type invariant, `vq` is a valid virtqueue and nobody else uses it.
        mem::take(added) && unsafe { bindings::virtqueue_kick_prepare(ring.vq.as_ptr()) }
    }

    /// Takes a buffer that the device has given back, if there is one. What the device wrote
    /// replaces what is in `answer`, which should not be the answer to a request with
    /// [`Response::Pages`]: that would be dropped with the lock held.
    ///
    /// An error, [`EPROTO`], means that the device has given back what it did not have.
    pub fn get(&mut self, answer: &mut Answer) -> Option<Result<Completed<T>>> {
        let Connected { ring, tokens, .. } = self.0.connected.as_mut()?;

        Some(ring.get(answer)?.and_then(|(slot, payload)| {
            let token = tokens[slot].take().ok_or(EPROTO)?;

            Ok(Completed { token, payload })
        }))
    }

    /// Asks the device not to interrupt for this queue. It may do so anyway.
    pub fn disable_callbacks(&mut self) {
        if let Some(ring) = self.ring_mut() {
            // SAFETY: By its type invariant, `vq` is a valid virtqueue and nobody else uses it.
            unsafe { bindings::virtqueue_disable_cb(ring.vq.as_ptr()) }
        }
    }

    /// Asks the device to interrupt for this queue again.
    ///
    /// Returns `false` if there are buffers to be taken, for which there may be no interrupt.
    #[must_use]
    pub fn enable_callbacks(&mut self) -> bool {
        self.ring_mut().is_none_or(|ring| {
            // SAFETY: By its type invariant, `vq` is a valid virtqueue and nobody else uses it.
            unsafe { bindings::virtqueue_enable_cb(ring.vq.as_ptr()) }
        })
    }
}

/// The part of [`Virtqueues`] that does not depend on the driver, by which the bus abstraction
/// finds them.
pub(super) struct Link {
    stop: unsafe fn(NonNull<Link>, &Device<Bound>, rcu::Guard),
}

impl Link {
    /// Stops the [`Virtqueues`] that `this` is part of, and drops their tokens.
    ///
    /// # Safety
    ///
    /// `this` must have been read from [`Device::link`] of `dev` under the RCU read lock that
    /// `guard` stands for.
    pub(super) unsafe fn stop(this: NonNull<Link>, dev: &Device<Bound>, guard: rcu::Guard) {
        // SAFETY: By the safety requirements, and the type invariants of `Device`, `this` is valid
        // as long as `guard` exists. The requirements of the function are those of this one.
        unsafe { ((*this.as_ptr()).stop)(this, dev, guard) }
    }
}

/// The virtqueues of a device.
///
/// # Examples
///
/// ```
/// use kernel::{
///     prelude::*,
///     sync::ArcBorrow,
///     virtio::queue::{
///         Answer,
///         Handler,
///         Response,
///         Virtqueues, //
///     }, //
/// };
///
/// struct Driver;
///
/// impl Handler<1> for Driver {
///     type Token = u32;
///     type State = ();
///
///     fn interrupt(_queues: ArcBorrow<'_, Virtqueues<Self, 1>>, _index: usize) {
///         // Usually, a work item is enqueued here, which calls `Guard::get()`.
///     }
/// }
///
/// let queues = Virtqueues::<Driver, 1>::new([c"requests"], [()], Driver)?;
/// let mut queue = queues.lock(0);
///
/// // `find()` was not called yet: there is nobody to talk to, and nothing is lost.
/// let refused = queue.add(&[0; 16], None, &mut Response::Inline(8), 42).err();
///
/// assert!(refused.is_some_and(|refused| refused.error == ENODEV && refused.token == 42));
/// assert!(!queue.kick_prepare());
/// assert_eq!(queue.in_flight(), 0);
/// assert!(queue.get(&mut Answer::default()).is_none());
/// drop(queue);
/// queues.notify(0);
/// assert!(queues.device().is_none());
/// # Ok::<(), Error>(())
/// ```
#[pin_data]
#[repr(C)]
pub struct Virtqueues<H: Handler<N>, const N: usize> {
    // First, so that a pointer to it is a pointer to the whole.
    link: Link,
    names: [&'static CStr; N],
    /// The device that the queues are connected to.
    #[pin]
    device: Mutex<Option<ARef<Device>>>,
    #[pin]
    queues: [Queue<H::Token, H::State>; N],
    #[pin]
    handler: H,
}

impl<H: Handler<N>, const N: usize> Virtqueues<H, N> {
    /// Creates virtqueues that are not connected to a device yet.
    ///
    /// `names` are for humans to tell the queues apart, and `states` is what the driver keeps under
    /// the lock of each of them.
    pub fn new<E>(
        names: [&'static CStr; N],
        states: [H::State; N],
        handler: impl PinInit<H, E>,
    ) -> Result<Arc<Self>>
    where
        Error: From<E>,
    {
        let mut states = states.into_iter();

        Arc::pin_init::<Error>(
            try_pin_init!(Self {
                link: Link {
                    stop: Self::stop_linked,
                },
                names,
                device <- new_mutex!(None),
                queues <- pin_init::pin_init_array_from_fn(move |_| Queue::new(states.next())),
                handler <- handler,
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Returns the driver's part.
    pub fn handler(&self) -> &H {
        &self.handler
    }

    /// Returns the device that the queues are connected to.
    ///
    /// As long as the result exists, they stay connected and the device stays bound:
    /// [`Virtqueues::stop`] waits for it, so it must not be called with it, and whatever
    /// [`Virtqueues::stop`] is called after must not need it. Process context, but not where a
    /// fence is to be signalled: [`Virtqueues::find`] and [`Virtqueues::restart`] allocate memory
    /// meanwhile.
    pub fn device(&self) -> Option<ConnectedDevice<'_>> {
        let device = self.device.lock();

        // INVARIANT: `stop()` has not disconnected the device yet, and cannot while it is locked. A
        // device is not unbound before that, see `Device::quiesce()`.
        Some(ConnectedDevice {
            dev: device.as_ref()?.clone(),
            _guard: device,
        })
    }

    /// Finds the virtqueues of `dev`, and connects them.
    ///
    /// To be called on a device that has been reset and has agreed on its features, which is what
    /// [`Driver::probe`](super::Driver::probe) and [`Driver::restore`](super::Driver::restore) are
    /// given. Process context.
    ///
    /// Errors: [`EBUSY`] if these queues or that device are connected already, or the device is
    /// being unbound, [`ENOMEM`], and those of the transport.
    pub fn find(self: &Arc<Self>, dev: &Device<Bound>) -> Result {
        let mut device = self.device.lock();

        if device.is_some() {
            return Err(EBUSY);
        }

        let link = Arc::into_raw(self.clone()).cast_mut();

        if dev
            .link()
            .cmpxchg(ptr::null_mut(), link.cast(), Full)
            .is_err()
        {
            // SAFETY: `link` is what `Arc::into_raw()` returned above.
            drop(unsafe { Arc::from_raw(link) });
            return Err(EBUSY);
        }
        // SAFETY: The link was just set, and `device` is locked.
        let linked = ScopeGuard::new(|| unsafe { self.unlink(dev) });

        // SAFETY: The device is linked, `device` is locked, and there are no virtqueues yet.
        unsafe { self.set_up(dev) }?;
        linked.dismiss();
        *device = Some(dev.into());
        Ok(())
    }

    /// Finds the virtqueues of `dev`.
    ///
    /// # Safety
    ///
    /// `dev` must be linked to this object, and have no virtqueues. `self.device` must be locked.
    unsafe fn set_up(&self, dev: &Device<Bound>) -> Result {
        let find_vqs = dev.config().find_vqs.ok_or(ENODEV)?;
        let mut vqs = [ptr::null_mut(); N];
        let mut infos = self.names.map(|name| bindings::virtqueue_info {
            name: name.as_char_ptr(),
            callback: Some(Self::interrupt),
            ctx: false,
        });

        // SAFETY: `dev` is a valid device whose driver has no other queues: they would need another
        // link. `vqs` and `infos` have `N` elements. The names are `'static`, and so is the
        // callback, which finds the link.
        to_result(unsafe {
            find_vqs(
                dev.as_raw(),
                N as c_uint,
                vqs.as_mut_ptr(),
                infos.as_mut_ptr(),
                ptr::null_mut(),
            )
        })?;
        let found = ScopeGuard::new(|| {
            // SAFETY: `dev` is a valid device, and nobody uses its queues.
            unsafe { bindings::virtio_reset_device(dev.as_raw()) };
            // SAFETY: The queues were just found, nobody uses them, and nothing was added.
            unsafe { Self::delete(dev) };
        });

        let indirect = dev.has_feature(bindings::VIRTIO_RING_F_INDIRECT_DESC);
        let mut rings = [const { None }; N];

        for (ring, vq) in rings.iter_mut().zip(vqs) {
            let vq = NonNull::new(vq).ok_or(ENOENT)?;

            // SAFETY: The queue was just found, nobody else uses it. `stop()` takes the structure
            // out before it resets the device and deletes the queue. If this function fails,
            // nothing was added, and the structure is only dropped.
            *ring = Some(Connected::new(unsafe { Ring::new(vq, indirect) }?)?);
        }

        found.dismiss();
        for ((queue, ring), vq) in self.queues.iter().zip(rings).zip(vqs) {
            queue.locked.lock().connected = ring;
            queue.notify.store(vq, Release);
        }
        Ok(())
    }

    /// Disconnects the queues from their device.
    ///
    /// In this order, nobody can add or get any more, no notification is under way, the device is
    /// reset, the queues are deleted, no interrupt handler is running, and every token that the
    /// device has not given back is passed to `reclaim`, along with the index of its queue. No lock
    /// is held then.
    ///
    /// Does nothing if they are not connected. If somebody else is in the middle of it, waits until
    /// the queues are deleted, but not for the other's `reclaim`. Process context.
    pub fn stop(&self, reclaim: impl FnMut(usize, H::Token)) {
        self.disconnect(self.device.lock(), reclaim);
    }

    /// Resets the device that the queues are connected to, agrees with it on the same features
    /// again, and connects the queues to it anew.
    ///
    /// For a device that needs a reset, see [`Device::needs_reset`] and [`Guard::is_broken`], or
    /// has to be brought into a known state. Every token that the device has not given back is
    /// passed to `reclaim`, as in [`Virtqueues::stop`]; the queues may be in use again by then. The
    /// device has to be told that its driver is [ready](Device::ready) afterwards. Process context.
    ///
    /// Errors: [`ENODEV`] if the queues are not connected, and those of [`Device::reset`] and
    /// [`Virtqueues::find`], after which they are not connected any more.
    pub fn restart(&self, reclaim: impl FnMut(usize, H::Token)) -> Result {
        let mut device = self.device.lock();
        let linked = device.as_ref().ok_or(ENODEV)?.clone();

        // SAFETY: The queues are connected to `linked`, and `device` is locked.
        let dev = unsafe { Self::connected(&linked) };

        // SAFETY: As above. The device stays linked, and hence bound, until this is over.
        let rings = unsafe { self.tear_down(dev) };

        // SAFETY: The device is linked, `device` is locked, and the queues were deleted.
        let result = dev.reinit().and_then(|()| unsafe { self.set_up(dev) });

        if result.is_err() {
            // Whatever it has agreed on, nobody talks to it.

            // SAFETY: `dev` is a valid device, and it has no queues.
            unsafe { bindings::virtio_reset_device(dev.as_raw()) };
            // SAFETY: As above.
            unsafe { self.unlink(dev) };
            *device = None;
        }
        drop(device);
        Self::reclaim(rings, reclaim);
        result
    }

    /// Returns a device as the bound one that it is.
    ///
    /// # Safety
    ///
    /// Queues of this type must be connected to `dev`, and stay so, with their `device` locked, for
    /// as long as the result is used: [`Device::quiesce`] waits for that before it is unbound.
    unsafe fn connected(dev: &Device) -> &Device<Bound> {
        // CAST: `Device` is a transparent wrapper of a type that doesn't depend on its generic
        // argument.
        let dev = (&raw const *dev).cast();

        // SAFETY: The pointer is from a reference, and by the safety requirements the device is
        // bound.
        unsafe { &*dev }
    }

    /// Implementation of [`Virtqueues::stop`].
    fn disconnect(
        &self,
        mut device: MutexGuard<'_, Option<ARef<Device>>>,
        reclaim: impl FnMut(usize, H::Token),
    ) {
        let Some(linked) = device.take() else {
            return;
        };

        // SAFETY: The queues are connected to `linked`, as far as its link goes, which is removed
        // last, and `device` is locked.
        let dev = unsafe { Self::connected(&linked) };

        // SAFETY: As above.
        let rings = unsafe { self.tear_down(dev) };

        // SAFETY: The device is linked, `device` is locked, and the queues were deleted.
        unsafe { self.unlink(dev) };
        drop(device);
        Self::reclaim(rings, reclaim);
    }

    /// Takes the queues away, in the order that [`Virtqueues::stop`] describes.
    ///
    /// # Safety
    ///
    /// `dev` must be linked to this object, its virtqueues must be those in `self.queues`, and
    /// `self.device` must be locked.
    unsafe fn tear_down(&self, dev: &Device<Bound>) -> [Option<Connected<H::Token>>; N] {
        let rings = array::from_fn::<_, N, _>(|index| {
            let queue = &self.queues[index];

            queue.notify.store(ptr::null_mut(), Release);
            queue.locked.lock().connected.take()
        });

        // From now on, nobody notifies a queue.
        rcu::synchronize_rcu();

        // SAFETY: `dev` is a valid device, and nobody uses its queues.
        unsafe { bindings::virtio_reset_device(dev.as_raw()) };

        // The device does not access memory any more: virtio-pci sees to that, and a device on
        // another transport is believed. What it was given is unmapped here.
        for Connected { ring, .. } in rings.iter().flatten() {
            // SAFETY: By the type invariant, `vq` is a valid virtqueue. Nobody else uses it, and
            // its device has been reset.
            while !unsafe { bindings::virtqueue_detach_unused_buf(ring.vq.as_ptr()) }.is_null() {}
        }

        // SAFETY: The queues were found, are not used any more, and there are no buffers in them.
        unsafe { Self::delete(dev) };
        rings
    }

    /// Gives up the tokens in queues that were deleted.
    fn reclaim(rings: [Option<Connected<H::Token>>; N], mut reclaim: impl FnMut(usize, H::Token)) {
        for (index, connected) in rings.into_iter().enumerate() {
            let Some(Connected {
                ring, mut tokens, ..
            }) = connected
            else {
                continue;
            };

            // With what the device could read and write, which may be large.
            drop(ring);
            for token in tokens.iter_mut().filter_map(Option::take) {
                reclaim(index, token);
            }
        }
    }

    /// Locks the queue `index`, with interrupts disabled. Any context.
    ///
    /// # Panics
    ///
    /// If there is no such queue.
    pub fn lock(&self, index: usize) -> Guard<'_, H::Token, H::State> {
        Guard(self.queues[index].locked.lock())
    }

    /// Notifies the device of what is in the queue `index`, if it is connected.
    ///
    /// If the transport cannot, the queue is [broken](Guard::is_broken), for which there is no
    /// interrupt: [`Handler::interrupt`] is called instead.
    ///
    /// Without the lock held: this may take as long as an exit to the hypervisor. Any context.
    ///
    /// # Panics
    ///
    /// If there is no such queue.
    pub fn notify(self: &Arc<Self>, index: usize) {
        let _guard = rcu::read_lock();
        let vq = self.queues[index].notify.load(Acquire);

        if !vq.is_null() {
            // SAFETY: `vq` was a valid virtqueue after the RCU read lock was taken, and
            // `tear_down()` waits for that to be released before it resets the device and deletes
            // the queue.
            let notified = unsafe { bindings::virtqueue_notify(vq) };

            // Under the same read lock: this is over when the queues are disconnected, too.
            if !notified {
                H::interrupt(self.as_arc_borrow(), index);
            }
        }
    }

    /// Deletes the virtqueues of `dev`.
    ///
    /// # Safety
    ///
    /// They must have been found, and not been deleted since. The device must have been reset,
    /// nobody may use the queues, and there must be no buffers in them.
    unsafe fn delete(dev: &Device<Bound>) {
        if let Some(del_vqs) = dev.config().del_vqs {
            // SAFETY: By the safety requirements.
            unsafe { del_vqs(dev.as_raw()) };
        }
    }

    /// Removes the link from `dev` to this object.
    ///
    /// # Safety
    ///
    /// It must be there, `self.device` must be locked, and there must be no virtqueues.
    unsafe fn unlink(&self, dev: &Device<Bound>) {
        let link = dev.link().xchg(ptr::null_mut(), Full);

        // `Device::quiesce()` may just have found the link.
        rcu::synchronize_rcu();

        // SAFETY: The link owned a reference, and is from `Arc::into_raw()` in `find()`.
        drop(unsafe { Arc::from_raw(link.cast::<Self>()) });
    }

    /// Implementation of [`Link::stop`].
    ///
    /// # Safety
    ///
    /// The requirements of [`Link::stop`]; `link` must be part of an object of this type.
    unsafe fn stop_linked(link: NonNull<Link>, dev: &Device<Bound>, guard: rcu::Guard) {
        // CAST: The link is the first field of a `repr(C)` structure.
        let this = link.as_ptr().cast::<Self>();

        // SAFETY: The pointer is from `Arc::into_raw()` in `find()`. The reference that it stands
        // for is not dropped before `unlink()` has waited for `guard`.
        let this: Arc<Self> = unsafe { ArcBorrow::from_raw(this) }.into();

        drop(guard);

        let device = this.device.lock();

        // They may have found another one in the meantime.
        if device
            .as_ref()
            .is_some_and(|device| device.as_raw() == dev.as_raw())
        {
            this.disconnect(device, |_, token| drop(token));
        }
    }

    /// The callback of every virtqueue.
    extern "C" fn interrupt(vq: *mut bindings::virtqueue) {
        // SAFETY: The virtio core calls this with a valid virtqueue.
        let (vdev, index) = unsafe { ((*vq).vdev, (*vq).index as usize) };
        // SAFETY: A virtqueue belongs to a valid device, and this one was found by `find()`, so
        // that device is bound.
        let dev = unsafe { &*vdev.cast::<Device<Bound>>() };
        let this = dev.link().load(Acquire).cast::<Self>();

        // SAFETY: `find()` sets the link before it finds virtqueues with this callback, and it is
        // removed after they were deleted, upon which they call back no more. It owns a reference
        // and is the pointer from `Arc::into_raw()`.
        let this = unsafe { ArcBorrow::from_raw(this) };

        // The transport has numbered them in the order of their names.
        if index < N {
            H::interrupt(this, index);
        }
    }
}

impl<T, S> Queue<T, S> {
    fn new(state: Option<S>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            locked <- new_spinlock_irq!(
                Locked {
                    connected: None,
                    state: state.ok_or(EINVAL)?,
                },
                "virtio::Virtqueues::queues"
            ),
            notify: Atomic::new(ptr::null_mut()),
        }? Error)
    }
}

// SAFETY:
//
// - `raw_get_work` and `work_container_of` return valid pointers by relying on the implementation
//   of `H`, which is stored inline in `Virtqueues`, so that the `container_of` call is valid.
//
// - They are true inverses of each other, since those of `H` are, and so are taking the address of
//   the field and `container_of`.
unsafe impl<H, const N: usize, const ID: u64> HasWork<Self, ID> for Virtqueues<H, N>
where
    H: Handler<N> + HasWork<Self, ID>,
{
    unsafe fn raw_get_work(ptr: *mut Self) -> *mut Work<Self, ID> {
        // SAFETY: The caller promises that `ptr` points to a valid `Self`.
        let handler = unsafe { &raw mut (*ptr).handler };

        // SAFETY: `handler` is a valid pointer.
        unsafe { H::raw_get_work(handler) }
    }

    unsafe fn work_container_of(ptr: *mut Work<Self, ID>) -> *mut Self {
        // SAFETY: The caller promises that `ptr` points to a `Work` in an `H`.
        let handler = unsafe { H::work_container_of(ptr) };

        // SAFETY: That `H` is the `handler` of a `Self`.
        unsafe { container_of!(handler, Self, handler) }
    }
}

impl<H, const N: usize, const ID: u64> WorkItem<ID> for Virtqueues<H, N>
where
    H: Handler<N> + HasWork<Self, ID> + WorkItem<ID, Pointer = Arc<Self>>,
{
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        H::run(this);
    }
}

/// A device that stays connected to its virtqueues, see [`Virtqueues::device`].
///
/// # Invariants
///
/// `dev` is bound.
pub struct ConnectedDevice<'a> {
    dev: ARef<Device>,
    _guard: MutexGuard<'a, Option<ARef<Device>>>,
}

impl Deref for ConnectedDevice<'_> {
    type Target = Device<Bound>;

    fn deref(&self) -> &Self::Target {
        // CAST: `Device` is a transparent wrapper of a type that doesn't depend on its generic
        // argument.
        let dev = (&raw const *self.dev).cast();

        // SAFETY: By the type invariant, the device is bound for as long as `self` exists, and
        // `self.dev` is a reference to it.
        unsafe { &*dev }
    }
}

/// Checks whether there is room for so many pieces of memory in a ring of which so many descriptors
/// are free.
fn check_room(pieces: usize, free: usize, size: usize, indirect: bool) -> Result {
    // A chain that is longer than the ring is forbidden, in an indirect table too.
    if pieces > size {
        return Err(E2BIG);
    }

    // Every slot in use takes a descriptor at least.
    if free < if indirect { 1 } else { pieces } {
        return Err(ENOSPC);
    }
    Ok(())
}

#[macros::kunit_tests(rust_virtio_queue)]
mod tests {
    use super::*;

    #[test]
    fn what_never_fits_is_not_waited_for() {
        for indirect in [false, true] {
            assert_eq!(check_room(16, 16, 16, indirect), Ok(()));
            assert_eq!(check_room(17, 16, 16, indirect), Err(E2BIG));
            assert_eq!(check_room(17, 0, 16, indirect), Err(E2BIG));
            assert_eq!(check_room(1, 0, 16, indirect), Err(ENOSPC));
        }
        assert_eq!(check_room(4, 3, 16, false), Err(ENOSPC));
        assert_eq!(check_room(4, 1, 16, true), Ok(()));
    }
}
