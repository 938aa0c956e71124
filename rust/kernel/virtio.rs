// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the virtio bus.
//!
//! A virtio driver implements [`Driver`] and is registered with
//! [`driver::Registration`]`<`[`Adapter`]`<T>>`. It talks to its device through the configuration
//! space, see [`Device`], and through virtqueues, see [`queue::Virtqueues`].
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use crate::{
    bindings,
    container_of,
    device,
    device_id::RawDeviceId,
    driver,
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Release, //
        },
        rcu, //
    },
    task::might_sleep,
    types::Opaque,
    ThisModule, //
};
use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};

mod buffer;
pub mod queue;

/// An adapter for the registration of virtio drivers.
pub struct Adapter<T: Driver>(T);

// SAFETY:
// - `bindings::virtio_driver` is a C type declared as `repr(C)`.
// - `T::Data` is the type of the driver's device private data.
// - `struct virtio_driver` embeds a `struct device_driver`.
// - `DEVICE_DRIVER_OFFSET` is the correct byte offset to the embedded `struct device_driver`.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::virtio_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(Self::DriverType, driver);
}

// SAFETY: A call to `unregister` for a given instance of `DriverType` is guaranteed to be valid if
// a preceding call to `register` has been successful.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        vdrv: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: It's safe to set the fields of `struct virtio_driver` on initialization. The
        // tables and `PM_OPS` are `'static`, and so are the callbacks.
        unsafe {
            let vdrv = vdrv.get();

            (*vdrv).driver.name = name.as_char_ptr();
            (*vdrv).id_table = T::ID_TABLE.as_ptr();
            (*vdrv).feature_table = T::FEATURES.as_ptr();
            (*vdrv).feature_table_size = T::FEATURES.len().try_into()?;
            (*vdrv).probe = Some(Self::probe_callback);
            (*vdrv).remove = Some(Self::remove_callback);
            (*vdrv).validate = Some(Self::validate_callback);
            if T::HAS_SHUTDOWN {
                (*vdrv).shutdown = Some(Self::shutdown_callback);
            }
            if T::HAS_CONFIG_CHANGED {
                (*vdrv).config_changed = Some(Self::config_changed_callback);
            }
            if T::HAS_FREEZE {
                (*vdrv).freeze = Some(Self::freeze_callback);
            }
            if T::HAS_RESTORE {
                (*vdrv).restore = Some(Self::restore_callback);
            }
            if T::HAS_RESET_PREPARE {
                (*vdrv).reset_prepare = Some(Self::reset_prepare_callback);
            }
            if T::HAS_RESET_DONE {
                (*vdrv).reset_done = Some(Self::reset_done_callback);
            }
            if T::HAS_RESET_FAILED {
                (*vdrv).reset_failed = Some(Self::reset_failed_callback);
            }
            if T::HAS_SUSPEND || T::HAS_RESUME {
                let pm: &'static bindings::dev_pm_ops = &Self::PM_OPS;

                (*vdrv).driver.pm = pm;
            }
        }

        // SAFETY: `vdrv` is guaranteed to be a valid `DriverType`.
        to_result(unsafe { bindings::__register_virtio_driver(vdrv.get(), module.as_ptr()) })
    }

    unsafe fn unregister(vdrv: &Opaque<Self::DriverType>) {
        // SAFETY: `vdrv` is guaranteed to be a valid `DriverType`.
        unsafe { bindings::unregister_virtio_driver(vdrv.get()) }
    }
}

impl<T: Driver> Adapter<T> {
    const PM_OPS: bindings::dev_pm_ops = {
        let mut ops: bindings::dev_pm_ops = pin_init::zeroed();

        if T::HAS_SUSPEND {
            ops.suspend = Some(Self::suspend_callback::<{ PmPhase::SUSPEND }>);
            ops.freeze = Some(Self::suspend_callback::<{ PmPhase::FREEZE }>);
            ops.poweroff = Some(Self::suspend_callback::<{ PmPhase::POWER_OFF }>);
        }
        if T::HAS_RESUME {
            ops.resume = Some(Self::resume_callback::<{ PmPhase::SUSPEND }>);
            ops.thaw = Some(Self::resume_callback::<{ PmPhase::FREEZE }>);
            ops.restore = Some(Self::resume_callback::<{ PmPhase::POWER_OFF }>);
        }
        ops
    };

    extern "C" fn validate_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The virtio bus only ever calls the validate callback with a valid pointer to a
        // `struct virtio_device`.
        //
        // INVARIANT: `vdev` is valid for the duration of `validate_callback()`.
        let negotiation = Negotiation(unsafe { &*vdev.cast::<Device<device::Bound>>() });

        // The queue for the administration of a group of devices belongs to virtio-pci, which waits
        // without end for a device that does not answer there.
        negotiation.clear_feature(bindings::VIRTIO_F_ADMIN_VQ);

        from_result(|| {
            if T::HAS_VALIDATE {
                T::validate(&negotiation)?;
            }
            Ok(0)
        })
    }

    extern "C" fn probe_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The virtio bus only ever calls the probe callback with a valid pointer to a
        // `struct virtio_device`.
        //
        // INVARIANT: `vdev` is valid for the duration of `probe_callback()`.
        let vdev = unsafe { &*vdev.cast::<Device<device::CoreInternal<'_>>>() };

        vdev.open();
        from_result(|| {
            let data = T::probe(vdev);

            vdev.as_ref()
                .set_drvdata(data)
                .inspect_err(|_| vdev.quiesce())?;
            Ok(0)
        })
    }

    extern "C" fn remove_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The virtio bus only ever calls the remove callback with a valid pointer to a
        // `struct virtio_device`.
        //
        // INVARIANT: `vdev` is valid for the duration of `remove_callback()`.
        let vdev = unsafe { &*vdev.cast::<Device<device::CoreInternal<'_>>>() };

        // SAFETY: `remove_callback` is only ever called after a successful call to
        // `probe_callback`, hence it's guaranteed that `Device::set_drvdata()` has been called
        // and stored a `Pin<KBox<T::Data<'_>>>`.
        let data = unsafe { vdev.as_ref().drvdata_borrow::<T::Data<'_>>() };

        T::unbind(vdev, data);
        vdev.quiesce();
    }

    /// Calls `f` with the device and the driver's private data.
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid pointer to a `struct virtio_device` that stays bound to this driver
    /// for the duration of the call, after a successful `probe_callback()` and before
    /// `remove_callback()` returns.
    unsafe fn with_data(
        vdev: *mut bindings::virtio_device,
        f: impl for<'bound> FnOnce(
            &'bound Device<device::Core<'_>>,
            Pin<&'bound T::Data<'bound>>,
        ) -> Result,
    ) -> c_int {
        // SAFETY: By the safety requirements of this function.
        //
        // INVARIANT: `vdev` is valid for the duration of the callback.
        let vdev = unsafe { &*vdev.cast::<Device<device::CoreInternal<'_>>>() };

        // SAFETY: By the safety requirements of this function, `probe_callback()` has stored a
        // `Pin<KBox<T::Data<'_>>>`, and it is only dropped after `remove_callback()`.
        let data = unsafe { vdev.as_ref().drvdata_borrow::<T::Data<'_>>() };

        from_result(|| f(vdev, data).map(|()| 0))
    }

    extern "C" fn shutdown_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The virtio bus calls the shutdown callback with the device lock held, and only
        // for a device that has a driver. Probe and remove hold that lock too, and a device whose
        // probe failed has no driver.
        unsafe {
            Self::with_data(vdev, |dev, data| {
                T::shutdown(dev, data);
                Ok(())
            })
        };
    }

    extern "C" fn config_changed_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The virtio bus only ever calls the config_changed callback with a valid pointer
        // to a `struct virtio_device`.
        //
        // INVARIANT: `vdev` is valid for the duration of `config_changed_callback()`, and the
        // driver is bound for all of it, see below.
        let vdev = unsafe { &*vdev.cast::<Device<device::BoundInternal>>() };

        // SAFETY: The virtio core calls this with `config_lock` held and `config_core_enabled`
        // set. That is set after `probe_callback()` has succeeded, and cleared, under that lock,
        // before `remove_callback()` is called.
        let data = unsafe { vdev.as_ref().drvdata_borrow::<T::Data<'_>>() };

        T::config_changed(vdev, data);
    }

    extern "C" fn freeze_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The virtio core calls this with the device lock held, and only for a device that
        // has a driver. Probe and remove hold that lock too, and a device whose probe failed has
        // no driver.
        unsafe { Self::with_data(vdev, |dev, data| T::freeze(dev, data)) }
    }

    extern "C" fn restore_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: As for `freeze_callback()`.
        unsafe { Self::with_data(vdev, |dev, data| T::restore(dev, data)) }
    }

    extern "C" fn reset_prepare_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: As for `freeze_callback()`.
        unsafe { Self::with_data(vdev, |dev, data| T::reset_prepare(dev, data)) }
    }

    extern "C" fn reset_done_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: As for `freeze_callback()`.
        unsafe { Self::with_data(vdev, |dev, data| T::reset_done(dev, data)) }
    }

    extern "C" fn reset_failed_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: As for `freeze_callback()`.
        unsafe {
            Self::with_data(vdev, |dev, data| {
                T::reset_failed(dev, data);
                Ok(())
            })
        };
    }

    extern "C" fn suspend_callback<const PHASE: u8>(dev: *mut bindings::device) -> c_int {
        // SAFETY: The PM core only calls this with a device that is bound to this driver, which
        // is a `struct virtio_device`.
        let vdev = unsafe { container_of!(dev, bindings::virtio_device, dev) };

        // SAFETY: The PM core holds the device lock, as do probe and remove; a device whose probe
        // failed has no driver.
        unsafe {
            Self::with_data(vdev, |dev, data| {
                T::suspend(dev, data, PmPhase::from_const::<PHASE>())
            })
        }
    }

    extern "C" fn resume_callback<const PHASE: u8>(dev: *mut bindings::device) -> c_int {
        // SAFETY: As for `suspend_callback()`.
        let vdev = unsafe { container_of!(dev, bindings::virtio_device, dev) };

        // Where the transport failed to bring the device back, they are still off. The driver gets
        // another chance now.
        //
        // SAFETY: `vdev` is valid, and bound: the PM core calls this for nothing else, with the
        // device lock held. This is process context, and the lock of the configuration is free.
        unsafe { bindings::virtio_config_core_enable(vdev) };

        // SAFETY: As for `suspend_callback()`.
        unsafe {
            Self::with_data(vdev, |dev, data| {
                T::resume(dev, data, PmPhase::from_const::<PHASE>())
            })
        }
    }
}

/// Which transition of system sleep [`Driver::suspend`] and [`Driver::resume`] are called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PmPhase {
    /// Into or out of suspend to idle, standby or suspend to RAM (`suspend` and `resume` of
    /// `struct dev_pm_ops`).
    Suspend,
    /// Before or after the hibernation image is made (`freeze` and `thaw`).
    Freeze,
    /// Before the power is cut with an image on disk, or when that image has been loaded
    /// (`poweroff` and `restore`).
    PowerOff,
}

impl PmPhase {
    const SUSPEND: u8 = Self::Suspend as u8;
    const FREEZE: u8 = Self::Freeze as u8;
    const POWER_OFF: u8 = Self::PowerOff as u8;

    const fn from_const<const PHASE: u8>() -> Self {
        match PHASE {
            Self::SUSPEND => Self::Suspend,
            Self::FREEZE => Self::Freeze,
            Self::POWER_OFF => Self::PowerOff,
            _ => build_error!("not a phase"),
        }
    }
}

/// Abstraction for `bindings::virtio_device_id`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(bindings::virtio_device_id);

impl DeviceId {
    /// Creates a [`DeviceId`] that matches devices of type `device`, from any vendor.
    pub const fn new(device: u32) -> Self {
        Self(bindings::virtio_device_id {
            device,
            vendor: bindings::VIRTIO_DEV_ANY_ID,
        })
    }
}

// SAFETY: `DeviceId` is a `#[repr(transparent)]` wrapper of `virtio_device_id` and does not add
// additional invariants, so it's safe to transmute to `RawType`.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::virtio_device_id;
}

/// IdTable type for virtio drivers.
///
/// There is no room for driver data in `struct virtio_device_id`.
pub type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// Create a virtio `IdTable` with its alias for modpost.
#[macro_export]
macro_rules! virtio_device_table {
    ($table_name:ident, [$($id:expr),* $(,)?] $(,)?) => {
        $crate::module_device_table!(
            "virtio", $crate::virtio::DeviceId, $table_name, @none, [$($id),*]
        );
    };
}

/// The virtio driver trait.
///
/// Drivers must implement this trait in order to get a virtio driver registered.
///
/// # Examples
///
/// ```
/// use kernel::{
///     device::Core,
///     prelude::*,
///     virtio, //
/// };
///
/// struct Entropy;
///
/// kernel::virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(4)]);
///
/// #[vtable]
/// impl virtio::Driver for Entropy {
///     type Data<'bound> = Self;
///
///     const ID_TABLE: virtio::IdTable = &ID_TABLE;
///     const FEATURES: &'static [u32] = &[];
///
///     fn probe<'bound>(
///         _dev: &'bound virtio::Device<Core<'_>>,
///     ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
///         Err(ENODEV)
///     }
/// }
/// ```
#[vtable]
pub trait Driver {
    /// The type of the driver's bus device private data.
    ///
    /// [`Driver::config_changed`] may see it at the same time as any other callback.
    type Data<'bound>: Send + Sync + 'bound;

    /// The table of device ids supported by the driver.
    const ID_TABLE: IdTable;

    /// The feature bits that the driver knows and wants, if the device has them.
    ///
    /// Transport features need not be listed.
    const FEATURES: &'static [u32];

    /// Virtio driver feature validation.
    ///
    /// Called before [`Driver::probe`], after the device's features were read. The driver may
    /// refuse the device, or clear features. It is not called again when the device is restored.
    fn validate(dev: &Negotiation<'_>) -> Result {
        let _ = dev;
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// Virtio driver probe.
    ///
    /// Called when a device matches, and its features were negotiated. A driver that uses its
    /// queues before this is over calls [`Device::ready`] first. If it fails, queues that it found
    /// are stopped and the device is reset.
    fn probe<'bound>(
        dev: &'bound Device<device::Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// Virtio driver unbind.
    ///
    /// Called when a [`Device`] is unbound from its bound [`Driver`]. Implementing this callback
    /// is optional: queues that the driver does not stop are stopped after it, with their tokens
    /// dropped, and the device is reset.
    fn unbind<'bound>(dev: &'bound Device<device::Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
    }

    /// Virtio driver shutdown.
    ///
    /// Called when the system goes down or another kernel is started. Without it, the virtio core
    /// calls what [`Device::shutdown`] wraps; with it, that is up to the driver.
    fn shutdown<'bound>(dev: &'bound Device<device::Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The configuration space has changed.
    ///
    /// Called in atomic context, with the `config_lock` of the device held: the configuration
    /// space can only be read from somewhere else, such as a work item.
    fn config_changed(dev: &Device<device::Bound>, this: Pin<&Self::Data<'_>>) {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The transport is about to lose the state of the device, for system sleep.
    ///
    /// When this returns successfully, the queues must have been stopped. Not called by a
    /// transport that keeps the state, see [`Driver::suspend`].
    fn freeze<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The transport has brought back the device: it has been reset and has the features that
    /// were negotiated once, but no queues.
    fn restore<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The transport is about to reset the device, on behalf of an administrator for instance.
    ///
    /// When this returns successfully, the queues must have been stopped. On error the device is
    /// not touched by the virtio core, but may be reset all the same.
    fn reset_prepare<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The device has been reset and has the features that were negotiated once, but no queues.
    ///
    /// Not called if the device does not get that far, see [`Driver::reset_failed`].
    fn reset_done<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The device did not come back from the reset that [`Driver::reset_prepare`] was called for.
    ///
    /// Also called if [`Driver::reset_done`] has failed. Queues cannot be found.
    fn reset_failed<'bound>(dev: &'bound Device<device::Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// System sleep, whatever the transport does.
    ///
    /// Called for the virtio device itself, hence before [`Driver::freeze`], which the transport
    /// calls when its own device is suspended.
    fn suspend<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
        phase: PmPhase,
    ) -> Result {
        let _ = (dev, this, phase);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }

    /// The way back from [`Driver::suspend`], after [`Driver::restore`].
    ///
    /// [`Driver::restore`] is not called where the transport or the virtio core fails before its
    /// turn comes. The driver is told of configuration changes again from here on, even then.
    ///
    /// `phase` need not be the one of the last [`Driver::suspend`]: the kernel in a hibernation
    /// image was last told of [`PmPhase::Freeze`], and finds itself in [`PmPhase::PowerOff`].
    fn resume<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
        phase: PmPhase,
    ) -> Result {
        let _ = (dev, this, phase);
        build_error!(crate::error::VTABLE_DEFAULT_ERROR)
    }
}

/// The virtio device representation.
///
/// This structure represents the Rust abstraction for a C `struct virtio_device`. The
/// implementation abstracts the usage of an already existing C `struct virtio_device` within Rust
/// code that we get passed from the C side.
///
/// # Invariants
///
/// A [`Device`] instance represents a valid `struct virtio_device` created by the C portion of the
/// kernel.
///
/// While it is bound to a driver that was registered with [`Adapter`], its `priv` field is only
/// accessed by this module, and is one of
///
/// - NULL;
/// - `CLOSED`, which it is during [`Device::reset`], and from when the driver is unbound until the
///   device is probed again;
/// - a pointer to the `queue::Link` of the `Virtqueues` that are connected to this device, or are
///   about to be, which owns a reference to them.
#[repr(transparent)]
pub struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::virtio_device>,
    PhantomData<Ctx>,
);

/// A piece of memory that the device offers to the driver, see [`Device::shm_region`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShmRegion {
    /// Physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

impl<Ctx: device::DeviceContext> Device<Ctx> {
    fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }

    /// What connects the device with its virtqueues, see the type invariants.
    fn link(&self) -> &Atomic<*mut queue::Link> {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`.
        let link = unsafe { &raw mut (*self.as_raw()).priv_ };

        // SAFETY: `link` is a valid and aligned pointer that lives as long as `self`. The field is
        // for the driver, and this module is the only part of it that accesses it.
        unsafe { Atomic::from_ptr(link.cast()) }
    }

    fn config(&self) -> &bindings::virtio_config_ops {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`, and its operations neither change nor go away.
        unsafe { &*(*self.as_raw()).config }
    }
}

/// What [`Device::link`] points to when no virtqueues may be connected.
const CLOSED: *mut queue::Link = ptr::without_provenance_mut(usize::MAX);

impl Device<device::CoreInternal<'_>> {
    /// Allows virtqueues to be connected; a driver is about to be probed.
    fn open(&self) {
        // The driver before this one need not have been written in Rust, and have left anything.
        self.link().store(ptr::null_mut(), Release);
    }

    /// Makes sure that the device is quiet when its driver is unbound, or failed to probe.
    ///
    /// No virtqueues can be connected to it afterwards, and none are: the driver's private data
    /// and what device resource management releases may still have a reference to the bound
    /// device.
    fn quiesce(&self) {
        loop {
            let guard = rcu::read_lock();

            match self.link().cmpxchg(ptr::null_mut(), CLOSED, Full) {
                Err(link) if link != CLOSED => {
                    // SAFETY: By the type invariant, `link` points to the `Link` of `Virtqueues`
                    // that are connected to this device, and it did at some point after `guard`
                    // was taken.
                    unsafe { queue::Link::stop(NonNull::new_unchecked(link), self, guard) };
                }
                _ => break,
            }
        }

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`, and it has no virtqueues that could be notified.
        unsafe { bindings::virtio_reset_device(self.as_raw()) };
    }
}

impl Device<device::Core<'_>> {
    /// Resets the device and agrees with it on the features that were negotiated once.
    ///
    /// For a driver that has no queues, and wants to start over in the way of [`Driver::restore`].
    /// One that has some calls [`queue::Virtqueues::restart`]. Process context.
    ///
    /// Errors: [`EBUSY`] if queues are connected, [`ENODEV`] if the device does not agree.
    ///
    /// C counterpart: `virtio_device_reinit()`.
    pub fn reset(&self) -> Result {
        // Nobody can find queues meanwhile. This does not meet `quiesce()`: both are called by the
        // core, one after the other.
        self.link()
            .cmpxchg(ptr::null_mut(), CLOSED, Full)
            .map_err(|_| EBUSY)?;

        let result = self.reinit();

        self.link().store(ptr::null_mut(), Release);
        result
    }

    /// Raises the length of the pieces in which memory may be mapped for the
    /// [parent](Self::parent) to what its DMA operations can do. By default it is 64 KiB.
    ///
    /// For a driver that puts addresses into its commands: the length of what is in the queues is
    /// up to the virtio core. Called before anything is mapped.
    ///
    /// C counterparts: `dma_max_mapping_size()` and `dma_set_max_seg_size()`.
    pub fn lift_segment_limit(&self) {
        let parent = self.parent().as_raw();

        // SAFETY: `parent` is a valid device, whose bus has set the field, or hasn't, before
        // anything was bound to it.
        if unsafe { (*parent).dma_parms.is_null() } {
            // A bus without such limits, of vDPA devices for one.
            return;
        }

        // SAFETY: `parent` is a valid device.
        let max = unsafe { bindings::dma_max_mapping_size(parent) };
        let max = match u32::try_from(max) {
            Ok(0) | Err(_) => u32::MAX,
            Ok(max) => max,
        };

        // SAFETY: `parent` is a valid device. The limit is a number: whoever maps memory at the
        // same time goes by the old one or by the new one.
        unsafe { bindings::dma_set_max_seg_size(parent, max) };
    }

    /// Stops the device in the way that the virtio core does it for a driver without
    /// [`Driver::shutdown`]: breaks its queues, waits for callbacks, and resets it.
    ///
    /// Process context. C counterpart: `virtio_device_shutdown()`.
    pub fn shutdown(&self) {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. A device may be reset at any time: who uses its queues waits in
        // vain, no more. The transport keeps the list of them together under a lock.
        unsafe { bindings::virtio_device_shutdown(self.as_raw()) };
    }
}

impl Device<device::Bound> {
    /// Returns a bound reference to the parent [`device::Device`], to which the transport is bound:
    /// a PCI function, for instance.
    ///
    /// It is bound for longer than the driver: what a driver ties to it, a
    /// [`Devres`](crate::devres::Devres) for one, has to be dropped before the driver's module is.
    pub fn parent(&self) -> &device::Device<device::Bound> {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. Every transport registers it as a child of a device, and that
        // holds a reference to its parent.
        let parent: &device::Device =
            unsafe { device::Device::from_raw((*self.as_raw()).dev.parent) };

        // SAFETY: The parent is the device that the transport is bound to, or with vDPA the one
        // that does its DMA, whose driver removes the vDPA device. Either unregisters the virtio
        // device before it is unbound. A virtio device that is bound to a driver hence has a bound
        // parent.
        unsafe { parent.as_bound() }
    }

    /// Returns whether `bit` is among the features that were negotiated.
    ///
    /// Unlike in `virtio_has_feature()`, it may be any bit. A bit that Linux has no room for is
    /// not set.
    pub fn has_feature(&self, bit: u32) -> bool {
        if bit >= bindings::VIRTIO_FEATURES_BITS {
            return false;
        }

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. All of its feature words are always initialised, and `bit` is
        // within them. They may be written at the same time when the device is restored, hence the
        // volatile access; in the end they hold what they held before.
        let word = unsafe {
            (&raw const (*self.as_raw()).__bindgen_anon_1.features_array)
                .cast::<u64>()
                .add(bit as usize / 64)
                .read_volatile()
        };

        word & (1 << (bit % 64)) != 0
    }

    /// Returns whether the device has to be given DMA addresses of the [parent](Self::parent), and
    /// not guest physical addresses, by a driver that puts addresses into its commands.
    ///
    /// The C counterpart is `!virtio_has_dma_quirk()`; Xen guests always need DMA addresses.
    pub fn uses_dma_addresses(&self) -> bool {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. `xen_domain()` has no requirements.
        unsafe { !bindings::virtio_has_dma_quirk(self.as_raw()) || bindings::xen_domain() }
    }

    /// Returns the length of the configuration space in bytes, or [`None`] if there is none, or the
    /// transport cannot tell.
    ///
    /// A device may have a longer one than its type calls for, or a shorter one. Process context.
    pub fn config_len(&self) -> Option<usize> {
        let get_len = self.config().get_len?;

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`, whose transport implements this.
        Some(unsafe { get_len(self.as_raw()) })
    }

    /// Checks that there are four bytes at `offset` in the configuration space.
    fn config_offset(&self, offset: usize) -> Result<c_uint> {
        let len = self.config_len().ok_or(ENODEV)?;

        // Transports access memory mapped registers of that size, which have to be aligned.
        if offset % 4 != 0 || len.checked_sub(4).is_none_or(|last| offset > last) {
            return Err(EINVAL);
        }
        Ok(offset.try_into()?)
    }

    /// Reads the little-endian 32-bit field at `offset` bytes into the configuration space.
    ///
    /// Process context.
    ///
    /// Errors: [`ENODEV`] if there is no configuration space, or its length is unknown, [`EINVAL`]
    /// if it ends before the field does, or the field is not aligned.
    pub fn config_read_le32(&self, offset: usize) -> Result<u32> {
        might_sleep();

        let get = self.config().get.ok_or(ENODEV)?;
        let offset = self.config_offset(offset)?;
        let mut value = [0u8; 4];

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. The four bytes at `offset` are within the configuration space,
        // and `value` has room for them.
        unsafe { get(self.as_raw(), offset, value.as_mut_ptr().cast(), 4) };

        Ok(u32::from_le_bytes(value))
    }

    /// Writes the little-endian 32-bit field at `offset` bytes into the configuration space.
    ///
    /// Process context.
    ///
    /// Errors: as for [`Device::config_read_le32`].
    pub fn config_write_le32(&self, offset: usize, value: u32) -> Result {
        might_sleep();

        let set = self.config().set.ok_or(ENODEV)?;
        let offset = self.config_offset(offset)?;
        let value = value.to_le_bytes();

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. The four bytes at `offset` are within the configuration space,
        // and `value` has as many.
        unsafe { set(self.as_raw(), offset, value.as_ptr().cast(), 4) };

        Ok(())
    }

    /// Returns where the shared memory region `id` of the device is, if there is one.
    ///
    /// Address and length are the device's word.
    pub fn shm_region(&self, id: u8) -> Option<ShmRegion> {
        let mut region = bindings::virtio_shm_region::default();

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`, and `region` is valid for writes.
        let found = unsafe { bindings::virtio_get_shm_region(self.as_raw(), &mut region, id) };

        found.then_some(ShmRegion {
            addr: region.addr,
            len: region.len,
        })
    }

    fn status(&self) -> u32 {
        // Every transport implements this.
        let Some(get_status) = self.config().get_status else {
            return 0;
        };

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`.
        unsafe { get_status(self.as_raw()) }.into()
    }

    /// Tells the device that the driver is ready to use its queues (`DRIVER_OK`), if it was not
    /// told yet.
    ///
    /// Needed only by a driver that uses them before [`Driver::probe`] or [`Driver::restore`] is
    /// over. Process context, and not while somebody else does, or resets the device.
    pub fn ready(&self) {
        // Not the device is asked, which may say what it likes.
        //
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`. The field changes when the device is reset or made ready: the
        // core does that around the driver's callbacks, and `Virtqueues::restart()` and its caller
        // between them.
        let told = unsafe { (&raw const (*self.as_raw()).ready).read_volatile() };

        if !told {
            // SAFETY: As above. Reading and writing the status is up to the transport at any time.
            unsafe { bindings::virtio_device_ready(self.as_raw()) };
        }
    }

    /// Returns whether the device has given up, and has to be reset before it works again.
    ///
    /// Process context.
    pub fn needs_reset(&self) -> bool {
        let status = self.status();

        // All bits are set where there is no device any more.
        status != u8::MAX.into() && status & bindings::VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    fn reinit(&self) -> Result {
        might_sleep();

        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`, and it is bound. The callers see to it that nobody finds queues
        // meanwhile, and have deleted those that there were.
        to_result(unsafe { bindings::virtio_device_reinit(self.as_raw()) })
    }

    /// Has [`Driver::config_changed`] called, as the device does when it needs to be reset.
    ///
    /// For a part of a driver that has found out by itself. The call comes later where the virtio
    /// core has disabled it. Any context, but neither [`Driver::config_changed`] nor with a lock
    /// held that it takes.
    ///
    /// C counterpart: `virtio_config_changed()`.
    pub fn notify_config_changed(&self) {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct virtio_device`.
        unsafe { bindings::virtio_config_changed(self.as_raw()) };
    }
}

/// A [`Device`] whose features are being negotiated, see [`Driver::validate`].
///
/// It offers no more than that: the virtio core does not tell the driver if the negotiation fails
/// later on.
pub struct Negotiation<'a>(&'a Device<device::Bound>);

impl Negotiation<'_> {
    /// Returns whether `bit` is offered by the device and known to the driver, and has not been
    /// cleared.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.0.has_feature(bit)
    }

    /// Clears the feature `bit`, so that it is not negotiated.
    pub fn clear_feature(&self, bit: u32) {
        if bit >= bindings::VIRTIO_FEATURES_BITS {
            return;
        }

        // SAFETY: By its type invariant, `self.0.as_raw()` is a valid pointer to a
        // `struct virtio_device`, and `bit` is within the words. The virtio core expects the
        // driver to change them while it validates them, and does not access them itself.
        unsafe {
            let word = (&raw mut (*self.0.as_raw()).__bindgen_anon_1.features_array)
                .cast::<u64>()
                .add(bit as usize / 64);

            word.write_volatile(word.read_volatile() & !(1 << (bit % 64)));
        }
    }

    /// Returns the length of the configuration space, as [`Device::config_len`] does.
    pub fn config_len(&self) -> Option<usize> {
        self.0.config_len()
    }

    /// Reads from the configuration space, as [`Device::config_read_le32`] does.
    pub fn config_read_le32(&self, offset: usize) -> Result<u32> {
        self.0.config_read_le32(offset)
    }
}

impl AsRef<device::Device> for Negotiation<'_> {
    fn as_ref(&self) -> &device::Device {
        let dev: &Device = self.0;

        dev.as_ref()
    }
}

// SAFETY: `virtio::Device` is a transparent wrapper of `struct virtio_device`.
// The offset is guaranteed to point to a valid device field inside `virtio::Device`.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings::virtio_device, dev);
}

// SAFETY: `Device` is a transparent wrapper of a type that doesn't depend on `Device`'s generic
// argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: Instances of `Device` are always reference-counted.
unsafe impl crate::sync::aref::AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: The existence of a shared reference guarantees that the refcount is non-zero.
        unsafe { bindings::get_device(self.as_ref().as_raw()) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // CAST: `Self` is a transparent wrapper of `bindings::virtio_device`.
        let vdev: *mut bindings::virtio_device = obj.cast().as_ptr();

        // SAFETY: By the type invariant of `Self`, `vdev` is a pointer to a valid
        // `struct virtio_device`.
        let dev = unsafe { &raw mut (*vdev).dev };

        // SAFETY: The safety requirements guarantee that the refcount is non-zero.
        unsafe { bindings::put_device(dev) }
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant of `Self`, `self.as_raw()` is a pointer to a valid
        // `struct virtio_device`.
        let dev = unsafe { &raw mut (*self.as_raw()).dev };

        // SAFETY: `dev` points to a valid `struct device`.
        unsafe { device::Device::from_raw(dev) }
    }
}

// SAFETY: A `Device` is always reference-counted and can be released from any thread.
unsafe impl Send for Device {}

// SAFETY: `Device` can be shared among threads because all methods of `Device` (i.e.
// `Device<Normal>`) are thread safe.
unsafe impl Sync for Device {}

// SAFETY: Same as `Device<Normal>` -- the underlying `struct virtio_device` is the same; `Bound` is
// a zero-sized type-state marker that does not affect thread safety.
unsafe impl Sync for Device<device::Bound> {}
