// SPDX-License-Identifier: GPL-2.0

//! Outputs: one CRTC, primary plane, encoder and connector for each of the host's scanouts.
//!
//! A commit queues commands and [`DrmDriver::commit_flush`] tells the host of all of them at once.
//! Nothing here waits for an answer but [`refresh`].

use core::mem::size_of;
use kernel::{
    drm::{
        self,
        kms::{
            self,
            fourcc,
            Connector,
            ConnectorStatus,
            Crtc,
            DisplayMode,
            DriverConnector,
            DriverCrtc,
            DriverPlane,
            ModeConfig,
            ModeStatus,
            Plane,
            PlaneType,
            PlaneUpdate,
            Probe, //
        }, //
    },
    new_mutex,
    prelude::*,
    sync::Mutex, //
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
    object::CPP,
    queue::{
        Token,
        Who,
        CTRL, //
    },
    uapi, //
};

const MIN_SIZE: u32 = 32;
const MAX_SIZE: u32 = 8192;

/// The size of a display of which the host says nothing.
pub(crate) const DEFAULT_WIDTH: u32 = 1024;
pub(crate) const DEFAULT_HEIGHT: u32 = 768;

/// How far a mode may be below what the host wants, in pixels: a CVT mode cannot have any size.
const SLACK: u32 = 16;

/// The longest answer with an EDID, and the one to [`command::get_display_info`], in bytes.
const EDID_LEN: usize = size_of::<uapi::RespEdid>();
const DISPLAY_INFO_LEN: usize = size_of::<uapi::RespDisplayInfo>();

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
        let plane = setup.new_plane(
            PlaneType::Primary,
            crtcs,
            &[fourcc::HOST_XRGB8888],
            Ok(Primary { scanout }),
        )?;

        setup.new_crtc(plane, None, Ok(Scanout { scanout }))?;
        setup.new_connector(
            setup.new_encoder(crtcs)?,
            drm.features.edid,
            try_pin_init!(Head {
                scanout,
                edid <- new_mutex!(KVec::new()),
            }),
        )?;
    }
    setup.finish()
}

/// Asks the host for its displays and their EDIDs.
///
/// Returns whether anything has changed. Sleeps.
pub(crate) fn refresh(drm: &Device, who: Who) -> Result<bool> {
    let queue = &drm.queue;
    let answer = queue.call(&command::get_display_info(), DISPLAY_INFO_LEN, who)?;
    let new = Displays::parse(answer.as_slice())?;

    if new.clamped {
        kernel::do_once_lite! { dev_warn!(drm.as_ref(),
            "the host has a display larger than {} pixels, clamped\n",
            command::DISPLAY_MAX) };
    }

    let mut changed = {
        let mut displays = drm.displays.lock();
        let changed = *displays != new.info;

        *displays = new.info;
        changed
    };

    if drm.features.edid {
        drm.for_each_connector(|connector| {
            match Head::refresh(connector, who) {
                Ok(new) => changed |= new,
                Err(e) => kernel::do_once_lite! { dev_warn!(drm.as_ref(),
                    "no usable EDID from the host for scanout {}: {:?}\n",
                    connector.scanout,
                    e) },
            }
        });
    }
    Ok(changed)
}

impl From<kms::Rect> for Rect {
    fn from(r: kms::Rect) -> Self {
        Self {
            x: r.x(),
            y: r.y(),
            width: r.width(),
            height: r.height(),
        }
    }
}

/// Shows a resource on a scanout, or nothing (resource 0).
///
/// A commit cannot fail any more when this is called; what does not reach the host is in the log.
fn set_scanout(drm: &Device, scanout: u32, resource: u32, rect: Rect) -> Result {
    drm.queue
        .submit(
            &command::set_scanout(scanout, resource, rect),
            None,
            Token::unattended::<uapi::SetScanout>(None),
            Who::Kernel,
        )
        .map_err(|rejected| rejected.error)
}

/// The error of a command that belongs to a commit. On a device that is gone or wedged there is
/// nothing to say that has not been said.
fn report(drm: &Device, what: &str, result: Result) {
    if let Err(e) = result {
        if e != ENODEV && e != EIO {
            kernel::do_once_lite! { dev_err!(drm.as_ref(), "*ERROR* {} was not sent: {:?}\n", what, e) };
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

/// The primary plane of a scanout.
pub(crate) struct Primary {
    scanout: u32,
}

impl DriverPlane for Primary {
    type Driver = DrmDriver;

    fn atomic_update(plane: &Plane<Self>, update: &PlaneUpdate<'_, DrmDriver>) {
        let drm = plane.dev();
        let Some(fb) = update.fb().filter(|_| update.crtc_active()) else {
            return Self::off(plane);
        };
        let (Some(object), Some(pitch), Some(start)) = (fb.object(0), fb.pitch(0), fb.offset(0))
        else {
            return;
        };
        let (Some(damage), Some(resource)) = (update.damage_merged(), object.resource()) else {
            return;
        };
        let damage = Rect::from(damage);
        let offset = u64::from(start) + damage.offset(pitch, CPP);

        report(
            drm,
            "a picture",
            resource.transfer(&drm.queue, damage, offset, Who::Kernel, None),
        );
        // The mode was set with nothing to be seen, whether the framebuffer is a new one or not.
        if update.fb_changed() || update.src_changed() || update.needs_modeset() {
            report(
                drm,
                "a scanout",
                set_scanout(drm, plane.scanout, resource.id, update.src().into()),
            );
        }
        report(drm, "a flush", resource.flush(&drm.queue, damage));
    }

    fn atomic_disable(plane: &Plane<Self>, _update: &PlaneUpdate<'_, DrmDriver>) {
        Self::off(plane);
    }
}

impl Primary {
    fn off(plane: &Plane<Self>) {
        let drm = plane.dev();

        report(
            drm,
            "a scanout",
            set_scanout(drm, plane.scanout, 0, Rect::default()),
        );
    }
}

/// The CRTC of a scanout.
pub(crate) struct Scanout {
    scanout: u32,
}

impl DriverCrtc for Scanout {
    type Driver = DrmDriver;

    fn mode_set(crtc: &Crtc<Self>, mode: &DisplayMode) {
        let drm = crtc.dev();
        let rect = Rect {
            x: 0,
            y: 0,
            width: mode.width(),
            height: mode.height(),
        };

        // The plane follows and shows something; until then nothing of the old mode is to be seen.
        report(drm, "a mode", set_scanout(drm, crtc.scanout, 0, rect));
    }

    fn atomic_disable(crtc: &Crtc<Self>) {
        let drm = crtc.dev();

        report(
            drm,
            "a scanout",
            set_scanout(drm, crtc.scanout, 0, Rect::default()),
        );
    }
}

/// The connector of a scanout.
#[pin_data]
pub(crate) struct Head {
    scanout: u32,
    /// What the host last sent as EDID.
    #[pin]
    edid: Mutex<KVec<u8>>,
}

impl Head {
    fn info(connector: &Connector<Self>) -> DisplayInfo {
        connector
            .dev()
            .displays
            .lock()
            .get(connector.scanout as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Asks the host for the EDID. Returns whether it is another one than before.
    ///
    /// A host that does not give one is taken to have none.
    fn refresh(connector: &Connector<Self>, who: Who) -> Result<bool> {
        let answer =
            connector
                .dev()
                .queue
                .call(&command::get_edid(connector.scanout), EDID_LEN, who);
        let answer = answer.as_ref().map_err(|e| *e);
        let edid = answer.and_then(|answer| command::edid(answer.as_slice()));
        let new = edid.unwrap_or(&[]);
        let mut old = connector.edid.lock();

        if !old.is_empty() && **old == *new {
            return Ok(false);
        }
        old.clear();
        old.extend_from_slice(new, GFP_KERNEL)?;
        drop(old);

        connector.update_edid((!new.is_empty()).then_some(new))?;
        edid.map(|_| true)
    }
}

/// Whether a mode that the host is said to prefer is close to what it really wants.
fn is_preferred(mode: (u32, u32), host: (u32, u32)) -> bool {
    let close = |mode: u32, host: u32| mode <= host && mode >= host.saturating_sub(SLACK);

    mode == (DEFAULT_WIDTH, DEFAULT_HEIGHT) || close(mode.0, host.0) && close(mode.1, host.1)
}

impl DriverConnector for Head {
    type Driver = DrmDriver;

    fn get_modes(connector: &Connector<Self>, probe: &mut Probe<'_>) -> u32 {
        let count = probe.add_edid_modes();
        if count > 0 {
            return count;
        }

        let info = Self::info(connector);
        let count = probe.add_modes_noedid(MAX_SIZE, MAX_SIZE);

        if info.width == 0 || info.height == 0 {
            probe.set_preferred_mode(DEFAULT_WIDTH, DEFAULT_HEIGHT);
            return count;
        }
        // An odd size is no reason to offer none.
        count + u32::from(probe.add_cvt_mode(info.width, info.height, true).is_ok())
    }

    fn mode_valid(connector: &Connector<Self>, mode: &DisplayMode) -> ModeStatus {
        let info = Self::info(connector);

        if !mode.is_preferred()
            || is_preferred(
                (mode.width(), mode.height()),
                (info.width, info.height),
            )
        {
            ModeStatus::Ok
        } else {
            ModeStatus::Bad
        }
    }

    fn detect(connector: &Connector<Self>) -> ConnectorStatus {
        if Self::info(connector).enabled {
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
}
