// SPDX-License-Identifier: GPL-2.0

//! The virtio driver, and the DRM device that it registers.
//!
//! The DRM device belongs to the parent of the virtio device, a PCI function or a platform device,
//! as it does in the C driver: user space looks for the GPU there.

use kernel::{
    device::{
        self,
        Bound,
        Core, //
    },
    drm,
    impl_has_work,
    new_mutex,
    new_spinlock,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    virtio::{
        self,
        PmPhase, //
    },
    workqueue::{
        self,
        Work,
        WorkItem, //
    }, //
};

use crate::{
    command,
    debugfs,
    display,
    features::{
        self,
        Features, //
    },
    file::File,
    module_parameters,
    object::{
        Object,
        Resources,
        Screens, //
    },
    pm,
    queue::{
        Gate,
        Queue,
        Who, //
    },
    uapi, //
};

/// The DRM driver.
pub(crate) struct DrmDriver;

/// The DRM device.
pub(crate) type Device = drm::Device<DrmDriver>;

/// What the driver knows of one GPU; lives as long as the DRM device does.
#[pin_data]
pub(crate) struct Gpu {
    pub(crate) queue: Queue,
    pub(crate) features: Features,
    /// The host has proved that it can be told of suspend.
    pub(crate) freezing: Atomic<bool>,
    pub(crate) resources: Arc<Resources>,
    /// What the scanouts were last told to show.
    #[pin]
    pub(crate) screens: SpinLock<Screens>,
    /// The scanouts that may not show what they were last told to.
    pub(crate) dark: [Atomic<bool>; uapi::MAX_SCANOUTS],
    #[pin]
    pub(crate) pm: Mutex<pm::State>,
    #[pin]
    config_changed: Work<Device, 0>,
    #[pin]
    hotplug: Work<Device, 1>,
}

impl_has_work! {
    impl HasWork<Device, 0> for Gpu { self.config_changed }
    impl HasWork<Device, 1> for Gpu { self.hotplug }
}

impl Gpu {
    fn new(queue: Queue, features: Features) -> Result<impl PinInit<Self, Error>> {
        let resources = Resources::new(queue.clone())?;

        Ok(try_pin_init!(Self {
            queue,
            features,
            freezing: Atomic::new(false),
            resources,
            screens <- new_spinlock!(Screens::default()),
            dark: [const { Atomic::new(false) }; uapi::MAX_SCANOUTS],
            pm <- new_mutex!(pm::State::new()),
            config_changed <- new_work!("virtgpu_rs::config_changed"),
            hotplug <- new_work!("virtgpu_rs::hotplug"),
        }))
    }

    /// Whether there is anything to show pictures on.
    pub(crate) fn has_display(&self) -> bool {
        self.features.num_scanouts > 0
    }
}

impl WorkItem<0> for Gpu {
    type Pointer = ARef<Device>;

    fn run(drm: Self::Pointer) {
        if pm::config_changed(&drm) {
            // Not here: it sets a mode on the console, and a device that breaks then is mended
            // here. Already queued is as good.
            let _ = workqueue::system_percpu().enqueue::<ARef<Device>, 1>(drm);
        }
    }
}

impl WorkItem<1> for Gpu {
    type Pointer = ARef<Device>;

    fn run(drm: Self::Pointer) {
        drm.hotplug_event();
    }
}

#[vtable]
impl drm::Driver for DrmDriver {
    type Data = Gpu;
    type RegistrationData<'a> = ();
    type File = File;
    type Object = drm::gem::shmem::Object<Object>;
    type ParentDevice<Ctx: device::DeviceContext> = device::Device<Ctx>;

    // The name and the version by which user space knows the C driver.
    const INFO: drm::DriverInfo = drm::DriverInfo {
        major: 0,
        minor: 1,
        patchlevel: 0,
        name: c"virtio_gpu",
        desc: c"virtio GPU",
    };
    const FEAT_RENDER: bool = true;
    const FEAT_MODESET: bool = true;
    const FEAT_SYNCOBJ: bool = true;
    const HUGE_PAGES: bool = true;
    const IOCTLS: &'static [drm::ioctl::DrmIoctlDescriptor] = &[];
}

/// The virtio driver.
pub(crate) struct VirtioDriver;

/// What belongs to the binding of the driver to a device.
#[pin_data]
pub(crate) struct DriverData<'bound> {
    drm: ARef<Device>,
    /// Taken out, and with it user space shut out, when the driver is unbound.
    #[pin]
    registration: Mutex<Option<drm::Registration<'bound, DrmDriver>>>,
}

kernel::virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(uapi::VIRTIO_ID_GPU)]);

/// Whether the administrator wants no graphics driver, or not this one.
fn is_disabled() -> bool {
    match *module_parameters::modeset.value_ref() {
        0 => true,
        -1 => drm::aperture::firmware_drivers_only(),
        _ => false,
    }
}

/// Brings up the engine and asks the host what there is to show. Nobody knows of the device yet.
fn start(dev: &virtio::Device<Bound>, drm: &Device) -> Result {
    let queue = &drm.queue;

    queue.init_vqs(dev)?;
    queue.open();

    if drm.features.freezing {
        // A host may still keep what a guest that crashed in its sleep had left, and it has to
        // prove that it knows the command: its bit may mean something else.
        match queue.call(&command::status_freezing(false), Who::Kernel) {
            Ok(_) => {
                drm.freezing.store(true, Relaxed);
                dev_info!(dev.parent(), "[drm] features: +freezing\n");
            }
            Err(e) => dev_warn!(
                dev.parent(),
                "[drm] the host offers freezing, but does not know it: {:?}\n",
                e
            ),
        }
    }
    if drm.has_display() {
        display::refresh(drm)?;
    }
    Ok(())
}

#[vtable]
impl virtio::Driver for VirtioDriver {
    type Data<'bound> = DriverData<'bound>;

    const ID_TABLE: virtio::IdTable = &ID_TABLE;
    const FEATURES: &'static [u32] = &features::TABLE;

    fn validate(dev: &virtio::Negotiation<'_>) -> Result {
        features::negotiate(dev)
    }

    fn probe<'bound>(
        dev: &'bound virtio::Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            if is_disabled() {
                return Err(EINVAL);
            }

            let parent = dev.parent();

            drm::aperture::remove_conflicting(parent, c"virtio_gpu")?;
            dev.lift_segment_limit();

            let features = Features::new(dev)?;
            let queue = Queue::new(parent)?;
            let drm = drm::UnregisteredDevice::<DrmDriver>::new(
                parent,
                Gpu::new(queue.clone(), features)?,
            )?;

            if drm.has_display() {
                display::init(&drm)?;
            } else {
                drm.disable_modeset();
            }

            let device: ARef<Device> = (&*drm).into();

            start(dev, &device)
                .and_then(|()| {
                    drm::Registration::new_static(dev.as_ref(), parent, drm, Ok::<_, Error>(()))
                })
                .inspect_err(|_| queue.stop(false, Gate::Gone))
                .map(|registration| {
                    debugfs::init(&registration);
                    drm::client::setup(&registration);
                    try_pin_init!(DriverData {
                        drm: device,
                        registration <- new_mutex!(Some(registration)),
                    })
                })
        })
    }

    fn unbind<'bound>(_dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let drm = &this.drm;

        // Whoever is in a system call, or in one of these, must find out: unplugging waits for
        // them.
        drm.queue.set_gate(Gate::Gone);
        drm.config_changed.flush();
        drm.hotplug.flush();

        let registration = this.registration.lock().take();
        drop(registration);

        drm.queue.stop(false, Gate::Gone);
    }

    fn shutdown<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        this.drm.queue.stop(true, Gate::Gone);
        // The rings are gone, and so is the device's access to memory: a kernel that is started
        // from this one finds it quiet.
        dev.shutdown();
    }

    fn config_changed(_dev: &virtio::Device<Bound>, this: Pin<&Self::Data<'_>>) {
        // Already queued is as good.
        let _ = workqueue::system_percpu().enqueue::<ARef<Device>, 0>(this.drm.clone());
    }

    fn freeze<'bound>(
        _dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        pm::freeze(&this.drm)
    }

    fn restore<'bound>(
        dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        pm::restore(&this.drm, dev)
    }

    fn reset_prepare<'bound>(
        _dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        pm::reset_prepare(&this.drm);
        Ok(())
    }

    fn reset_done<'bound>(
        dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        pm::restore(&this.drm, dev)?;
        // The work item tells user space of other displays, once the virtio core is done here.
        dev.notify_config_changed();
        Ok(())
    }

    fn reset_failed<'bound>(
        _dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) {
        pm::reset_failed(&this.drm);
    }

    fn suspend<'bound>(
        _dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
        phase: PmPhase,
    ) -> Result {
        pm::suspend(&this.drm, phase)
    }

    fn resume<'bound>(
        dev: &'bound virtio::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
        _phase: PmPhase,
    ) -> Result {
        pm::resume(&this.drm, dev)
    }
}
