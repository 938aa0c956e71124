// SPDX-License-Identifier: GPL-2.0

//! Display modes.
//!
//! C header: [`include/drm/drm_modes.h`](srctree/include/drm/drm_modes.h)

use crate::{
    bindings,
    types::Opaque, //
};

/// Whether a mode can be used.
///
/// C counterpart: `enum drm_mode_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModeStatus {
    /// It can be used.
    Ok,
    /// It can't be used, for a reason that none of C's other values stands for (`MODE_BAD`).
    Bad,
}

impl ModeStatus {
    pub(super) const fn as_raw(self) -> bindings::drm_mode_status {
        match self {
            Self::Ok => bindings::drm_mode_status_MODE_OK,
            Self::Bad => bindings::drm_mode_status_MODE_BAD,
        }
    }
}

/// A display mode.
///
/// C counterpart: `struct drm_display_mode`.
///
/// # Invariants
///
/// The `struct drm_display_mode` is valid, and isn't written to while a reference to it exists.
#[repr(transparent)]
pub struct DisplayMode(Opaque<bindings::drm_display_mode>);

impl DisplayMode {
    /// # Safety
    ///
    /// `ptr` must point to a valid `struct drm_display_mode` that stays valid, and isn't written
    /// to, for the duration of `'a`.
    pub(super) unsafe fn from_raw<'a>(ptr: *const bindings::drm_display_mode) -> &'a Self {
        // SAFETY: By the safety requirements of this function. `DisplayMode` is a transparent
        // wrapper.
        unsafe { &*ptr.cast() }
    }

    fn raw(&self) -> &bindings::drm_display_mode {
        // SAFETY: By the type invariants.
        unsafe { &*self.0.get() }
    }

    /// Width of the picture, in pixels.
    pub fn width(&self) -> u32 {
        self.raw().hdisplay.into()
    }

    /// Height of the picture, in pixels.
    pub fn height(&self) -> u32 {
        self.raw().vdisplay.into()
    }

    /// Whether the display, or the driver, has marked the mode as its preferred one.
    pub fn is_preferred(&self) -> bool {
        u32::from(self.raw().type_) & bindings::DRM_MODE_TYPE_PREFERRED != 0
    }
}
