// SPDX-License-Identifier: GPL-2.0

//! Buffers: a GEM object in the guest, a resource on the host.
//!
//! A resource is made from a *recipe*, [`Resource`], which outlives whatever the host forgets.
//! [`Resources`] holds all recipes there are, so that a host that has lost everything can be given
//! everything again, contents included: they are in the guest's memory.

use core::mem::MaybeUninit;
use kernel::{
    drm::{
        self,
        gem::{
            shmem,
            DriverFile,
            DriverObject,
            DumbBuffer,
            OwnedObject, //
        }, //
    },
    new_mutex,
    page::page_align,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode, //
    },
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SetOnce, //
    },
    virtio::queue::Payload, //
};

use crate::{
    command::{
        self,
        Rect, //
    },
    driver::DrmDriver,
    queue::{
        Held,
        Queue,
        Tally,
        Turn,
        Who,
        CTRL, //
    },
    uapi, //
};

/// Bytes of a pixel: all formats of the driver have 32 bits.
pub(crate) const CPP: u32 = 4;

/// The resource that tells whether the host has kept its resources. No object gets this id.
pub(crate) const SENTINEL: u32 = u32::MAX;

/// What a resource was made from, and is made from again.
pub(crate) struct Resource {
    pub(crate) id: u32,
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// The backing as it goes over the wire, an array of `virtio_gpu_mem_entry`, and how many there
    /// are.
    backing: Arc<Payload>,
    nr_entries: u32,
    /// What the host has been told since it last forgot everything. Changed with
    /// [`Resources::live`] locked.
    told: Atomic<u32>,
}

/// The host does not know the resource.
const UNKNOWN: u32 = 0;
/// It has been told to create the resource.
const CREATED: u32 = 1;
/// It has been told where the backing is, too.
const BACKED: u32 = 2;
/// It has been told to fetch the contents, if there are any.
const FILLED: u32 = 3;

impl Resource {
    fn all(&self) -> Rect {
        Rect {
            x: 0,
            y: 0,
            width: self.width,
            height: self.height,
        }
    }

    /// Whether the host has been told all there is.
    pub(crate) fn is_complete(&self) -> bool {
        self.told.load(Relaxed) == FILLED
    }

    /// Tells the host what is still missing, with `fill` the contents, too, as far as there is
    /// room: [`EAGAIN`] if there was none, as from [`Queue::try_submit`]. The caller holds
    /// [`Resources::live`].
    fn tell(
        &self,
        queue: &Queue,
        fill: bool,
        who: Who,
        tally: Option<&Arc<Tally>>,
        turn: &mut Turn,
    ) -> Result {
        loop {
            let told = self.told.load(Relaxed);
            let sent = match told {
                UNKNOWN => queue.try_submit(
                    &command::resource_create_2d(
                        self.id,
                        uapi::FORMAT_HOST_XRGB8888,
                        self.width,
                        self.height,
                    ),
                    None,
                    tally,
                    who,
                    turn,
                ),
                CREATED => queue.try_submit(
                    &command::resource_attach_backing(self.id, self.nr_entries),
                    Some(&self.backing),
                    tally,
                    who,
                    turn,
                ),
                BACKED if fill => queue.try_submit(
                    &command::transfer_to_host_2d(self.id, 0, self.all()),
                    None,
                    tally,
                    who,
                    turn,
                ),
                BACKED => Ok(()),
                _ => return Ok(()),
            };

            sent?;
            self.told.store(told + 1, Relaxed);
        }
    }

    /// Sends the contents to the host: a rectangle of it. Lines are `pitch` bytes apart.
    pub(crate) fn transfer(&self, queue: &Queue, rect: Rect, offset: u64) -> Result {
        queue.submit(
            &command::transfer_to_host_2d(self.id, offset, rect),
            None,
            Who::Kernel,
        )
    }

    /// Brings a rectangle onto every scanout that shows the resource.
    pub(crate) fn flush(&self, queue: &Queue, rect: Rect) -> Result {
        queue.submit(&command::resource_flush(self.id, rect), None, Who::Kernel)
    }
}

/// What a scanout shows: part of a resource, or nothing (resource 0).
#[derive(Clone, Copy, Default)]
pub(crate) struct Shown {
    pub(crate) resource: u32,
    pub(crate) rect: Rect,
}

/// What all scanouts show.
pub(crate) type Screens = [Shown; uapi::MAX_SCANOUTS];

/// All resources that the host has, or ought to have.
#[pin_data]
pub(crate) struct Resources {
    queue: Queue,
    /// Ids are not used again: a host that is slow to forget must not mix up two resources.
    next_id: Atomic<u64>,
    #[pin]
    live: Mutex<RBTree<u32, Arc<Resource>>>,
}

impl Resources {
    pub(crate) fn new(queue: Queue) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                queue,
                next_id: Atomic::new(1),
                live <- new_mutex!(RBTree::new()),
            }),
            GFP_KERNEL,
        )
    }

    /// Writes a new recipe, which is not entered yet.
    fn recipe(
        &self,
        width: u32,
        height: u32,
        backing: KVVec<uapi::MemEntry>,
    ) -> Result<Arc<Resource>> {
        // Until there have been four billion. The sentinel is never given away.
        let id = u32::try_from(self.next_id.fetch_add(1, Relaxed))
            .ok()
            .filter(|id| *id != SENTINEL)
            .ok_or(ENOSPC)?;
        let nr_entries = u32::try_from(backing.len())?;

        Ok(Arc::new(
            Resource {
                id,
                width,
                height,
                backing: Arc::new(Payload::new(backing)?, GFP_KERNEL)?,
                nr_entries,
                told: Atomic::new(UNKNOWN),
            },
            GFP_KERNEL,
        )?)
    }

    /// Enters a new recipe, and has the host make a resource from it. It learns of it with the next
    /// [`Queue::kick`].
    fn add(&self, resource: &Arc<Resource>) -> Result {
        // Before the lock is taken, which who frees memory takes as well.
        let node = RBTreeNode::new(resource.id, resource.clone(), GFP_KERNEL)?;
        self.live.lock().insert(node);
        self.make(resource.id, false, Who::Ioctl, None).map(drop)
    }

    /// Has the host make a resource, with `fill` from the contents of its backing, too. It learns
    /// of it with the next [`Queue::kick`].
    ///
    /// Returns whether there is such a resource. The lock is not held while this waits: recovery
    /// may get in between, and do part of it.
    fn make(&self, id: u32, fill: bool, who: Who, tally: Option<&Arc<Tally>>) -> Result<bool> {
        let mut turn = Turn::default();

        loop {
            let live = self.live.lock();
            let Some(resource) = live.get(&id) else {
                return Ok(false);
            };

            match resource.tell(&self.queue, fill, who, tally, &mut turn) {
                Err(e) if e == EAGAIN => {}
                result => return result.map(|()| true),
            }
            drop(live);
            self.queue.wait_turn(who, &mut turn)?;
        }
    }

    /// Strikes a recipe out and tells the host, which lets go of `held`, what the resource was made
    /// of. Does not wait for anything: who frees memory may hold any lock.
    fn remove(&self, id: u32, held: KBox<Held>) {
        let mut live = self.live.lock();
        let resource = live.remove(&id);

        // Under the lock: a host that comes back in between must not be given a resource that
        // nobody will ever destroy, nor be told to destroy what it does not have.
        let unused = match &resource {
            Some(resource) if resource.told.load(Relaxed) != UNKNOWN => self.queue.unref(held),
            _ => Some(held),
        };

        drop(live);
        drop((resource, unused));
    }

    /// Creates every resource again on a host that has none, sends its contents, and shows what is
    /// in `screens`, which comes first. The commands are in the queue when this returns, and the
    /// host has been told; what becomes of them is in `tally` when the queue is idle.
    ///
    /// A scanout that there is no memory for becomes `dark`.
    ///
    /// Returns how many resources there are.
    pub(crate) fn recover(
        &self,
        screens: &Screens,
        dark: &[Atomic<bool>],
        tally: &Arc<Tally>,
    ) -> Result<usize> {
        let queue = &self.queue;
        let live = self.live.lock();
        let forgotten = queue.forget();

        for resource in live.values() {
            resource.told.store(UNKNOWN, Relaxed);
        }
        drop(live);
        drop(forgotten);

        for (scanout, (shown, dark)) in (0..).zip(screens.iter().zip(dark)) {
            if shown.resource == 0 {
                continue;
            }
            match self.show_again(scanout, shown, tally) {
                // As in `make_again()`, which has another try below. The next commit shows it.
                Err(e) if e == ENOMEM || e == E2BIG => {
                    dark.store(true, Relaxed);
                    tally.fail();
                }
                result => result?,
            }
        }
        queue.kick(CTRL);

        let mut count = 0;
        let mut next = 0;

        loop {
            let live = self.live.lock();
            let Some(id) = live.cursor_lower_bound(&next).map(|at| *at.current().0) else {
                break;
            };

            drop(live);
            count += usize::from(self.make_again(id, tally)?);
            next = id + 1;
        }
        queue.kick(CTRL);
        Ok(count)
    }

    /// Has the host show a resource that it has forgotten, if there is one.
    fn show_again(&self, scanout: u32, shown: &Shown, tally: &Arc<Tally>) -> Result {
        let queue = &self.queue;

        if !self.make(shown.resource, true, Who::Pm, Some(tally))? {
            return Ok(());
        }
        queue.submit(
            &command::set_scanout(scanout, shown.resource, shown.rect),
            Some(tally),
            Who::Pm,
        )?;
        queue.submit(
            &command::resource_flush(shown.resource, shown.rect),
            Some(tally),
            Who::Pm,
        )
    }

    /// Has the host make a resource that it has forgotten. Returns whether there is one.
    fn make_again(&self, id: u32, tally: &Arc<Tally>) -> Result<bool> {
        match self.make(id, true, Who::Pm, Some(tally)) {
            // One that there is no memory for is no reason to give up the others.
            Err(e) if e == ENOMEM || e == E2BIG => {
                tally.fail();
                Ok(true)
            }
            result => result,
        }
    }
}

/// Room for an object that waits for the host to forget it. Allocated with the object, because
/// freeing one cannot fail.
type Room = KBox<MaybeUninit<Held<OwnedObject<Object>>>>;

/// What the driver keeps with a GEM object.
#[pin_data]
pub(crate) struct Object {
    resources: Arc<Resources>,
    /// The host's side of it, once there is one.
    resource: SetOnce<Arc<Resource>>,
    #[pin]
    room: Mutex<Option<Room>>,
}

impl Object {
    /// The host's side of the object.
    pub(crate) fn resource(&self) -> Option<&Resource> {
        self.resource.as_ref().map(|resource| &**resource)
    }

    /// Has the host make its side of the object, which there was no memory for when it was
    /// recovered. It learns of it with the next [`Queue::kick`].
    ///
    /// Context and errors: as for [`Queue::submit`].
    pub(crate) fn complete(&self) -> Result {
        match self.resource() {
            Some(resource) => self
                .resources
                .make(resource.id, true, Who::Kernel, None)
                .map(drop),
            None => Ok(()),
        }
    }
}

#[vtable]
impl DriverObject for Object {
    type Driver = DrmDriver;
    type Args = Room;

    fn new(dev: &drm::Device<DrmDriver>, _size: usize, room: Room) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            resources: dev.resources.clone(),
            resource: SetOnce::new(),
            room <- new_mutex!(Some(room)),
        })
    }

    #[inline]
    fn dumb_create(
        dev: &drm::Device<DrmDriver, drm::Registered>,
        _file: &DriverFile<Self>,
        args: &mut DumbBuffer,
    ) -> Result<ARef<shmem::Object<Self>>> {
        if args.bpp != CPP * 8 {
            return Err(EINVAL);
        }

        let pitch = args.width.checked_mul(CPP).ok_or(EINVAL)?;
        let size = usize::try_from(u64::from(pitch) * u64::from(args.height))?;
        let size = page_align(size).ok_or(EINVAL)?;
        let room = KBox::new_uninit(GFP_KERNEL)?;
        let object = shmem::Object::<Self>::new(dev, size, Default::default(), room)?;
        let dma = dev.features.dma_addresses.then(|| dev.as_ref());

        let runs = object.runs(dma)?;
        // It stays as long as the object does: no more than it takes.
        let mut backing = KVVec::with_capacity(runs.clone().count(), GFP_KERNEL)?;
        for run in runs {
            backing.push(command::mem_entry(run.addr, run.len), GFP_KERNEL)?;
        }

        let resource = dev.resources.recipe(args.width, args.height, backing)?;
        // From here on the object's end is the resource's, too.
        object.resource.populate(resource.clone());
        dev.resources.add(&resource)?;
        dev.queue.kick(CTRL);

        args.pitch = pitch;
        args.size = size as u64;
        Ok(object)
    }

    #[inline]
    fn free(obj: OwnedObject<Self>) {
        let resources = obj.resources.clone();
        let (Some(id), Some(room)) = (
            obj.resource().map(|resource| resource.id),
            obj.room.lock().take(),
        ) else {
            return;
        };

        resources.remove(id, Held::new(room, id, obj));
    }
}
