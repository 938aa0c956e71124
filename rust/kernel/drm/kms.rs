// SPDX-License-Identifier: GPL-2.0

//! Kernel mode setting (KMS).
//!
//! A KMS driver implements [`Driver`] next to [`drm::Driver`] and one trait for each kind of mode
//! object: [`DriverPlane`], [`DriverCrtc`] and [`DriverConnector`]. Between the allocation of the
//! DRM device and its registration it creates the objects through a [`Setup`]; from then on the
//! atomic helpers of the DRM core call the driver.
//!
//! Only atomic drivers whose buffers are GEM objects are supported. Each driver has one type of
//! plane, one of CRTC and one of connector, hence every object that the core hands to a callback is
//! of a type that is known at compile time. Objects live as long as the DRM device does: they are
//! allocated here, owned by the mode configuration and freed when the last reference to the device
//! is dropped.
//!
//! C headers: [`include/drm/drm_mode_config.h`](srctree/include/drm/drm_mode_config.h),
//! [`include/drm/drm_atomic_helper.h`](srctree/include/drm/drm_atomic_helper.h)

use crate::{
    alloc::KBox,
    bindings,
    drm,
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        Arc,
        Completion, //
    },
    types::{
        NotThreadSafe,
        Opaque, //
    },
    workqueue, //
};
use core::{
    cell::Cell,
    ptr, //
};

mod connector;
mod crtc;
mod edid;
mod encoder;
pub mod fourcc;
mod framebuffer;
mod mode;
mod plane;
mod rect;

pub use self::{
    connector::{
        Connector,
        ConnectorStatus,
        DriverConnector,
        Probe, //
    },
    crtc::{
        Crtc,
        DriverCrtc, //
    },
    encoder::Encoder,
    framebuffer::{
        Framebuffer,
        FramebufferPlane, //
    },
    mode::{
        DisplayMode,
        ModeStatus, //
    },
    plane::{
        DriverPlane,
        Plane,
        PlaneCheck,
        PlaneType,
        PlaneUpdate, //
    },
    rect::Rect, //
};

/// A DRM driver with kernel mode setting.
///
/// [`drm::Driver::FEAT_MODESET`] must be `true`; this is checked at compile time by
/// [`drm::UnregisteredDevice::kms_setup`].
pub trait Driver: drm::Driver + Sized + 'static {
    /// The driver's plane.
    type Plane: DriverPlane<Driver = Self>;

    /// The driver's CRTC.
    type Crtc: DriverCrtc<Driver = Self>;

    /// The driver's connector.
    type Connector: DriverConnector<Driver = Self>;

    /// Ends the hardware part of an atomic commit.
    ///
    /// Called once for each commit, in process context, after outputs were disabled, planes updated
    /// and outputs enabled, and before the commit is reported as done. A driver that queues its
    /// commands tells the hardware of them here, so that a commit costs one notification.
    ///
    /// Commits of the same CRTC never run at the same time, commits of different CRTCs may.
    fn commit_flush(dev: &drm::Device<Self>);
}

/// Limits and properties of a mode configuration.
///
/// C counterpart: the fields of the same names in `struct drm_mode_config`.
pub struct ModeConfig {
    /// Smallest width of a framebuffer, in pixels.
    pub min_width: u32,
    /// Smallest height of a framebuffer, in pixels.
    pub min_height: u32,
    /// Largest width of a framebuffer, in pixels. Wider modes are pruned.
    pub max_width: u32,
    /// Largest height of a framebuffer, in pixels. Higher modes are pruned.
    pub max_height: u32,
    /// Whether the pixel formats that the legacy `ADDFB` ioctl implies are in host byte order
    /// (`quirk_addfb_prefer_host_byte_order`).
    pub prefer_host_byte_order: bool,
}

/// The callbacks of a mode configuration, for driver `D`.
struct Vtables<D: Driver>(core::marker::PhantomData<D>);

impl<D: Driver> Vtables<D> {
    const MODE_CONFIG: bindings::drm_mode_config_funcs = bindings::drm_mode_config_funcs {
        fb_create: Some(bindings::drm_gem_fb_create_with_dirty),
        atomic_check: Some(bindings::drm_atomic_helper_check),
        atomic_commit: Some(Self::atomic_commit),
        ..pin_init::zeroed()
    };

    const MODE_CONFIG_HELPER: bindings::drm_mode_config_helper_funcs =
        bindings::drm_mode_config_helper_funcs {
            atomic_commit_tail: Some(Self::atomic_commit_tail),
            ..pin_init::zeroed()
        };

    /// `drm_atomic_helper_commit()`, which switches no output on while the device is unplugged.
    ///
    /// An ioctl may have begun before the device was unplugged, and end after its outputs were
    /// disabled for good.
    ///
    /// # Safety
    ///
    /// `state` must be a commit of `dev`, a device of driver `D`, that has been checked and is to
    /// be carried out.
    unsafe extern "C" fn atomic_commit(
        dev: *mut bindings::drm_device,
        state: *mut bindings::drm_atomic_commit,
        nonblock: bool,
    ) -> c_int {
        let mut idx = 0;

        // SAFETY: By the safety requirements of this function.
        if unsafe { bindings::drm_dev_enter(dev, &mut idx) } {
            // SAFETY: `drm_dev_enter()` has succeeded. There is no need to stay inside: outputs
            // are disabled after the device is unplugged, with the locks that the caller holds.
            unsafe { bindings::drm_dev_exit(idx) };
        } else {
            // SAFETY: By the safety requirements of this function. A commit has an entry for each
            // CRTC of its device, and both states of those that are a part of it are valid.
            let enables = unsafe {
                (0..(*dev).mode_config.num_crtc as usize).any(|i| {
                    let crtc = (*state).crtcs.add(i);
                    let (old, new) = ((*crtc).old_state, (*crtc).new_state);

                    !new.is_null() && (*new).active && !(*old).active
                })
            };

            if enables {
                return ENODEV.to_errno();
            }
        }

        // SAFETY: By the safety requirements of this function.
        unsafe { bindings::drm_atomic_helper_commit(dev, state, nonblock) }
    }

    /// `drm_atomic_helper_commit_tail()` with [`Driver::commit_flush`] in its middle, and without
    /// a look at states that are not ours any more.
    ///
    /// # Safety
    ///
    /// `state` must be a commit of a device of driver `D` that is ready to be carried out.
    unsafe extern "C" fn atomic_commit_tail(state: *mut bindings::drm_atomic_commit) {
        // SAFETY: By the safety requirements of this function, `state` is valid, and a commit holds
        // a reference to its device.
        let raw_dev = unsafe { (*state).dev };

        // SAFETY: By the safety requirements of this function, the device is one of driver `D`.
        // The commit keeps it alive until the end of this function.
        let dev = unsafe { drm::Device::<D>::from_raw(raw_dev) };

        // SAFETY: The DRM core calls this function with the state swapped in and its dependencies
        // waited for, which is where the helpers have to be called, in this order.
        unsafe {
            bindings::drm_atomic_helper_commit_modeset_disables(raw_dev, state);
            bindings::drm_atomic_helper_commit_planes(raw_dev, state, 0);
            bindings::drm_atomic_helper_commit_modeset_enables(raw_dev, state);
        }

        D::commit_flush(dev);

        // SAFETY: As above.
        unsafe {
            bindings::drm_atomic_helper_fake_vblank(state);
            bindings::drm_atomic_helper_commit_hw_done(state);
            // From here on the next commit may be carried out. When that ends it frees the new
            // states of this one, which `drm_atomic_helper_wait_for_vblanks()` goes by.
            bindings::drm_atomic_helper_wait_for_flip_done(raw_dev, state);
            bindings::drm_atomic_helper_cleanup_planes(raw_dev, state);
        }
    }
}

/// The time between the allocation of a KMS device and its registration, in which its mode objects
/// are created.
///
/// Created by [`drm::UnregisteredDevice::kms_setup`]. [`Setup::finish`] must be called before the
/// device can be registered.
///
/// # Invariants
///
/// The mode configuration of `dev` is initialized, and `dev` isn't registered for the duration of
/// `'a`.
pub struct Setup<'a, D: Driver> {
    dev: &'a drm::Device<D>,
    crtcs: Cell<u32>,
    _not_send: NotThreadSafe,
}

impl<D: Driver> drm::UnregisteredDevice<D> {
    /// Initializes the mode configuration, so that mode objects can be created.
    ///
    /// A device that turns out to have no outputs calls
    /// [`disable_modeset`](drm::UnregisteredDevice::disable_modeset) instead.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it was called before on this device, `ENOMEM`.
    ///
    /// C counterpart: `drmm_mode_config_init()`.
    pub fn kms_setup(&self, config: ModeConfig) -> Result<Setup<'_, D>> {
        const { assert!(D::FEAT_MODESET, "a KMS driver must set FEAT_MODESET") };

        let raw = self.as_raw();

        // SAFETY: The device isn't registered and `Self` isn't thread-safe, hence nobody else
        // initializes the mode configuration. The lists are zeroed when the device is allocated.
        if !unsafe { (*raw).mode_config.crtc_list.next }.is_null() {
            return Err(EBUSY);
        }

        // SAFETY: `raw` is a valid device whose mode configuration wasn't initialized yet.
        to_result(unsafe { bindings::drmm_mode_config_init(raw) })?;

        // SAFETY: As the device isn't registered, and `funcs` isn't set, nobody else looks at these
        // fields.
        let mode_config = unsafe { &raw mut (*raw).mode_config };

        // SAFETY: As above.
        unsafe {
            (*mode_config).min_width = config.min_width;
            (*mode_config).min_height = config.min_height;
            (*mode_config).max_width = config.max_width;
            (*mode_config).max_height = config.max_height;
            (*mode_config).quirk_addfb_prefer_host_byte_order = config.prefer_host_byte_order;
            (*mode_config).fb_modifiers_not_supported = true;
            (*mode_config).helper_private = &Vtables::<D>::MODE_CONFIG_HELPER;
        }

        // INVARIANT: The mode configuration was initialized above, and registration consumes the
        // `UnregisteredDevice` which is borrowed.
        Ok(Setup {
            dev: self,
            crtcs: Cell::new(0),
            _not_send: NotThreadSafe,
        })
    }
}

impl<'a, D: Driver> Setup<'a, D> {
    /// Creates a plane.
    ///
    /// Primary planes get the `FB_DAMAGE_CLIPS` property. `formats` are DRM fourcc codes, see
    /// [`fourcc`]. Bit `n` of `possible_crtcs` says that the plane can be used with the `n`-th
    /// CRTC.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there are too many formats, `ENOMEM`.
    ///
    /// C counterpart: `drm_universal_plane_init()`.
    pub fn new_plane(
        &self,
        plane_type: PlaneType,
        possible_crtcs: u32,
        formats: &[u32],
        data: impl PinInit<D::Plane, Error>,
    ) -> Result<&'a Plane<D::Plane>> {
        Plane::new(self.dev, plane_type, possible_crtcs, formats, data)
    }

    /// Creates a CRTC that scans out `primary`, with `cursor` on top of it.
    ///
    /// The CRTC gets the next index, starting from 0. It has vertical blanking events that are
    /// generated by a timer.
    ///
    /// # Errors
    ///
    /// `EINVAL` if a plane is of another device or of another type, or if there are 32 CRTCs
    /// already; `ENOMEM`.
    ///
    /// C counterpart: `drm_crtc_init_with_planes()`.
    pub fn new_crtc(
        &self,
        primary: &Plane<D::Plane>,
        cursor: Option<&Plane<D::Plane>>,
        data: impl PinInit<D::Crtc, Error>,
    ) -> Result<&'a Crtc<D::Crtc>> {
        if self.crtcs.get() >= 32 {
            return Err(EINVAL);
        }
        let crtc = Crtc::new(self.dev, primary, cursor, data)?;
        self.crtcs.set(self.crtcs.get() + 1);
        Ok(crtc)
    }

    /// Creates an encoder of type `VIRTUAL`.
    ///
    /// Bit `n` of `possible_crtcs` says that the encoder can be fed by the `n`-th CRTC.
    ///
    /// C counterpart: `drm_encoder_init()`.
    pub fn new_encoder(&self, possible_crtcs: u32) -> Result<&'a Encoder<D>> {
        Encoder::new(self.dev, possible_crtcs)
    }

    /// Creates a connector of type `VIRTUAL` that is fed by `encoder`.
    ///
    /// With `edid`, it has the `EDID` property, which [`Connector::update_edid`] sets.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `encoder` is one of another device, `ENOMEM`.
    ///
    /// C counterparts: `drm_connector_init()`, `drm_connector_attach_encoder()`,
    /// `drm_connector_attach_edid_property()`.
    pub fn new_connector(
        &self,
        encoder: &Encoder<D>,
        edid: bool,
        data: impl PinInit<D::Connector, Error>,
    ) -> Result<&'a Connector<D::Connector>> {
        Connector::new(self.dev, encoder, edid, data)
    }

    /// Completes the setup: no more objects can be created, and the device can be registered.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no CRTC, `ENOMEM`.
    ///
    /// C counterparts: `drm_vblank_init()`, `drm_mode_config_create_initial_state()`.
    pub fn finish(self) -> Result {
        if self.crtcs.get() == 0 {
            return Err(EINVAL);
        }

        let raw = self.dev.as_raw();

        // SAFETY: By the type invariants, the mode configuration of `raw` is initialized, the
        // device isn't registered and has that many CRTCs. `finish()` consumes `self`, hence it is
        // called at most once.
        to_result(unsafe { bindings::drm_vblank_init(raw, self.crtcs.get()) })?;

        // SAFETY: As above; nobody can have begun a commit yet.
        to_result(unsafe { bindings::drm_mode_config_create_initial_state(raw) })?;

        // SAFETY: `raw` is valid, and `funcs` isn't written to by anybody else.
        let funcs = unsafe { Atomic::from_ptr(&raw mut (*raw).mode_config.funcs) };

        // Pairs with the load in `is_ready()`: from here on, references to the device can be used
        // for commits.
        funcs.store(&Vtables::<D>::MODE_CONFIG, Release);

        Ok(())
    }
}

/// Returns whether the mode configuration of a device was completed by [`Setup::finish`].
///
/// # Safety
///
/// `dev` must be a valid DRM device that was created by [`drm::UnregisteredDevice::new`].
pub(super) unsafe fn is_ready(dev: *mut bindings::drm_device) -> bool {
    // SAFETY: `dev` is valid by the safety requirements of this function; `funcs` is written to
    // only by `Setup::finish()`, atomically.
    let funcs = unsafe { Atomic::from_ptr(&raw mut (*dev).mode_config.funcs) };

    !funcs.load(Acquire).is_null()
}

/// Disables all outputs, and forgets about what [`drm::Device::suspend`] has saved.
///
/// # Safety
///
/// `dev` must be a valid DRM device that was created by [`drm::UnregisteredDevice::new`].
pub(super) unsafe fn shutdown(dev: *mut bindings::drm_device) {
    // SAFETY: By the safety requirements of this function.
    if !unsafe { is_ready(dev) } {
        return;
    }

    // SAFETY: `dev` is valid and its mode configuration is complete.
    if let Some(state) = unsafe { take_suspend_state(dev) } {
        // SAFETY: `take_suspend_state()` handed its reference over to us.
        unsafe { bindings::drm_atomic_commit_put(state) };
    }

    let done = Arc::pin_init(Completion::new(), GFP_KERNEL);
    let spawned = done.as_ref().map_err(|e| *e).and_then(|done| {
        let (done, dev) = (done.clone(), dev.expose_provenance());

        workqueue::system_percpu()
            .try_spawn(GFP_KERNEL, move || {
                let dev = ptr::with_exposed_provenance_mut(dev);

                // SAFETY: Whoever has enqueued this waits for it, hence `dev` is still valid and
                // its mode configuration complete.
                unsafe { bindings::drm_atomic_helper_shutdown(dev) };
                done.complete_all();
            })
            .map_err(Error::from)
    });

    // The waits of a commit can be interrupted, and one that was has disabled nothing. No signal
    // reaches a work item.
    match (spawned, done) {
        (Ok(()), Ok(done)) => done.wait_for_completion(),
        // SAFETY: `dev` is valid and its mode configuration is complete.
        _ => unsafe { bindings::drm_atomic_helper_shutdown(dev) },
    }
}

/// Takes the reference to the saved state of a suspended device.
///
/// # Safety
///
/// `dev` must be a valid DRM device with a complete mode configuration.
unsafe fn take_suspend_state(
    dev: *mut bindings::drm_device,
) -> Option<*mut bindings::drm_atomic_commit> {
    // SAFETY: `dev` is valid. As this module doesn't use `drm_mode_config_helper_suspend()` and
    // `drm_mode_config_helper_resume()`, nobody else accesses the field.
    let saved = unsafe { Atomic::from_ptr(&raw mut (*dev).mode_config.suspend_state) };

    let state = saved.xchg(ptr::null_mut(), Full);
    (!state.is_null()).then_some(state)
}

/// All modeset locks of a device, held for a commit.
struct ModesetLocks {
    ctx: KBox<Opaque<bindings::drm_modeset_acquire_ctx>>,
    _not_send: NotThreadSafe,
}

impl ModesetLocks {
    /// Takes all modeset locks.
    ///
    /// # Safety
    ///
    /// `dev` must be a valid DRM device with a complete mode configuration, and stay valid for as
    /// long as the returned object exists.
    unsafe fn lock_all(dev: *mut bindings::drm_device) -> Result<Self> {
        let ctx = KBox::new(Opaque::uninit(), GFP_KERNEL)?;

        // SAFETY: `ctx` points to memory for an acquire context, at an address that doesn't change.
        unsafe { bindings::drm_modeset_acquire_init(ctx.get(), 0) };

        let this = Self {
            ctx,
            _not_send: NotThreadSafe,
        };

        loop {
            // SAFETY: `dev` is valid by the safety requirements of this function, and the context
            // was initialized above.
            let ret = unsafe { bindings::drm_modeset_lock_all_ctx(dev, this.ctx.get()) };
            match to_result(ret) {
                Ok(()) => return Ok(this),
                Err(EDEADLK) => {
                    // SAFETY: The last attempt to lock returned `-EDEADLK`.
                    to_result(unsafe { bindings::drm_modeset_backoff(this.ctx.get()) })?;
                }
                Err(err) => return Err(err),
            }
        }
    }
}

impl Drop for ModesetLocks {
    fn drop(&mut self) {
        // SAFETY: The context was initialized by `lock_all()`, on this thread. It holds all the
        // locks that are to be released.
        unsafe {
            bindings::drm_modeset_drop_locks(self.ctx.get());
            bindings::drm_modeset_acquire_fini(self.ctx.get());
        }
    }
}

/// Operations on the outputs of a device.
///
/// On a device without a complete [`Setup`], which is one without outputs, they do nothing. They
/// must be called from process context, without any modeset lock and from outside of the callbacks
/// of mode objects, since they take all modeset locks.
impl<D: Driver> drm::Device<D> {
    /// Suspends in-kernel clients, saves the state of all outputs, and disables them.
    ///
    /// # Errors
    ///
    /// - `EBUSY` if the device is suspended already.
    /// - The error of the commit that disables the outputs. They are as before then.
    ///
    /// C counterpart: `drm_mode_config_helper_suspend()`.
    pub fn suspend(&self) -> Result {
        let raw = self.as_raw();

        // SAFETY: `raw` was created by `UnregisteredDevice::new()`.
        if !unsafe { is_ready(raw) } {
            return Ok(());
        }

        // SAFETY: As in `take_suspend_state()`.
        let saved = unsafe { Atomic::from_ptr(&raw mut (*raw).mode_config.suspend_state) };
        if !saved.load(Acquire).is_null() {
            return Err(EBUSY);
        }

        // SAFETY: `raw` is a valid device.
        unsafe { bindings::drm_client_dev_suspend(raw) };

        // SAFETY: `raw` is a valid device with a complete mode configuration.
        let state = from_err_ptr(unsafe { bindings::drm_atomic_helper_suspend(raw) });
        let state = state.inspect_err(|_| {
            // SAFETY: `raw` is a valid device.
            unsafe { bindings::drm_client_dev_resume(raw) };
        })?;

        if saved.cmpxchg(ptr::null_mut(), state, Full).is_err() {
            // Somebody else was faster. Theirs is the state to go back to.

            // SAFETY: `drm_atomic_helper_suspend()` returned a reference which we own.
            unsafe { bindings::drm_atomic_commit_put(state) };
            return Err(EBUSY);
        }

        Ok(())
    }

    /// Restores the state of the outputs that [`suspend`](Self::suspend) has saved, and resumes
    /// in-kernel clients.
    ///
    /// Does nothing if the device isn't suspended. Unlike its C counterpart it doesn't reset the
    /// software state first: suspending has disabled every output, so that the commit which brings
    /// them back is a full mode set of each, and others may commit at the same time.
    ///
    /// # Errors
    ///
    /// The error of the commit that restores the outputs. The device counts as resumed then; its
    /// outputs remain disabled until user space or an in-kernel client enables them.
    ///
    /// C counterpart: `drm_mode_config_helper_resume()`.
    pub fn resume(&self) -> Result {
        let raw = self.as_raw();

        // SAFETY: `raw` was created by `UnregisteredDevice::new()`.
        if !unsafe { is_ready(raw) } {
            return Ok(());
        }

        // SAFETY: `raw` is a valid device with a complete mode configuration.
        let Some(state) = (unsafe { take_suspend_state(raw) }) else {
            return Ok(());
        };

        // SAFETY: `raw` is a valid device with a complete mode configuration, and `self` keeps it
        // alive.
        let result = unsafe { ModesetLocks::lock_all(raw) }.and_then(|locks| {
            // SAFETY: `state` is what `drm_atomic_helper_suspend()` returned for this device, and
            // all locks are held through this context.
            to_result(unsafe {
                bindings::drm_atomic_helper_commit_duplicated_state(state, locks.ctx.get())
            })
        });

        // SAFETY: `take_suspend_state()` handed its reference over to us, and `raw` is a valid
        // device.
        unsafe {
            bindings::drm_atomic_commit_put(state);
            bindings::drm_client_dev_resume(raw);
        }

        result
    }

    /// Tells user space and in-kernel clients that connectors have changed.
    ///
    /// Does nothing if the device has been unplugged. Process context.
    ///
    /// C counterpart: `drm_kms_helper_hotplug_event()`.
    pub fn hotplug_event(&self) {
        let raw = self.as_raw();
        let mut idx = 0;

        // SAFETY: `raw` was created by `UnregisteredDevice::new()`.
        if !unsafe { is_ready(raw) } {
            return;
        }

        // The nodes of the device, for which the event is, must not be removed meanwhile.
        //
        // SAFETY: `raw` is a valid device.
        if unsafe { bindings::drm_dev_enter(raw, &mut idx) } {
            // SAFETY: `raw` is a valid device with a complete mode configuration.
            unsafe { bindings::drm_kms_helper_hotplug_event(raw) };
            // SAFETY: `idx` is from the `drm_dev_enter()` above.
            unsafe { bindings::drm_dev_exit(idx) };
        }
    }

    /// Calls `f` for every connector of the device, in the order in which they were created.
    ///
    /// C counterpart: `drm_for_each_connector_iter()`.
    pub fn for_each_connector(&self, mut f: impl FnMut(&Connector<D::Connector>)) {
        let raw = self.as_raw();

        // SAFETY: `raw` was created by `UnregisteredDevice::new()`.
        if !unsafe { is_ready(raw) } {
            return;
        }

        let iter = Opaque::uninit();
        // SAFETY: `raw` is a valid device with a complete mode configuration, and `iter` is memory
        // for an iterator.
        unsafe { bindings::drm_connector_list_iter_begin(raw, iter.get()) };

        loop {
            // SAFETY: `iter` was initialized above.
            let connector = unsafe { bindings::drm_connector_list_iter_next(iter.get()) };
            if connector.is_null() {
                break;
            }
            // SAFETY: Every connector of a device of driver `D` is a `Connector<D::Connector>`. The
            // iterator holds a reference to it until the next round.
            f(unsafe { Connector::from_raw(connector) });
        }

        // SAFETY: `iter` was initialized above and isn't used anymore.
        unsafe { bindings::drm_connector_list_iter_end(iter.get()) };
    }
}
