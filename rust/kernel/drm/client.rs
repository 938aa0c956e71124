// SPDX-License-Identifier: GPL-2.0

//! In-kernel clients: the console on a framebuffer device, and the boot log.
//!
//! C header:
//! [`include/drm/clients/drm_client_setup.h`](srctree/include/drm/clients/drm_client_setup.h)

use crate::{
    bindings,
    drm::{
        self,
        kms, //
    },
};
use core::ptr;

/// Sets up the in-kernel clients that are configured, on a device that is registered.
///
/// They are closed when the registration ends. A device without outputs has none. Failures are
/// logged and otherwise ignored, as by all drivers.
///
/// Must be called at most once for each registration; otherwise there are two clients, of which the
/// second has no use.
///
/// C counterpart: `drm_client_setup()`.
pub fn setup<T: kms::Driver>(registration: &drm::Registration<'_, T>) {
    let dev = registration.device();

    // SAFETY: Registration has consumed the `UnregisteredDevice`.
    if unsafe { dev.has_modeset() } {
        // SAFETY: `dev` is a valid device that was registered, with a complete mode configuration.
        unsafe { bindings::drm_client_setup(dev.as_raw(), ptr::null()) };
    }
}
