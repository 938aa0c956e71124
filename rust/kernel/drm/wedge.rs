// SPDX-License-Identifier: GPL-2.0

//! Devices that do not work any more.
//!
//! C header: [`include/drm/drm_device.h`](srctree/include/drm/drm_device.h)

use crate::{
    bindings,
    drm,
    error::to_result,
    prelude::*, //
};
use core::{
    ops::BitOr,
    ptr, //
};

/// What user space can do to have a wedged device back, see [`drm::Device::wedged_event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovery(c_ulong);

impl Recovery {
    /// Unbind the driver, and bind it again.
    pub const REBIND: Self = Self(bindings::DRM_WEDGE_RECOVERY_REBIND);
    /// Unbind the driver, reset the device on its bus, and bind the driver again.
    pub const BUS_RESET: Self = Self(bindings::DRM_WEDGE_RECOVERY_BUS_RESET);
}

impl BitOr for Recovery {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl<T: drm::Driver> drm::Device<T> {
    /// Tells user space, by a uevent, that the device does not work any more, and what there is to
    /// do about it.
    ///
    /// Does nothing if the device has been unplugged. Process context.
    ///
    /// Errors: [`ENOMEM`], and [`EINVAL`] if the device is not registered yet.
    ///
    /// C counterpart: `drm_dev_wedged_event()`.
    pub fn wedged_event(&self, recovery: Recovery) -> Result {
        let raw = self.as_raw();
        let mut idx = 0;

        // SAFETY: `raw` is a valid device.
        if !unsafe { bindings::drm_dev_enter(raw, &mut idx) } {
            return Ok(());
        }

        // SAFETY: `raw` is a valid device. Its primary node was allocated with it, and is not
        // removed before `drm_dev_exit()`.
        let ret = unsafe { bindings::drm_dev_wedged_event(raw, recovery.0, ptr::null_mut()) };

        // SAFETY: `idx` is from the `drm_dev_enter()` above.
        unsafe { bindings::drm_dev_exit(idx) };
        to_result(ret)
    }
}
