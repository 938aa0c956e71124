// SPDX-License-Identifier: GPL-2.0

//! Outputs: one CRTC, primary plane, encoder and connector for each of the host's scanouts.
//!
//! A commit queues commands, and the host is told of all of them at once at its end.
//! Nothing here waits for an answer but [`refresh`].

use kernel::{
    drm::{
        self,
        gem::shmem,
        kms::{
            self,
            fourcc,
            Connector,
            ConnectorStatus,
            DisplayMode,
            DriverConnector,
            DriverCrtc,
            DriverPlane,
            Framebuffer,
            FramebufferPlane,
            ModeConfig,
            ModeStatus,
            Plane,
            PlaneCheck,
            PlaneType,
            PlaneUpdate,
            Probe, //
        }, //
    },
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Mutex, //
    },
    virtio::queue::Answer, //
};

use crate::{
    command::{
        self,
        DisplayInfo,
        Displays,
        Rect, //
    },
    driver::{
        Device,
        DrmDriver, //
    },
    object::{
        Object,
        Resource,
        Shown,
        CPP, //
    },
    queue::{
        is_lost,
        Who,
        CTRL, //
    },
    uapi::{
        self,
        config, //
    }, //
};

const MIN_SIZE: u32 = 32;
const MAX_SIZE: u32 = 8192;

/// The size of a display of which the host says nothing.
const DEFAULT_WIDTH: u32 = 1024;
const DEFAULT_HEIGHT: u32 = 768;

/// How far a mode may be below what the host wants, in pixels: a CVT mode cannot have any size.
const SLACK: u32 = 16;

/// Sets up the outputs. The device is not registered yet.
pub(crate) fn init(drm: &drm::UnregisteredDevice<DrmDriver>) -> Result {
    let setup = drm.kms_setup(ModeConfig {
        min_width: MIN_SIZE,
        min_height: MIN_SIZE,
        max_width: MAX_SIZE,
        max_height: MAX_SIZE,
        prefer_host_byte_order: true,
    })?;

    for scanout in 0..drm.features.num_scanouts {
        let crtcs = 1 << scanout;
        let info = Atomic::new(Head::initial_info(scanout).to_word());
        let plane = setup.new_plane(
            PlaneType::Primary,
            crtcs,
            &[fourcc::HOST_XRGB8888],
            Ok(Primary { scanout }),
        )?;

        setup.new_crtc(plane, None, Ok(Scanout))?;
        setup.new_connector(
            setup.new_encoder(crtcs)?,
            drm.features.edid,
            try_pin_init!(Head {
                scanout,
                info,
                edid <- new_mutex!(None),
            }),
        )?;
    }
    setup.finish()
}

/// Asks the host for its displays and their EDIDs. What it does not say is in the log.
///
/// Returns whether anything has changed. Sleeps, but not before the gate: only who would mend the
/// device asks.
pub(crate) fn refresh(drm: &Device) -> Result<bool> {
    let queue = &drm.queue;
    let new = queue
        .call(&command::get_display_info(), Who::Pm)
        .and_then(|answer| Displays::parse(answer.as_slice()))
        .inspect_err(|e| {
            // A device that is gone has nothing to say, and that is known. Whoever resets it asks
            // again.
            if !is_lost(*e) {
                dev_err!(drm.as_ref(), "*ERROR* no display info: {:?}\n", e);
            }
        })?;

    if new.clamped {
        kernel::do_once_lite! {
            dev_warn!(
                drm.as_ref(),
                "the host has a display larger than {} pixels, clamped\n",
                command::DISPLAY_MAX
            )
        }
    }

    let mut changed = false;

    drm.for_each_connector(|connector| {
        if let Some(info) = new.info.get(connector.scanout as usize) {
            let info = info.to_word();

            changed |= connector.info.xchg(info, Relaxed) != info;
        }
    });

    if drm.features.edid {
        // All questions at once: the host is told once, and takes its time once.
        let mut questions = [const { None }; uapi::MAX_SCANOUTS];

        for (scanout, question) in (0..drm.features.num_scanouts).zip(&mut questions) {
            *question = Some(queue.ask(&command::get_edid(scanout), Who::Pm));
        }
        queue.kick(CTRL);

        let mut mute = false;

        drm.for_each_connector(|connector| {
            let question = questions
                .get_mut(connector.scanout as usize)
                .and_then(Option::take)
                .filter(|_| !mute);
            let Some(question) = question else {
                return;
            };

            match Head::refresh(connector, question.and_then(|it| it.wait(queue, Who::Pm))) {
                Ok(new) => changed |= new,
                // Once is enough to wait in vain, and a reset, or the end, answers all of them.
                Err(e) if e == ETIMEDOUT || is_lost(e) => mute = true,
                Err(e) => Head::warn(connector, e),
            }
        });
    }
    Ok(changed)
}

/// Returns whether the host says that its displays have changed since this was last called.
pub(crate) fn take_event(drm: &Device) -> bool {
    let Some(dev) = drm.queue.device() else {
        return false;
    };

    match dev.config_read_le32(config::EVENTS_READ) {
        // A device that is gone reads as all ones, which no host says: only one bit has a meaning.
        Ok(events) if events != u32::MAX && events & config::EVENT_DISPLAY != 0 => {}
        _ => return false,
    }
    // Cleared before the host is asked: a change that comes after that is a new event.
    let _ = dev.config_write_le32(config::EVENTS_CLEAR, config::EVENT_DISPLAY);
    true
}

/// Has recovery show something on a scanout. Before the host is told: what it does not hear of
/// because it is reset, recovery tells it.
fn remember(drm: &Device, scanout: u32, shown: Shown) {
    if let Some(screen) = drm.screens.lock().get_mut(scanout as usize) {
        *screen = shown;
    }
}

/// Has the host show something on a scanout.
fn set_scanout(drm: &Device, scanout: u32, shown: Shown) -> Result {
    drm.queue.submit(
        &command::set_scanout(scanout, shown.resource, shown.rect),
        None,
        Who::Kernel,
    )
}

/// Logs the error of commands that belong to a commit, which cannot fail any more. On a device that
/// is gone or wedged there is nothing to say that has not been said.
fn report(drm: &Device, what: &str, error: Error) {
    if error != ENODEV && error != EIO {
        kernel::do_once_lite! {
            dev_err!(drm.as_ref(), "*ERROR* {} was not sent: {:?}\n", what, error)
        }
    }
}

impl kms::Driver for DrmDriver {
    type Plane = Primary;
    type Crtc = Scanout;
    type Connector = Head;

    fn commit_flush(drm: &Device) {
        drm.queue.kick(CTRL);
    }
}

/// A framebuffer, as part of the resource that it lies in.
struct Picture<'a> {
    fb: &'a Framebuffer<DrmDriver>,
    object: &'a shmem::Object<Object>,
    resource: &'a Resource,
    pitch: u32,
    /// The line of the resource that is the first one of the framebuffer.
    first: u32,
}

impl<'a> Picture<'a> {
    /// Checks that a framebuffer can be shown: the host knows lines of one length only, that of the
    /// resource.
    fn check(fb: &Framebuffer<DrmDriver>) -> Result {
        let plane = fb.plane(0).ok_or(EINVAL)?;
        let resource = plane.object.resource().ok_or(EINVAL)?;

        check_layout(
            (resource.width, resource.height),
            (fb.width(), fb.height()),
            plane.pitch,
            plane.offset,
        )
    }

    /// The framebuffer has been [checked](Self::check). One that cannot have been gives nothing.
    fn new(fb: &'a Framebuffer<DrmDriver>) -> Option<Self> {
        let FramebufferPlane {
            object,
            pitch,
            offset,
        } = fb.plane(0)?;

        Some(Self {
            fb,
            object,
            resource: object.resource()?,
            pitch,
            first: offset.checked_div(pitch)?,
        })
    }

    /// Where a part of the framebuffer is in the resource.
    fn rect(&self, part: kms::Rect) -> Rect {
        Rect {
            x: part.x(),
            y: self.first.saturating_add(part.y()),
            width: part.width(),
            height: part.height(),
        }
    }

    /// Has the host fetch a part of the resource, show it if it does not, and bring it onto the
    /// screen. Nothing more is sent after what could not be.
    fn send(&self, drm: &Device, damage: Rect, scanout: u32, shown: Option<Shown>) -> Result {
        self.sync()?;
        if !self.resource.is_complete() {
            self.object.complete()?;
        }
        self.resource
            .transfer(&drm.queue, damage, damage.offset(self.pitch, CPP))?;
        if let Some(shown) = shown {
            set_scanout(drm, scanout, shown)?;
        }
        self.resource.flush(&drm.queue, damage)
    }

    /// Lets the host see what the CPU has drawn, where that takes more than to draw it.
    fn sync(&self) -> Result {
        let drm = self.fb.dev();

        if !drm.features.dma_addresses {
            return Ok(());
        }

        // The memory is mapped as long as the driver is bound, whatever becomes of the queues. The
        // guard is not held over the commands, which may wait.
        let drm = drm.registration_guard().ok_or(ENODEV)?;

        self.object.sync_for_device(drm.as_ref())
    }
}

/// Checks that a framebuffer lies in a resource line by line. Sizes are width and height in pixels,
/// `pitch` and `offset` are in bytes.
///
/// Errors: [`EINVAL`] if it does not.
fn check_layout(resource: (u32, u32), fb: (u32, u32), pitch: u32, offset: u32) -> Result {
    if pitch == 0 || Some(pitch) != resource.0.checked_mul(CPP) || offset % pitch != 0 {
        return Err(EINVAL);
    }

    let end = (offset / pitch).checked_add(fb.1).ok_or(EINVAL)?;

    if fb.0 > resource.0 || end > resource.1 {
        return Err(EINVAL);
    }
    Ok(())
}

/// The primary plane of a scanout.
pub(crate) struct Primary {
    scanout: u32,
}

impl DriverPlane for Primary {
    type Driver = DrmDriver;

    #[inline]
    fn atomic_check(_plane: &Plane<Self>, check: &PlaneCheck<'_, DrmDriver>) -> Result {
        check.no_scaling(false)?;
        match check.fb() {
            // Neither a framebuffer nor a resource changes: the one before has been checked.
            Some(fb) if check.fb_changed() => Picture::check(fb),
            _ => Ok(()),
        }
    }

    #[inline]
    fn atomic_update(plane: &Plane<Self>, update: &PlaneUpdate<'_, DrmDriver>) {
        let drm = plane.dev();
        let Some(fb) = update.fb().filter(|_| update.crtc_active()) else {
            return Self::off(plane);
        };
        let (Some(picture), Some(dark)) = (Picture::new(fb), drm.dark.get(plane.scanout as usize))
        else {
            return;
        };
        let src = || picture.rect(update.src());
        // Before anything is sent: recovery may come in between, and say so again.
        let all = dark.xchg(false, Relaxed);
        let damage = if all {
            src()
        } else if let Some(damage) = update.damage_merged() {
            picture.rect(damage)
        } else {
            return;
        };
        let resource = picture.resource;
        // The mode was set with nothing to be seen, whether the framebuffer is a new one or not.
        let new = all || update.fb_changed() || update.src_changed() || update.needs_modeset();
        let shown = new.then(|| Shown {
            resource: resource.id,
            rect: src(),
        });

        if let Some(shown) = shown {
            remember(drm, plane.scanout, shown);
        }

        let sent = picture.send(drm, damage, plane.scanout, shown);

        if let Err(e) = sent {
            report(drm, "a picture", e);
        }
        // Recovery may have come in between, and had no memory for what was not shown yet.
        if sent.is_err() || !resource.is_complete() {
            dark.store(true, Relaxed);
        }
    }

    fn atomic_disable(plane: &Plane<Self>, _update: &PlaneUpdate<'_, DrmDriver>) {
        Self::off(plane);
    }
}

impl Primary {
    fn off(plane: &Plane<Self>) {
        let drm = plane.dev();

        remember(drm, plane.scanout, Shown::default());
        if let Err(e) = set_scanout(drm, plane.scanout, Shown::default()) {
            report(drm, "an empty screen", e);
        }
    }
}

/// The CRTC of a scanout. The host knows of no modes, only of what the plane shows: every commit
/// that sets a mode, or switches the CRTC on or off, carries out the plane's state, too.
pub(crate) struct Scanout;

impl DriverCrtc for Scanout {
    type Driver = DrmDriver;
}

/// The connector of a scanout.
#[pin_data]
pub(crate) struct Head {
    scanout: u32,
    /// What the host last said of the display, as [`DisplayInfo::to_word`]. A probe looks at it for
    /// each of the modes.
    info: Atomic<u64>,
    /// What the host last sent as EDID, if it was ever asked.
    #[pin]
    edid: Mutex<Option<KVec<u8>>>,
}

impl Head {
    /// What a user gets on a host that says nothing.
    fn initial_info(scanout: u32) -> DisplayInfo {
        match scanout {
            0 => DisplayInfo {
                enabled: true,
                width: DEFAULT_WIDTH,
                height: DEFAULT_HEIGHT,
            },
            _ => DisplayInfo::default(),
        }
    }

    fn warn(connector: &Connector<Self>, error: Error) {
        kernel::do_once_lite! {
            dev_warn!(
                connector.dev().as_ref(),
                "no usable EDID from the host for scanout {}: {:?}\n",
                connector.scanout,
                error
            )
        }
    }

    fn info(&self) -> DisplayInfo {
        DisplayInfo::from_word(self.info.load(Relaxed))
    }

    /// Takes over the EDID that the host has answered with. Returns whether it is another one than
    /// before.
    ///
    /// A host that refuses is taken to have none, one that does not answer, or was reset before it
    /// could, has said nothing.
    fn refresh(connector: &Connector<Self>, answer: Result<Answer>) -> Result<bool> {
        let answer = match answer {
            Ok(answer) => Some(answer),
            Err(e) if e == ETIMEDOUT || e == ENOMEM || is_lost(e) => return Err(e),
            Err(e) => {
                Self::warn(connector, e);
                None
            }
        };
        let new = match &answer {
            Some(answer) => command::edid(answer.as_slice())?,
            None => &[],
        };
        let mut old = connector.edid.lock();

        if old.as_ref().is_some_and(|old| **old == *new) {
            return Ok(false);
        }

        let mut copy = KVec::with_capacity(new.len(), GFP_KERNEL)?;

        copy.extend_from_slice(new, GFP_KERNEL)?;
        // With the lock held: the copy must not become another one than the connector's.
        if let Err(e) = connector.update_edid((!new.is_empty()).then_some(new)) {
            Self::warn(connector, e);
            // The connector has none now. There may have been no memory for it.
            return Ok(old.take().is_some_and(|old| !old.is_empty()));
        }
        *old = Some(copy);
        Ok(true)
    }
}

/// Whether a mode that the host is said to prefer is close to what it really wants.
fn is_preferred(mode: (u32, u32), host: (u32, u32)) -> bool {
    let close = |mode: u32, host: u32| mode <= host && mode >= host.saturating_sub(SLACK);

    mode == (DEFAULT_WIDTH, DEFAULT_HEIGHT) || close(mode.0, host.0) && close(mode.1, host.1)
}

impl DriverConnector for Head {
    type Driver = DrmDriver;

    #[inline]
    fn get_modes(connector: &Connector<Self>, probe: &mut Probe<'_>) -> u32 {
        let count = probe.add_edid_modes();
        if count > 0 {
            return count;
        }

        let info = connector.info();
        let count = probe.add_modes_noedid(MAX_SIZE, MAX_SIZE);

        if info.width == 0 || info.height == 0 {
            probe.set_preferred_mode(DEFAULT_WIDTH, DEFAULT_HEIGHT);
            return count;
        }
        // An odd size is no reason to offer none.
        count + u32::from(probe.add_cvt_mode(info.width, info.height, true).is_ok())
    }

    fn mode_valid(connector: &Connector<Self>, mode: &DisplayMode) -> ModeStatus {
        if !mode.is_preferred() {
            return ModeStatus::Ok;
        }

        let info = connector.info();

        if is_preferred((mode.width(), mode.height()), (info.width, info.height)) {
            ModeStatus::Ok
        } else {
            ModeStatus::Bad
        }
    }

    fn detect(connector: &Connector<Self>) -> ConnectorStatus {
        if connector.info().enabled {
            ConnectorStatus::Connected
        } else {
            ConnectorStatus::Disconnected
        }
    }
}

#[kunit_tests(virtgpu_rs_display)]
mod tests {
    use super::*;

    #[test]
    fn a_preferred_mode_is_what_the_host_wants_or_the_default() {
        assert!(is_preferred((1024, 768), (640, 480)));
        assert!(is_preferred((1280, 800), (1280, 800)));
        assert!(is_preferred((1264, 784), (1280, 800)));
        assert!(!is_preferred((1263, 784), (1280, 800)));
        assert!(!is_preferred((1264, 783), (1280, 800)));
        assert!(!is_preferred((1281, 800), (1280, 800)));
        // A host that wants less than the slack.
        assert!(is_preferred((0, 0), (8, 8)));
        assert!(!is_preferred((u32::MAX, u32::MAX), (0, 0)));
    }

    #[test]
    fn a_framebuffer_lies_in_its_resource_line_by_line() {
        let ok = |resource, fb, pitch, offset| check_layout(resource, fb, pitch, offset).is_ok();

        assert!(ok((64, 48), (64, 48), 256, 0));
        assert!(ok((64, 48), (32, 24), 256, 0));
        assert!(ok((64, 48), (64, 40), 256, 8 * 256));
        // Too large, or too far down.
        assert!(!ok((64, 48), (65, 48), 256, 0));
        assert!(!ok((64, 48), (64, 49), 256, 0));
        assert!(!ok((64, 48), (64, 41), 256, 8 * 256));
        // As many bytes, in lines of another length.
        assert!(!ok((64, 1024), (1024, 64), 4096, 0));
        assert!(!ok((64, 48), (64, 40), 256, 4));
        assert!(!ok((1 << 30, 1), (1, 1), 0, 0));
        assert!(!ok((64, 48), (64, u32::MAX), 256, 256));
    }
}
