// SPDX-License-Identifier: GPL-2.0

//! CRTCs.
//!
//! C header: [`include/drm/drm_crtc.h`](srctree/include/drm/drm_crtc.h)

use super::{
    Driver,
    Plane, //
};
use crate::{
    alloc::KBox,
    bindings,
    drm,
    error::to_result,
    prelude::*,
    types::Opaque, //
};
use core::{
    ops::Deref,
    ptr, //
};

/// The driver's part of a CRTC.
///
/// It has nothing to do for a commit: this is for devices that are told what to show, but no mode.
/// Commits that set the mode of a CRTC, or switch it on or off, update its planes as well.
pub trait DriverCrtc: Send + Sync + Sized + 'static {
    /// The driver that the CRTC belongs to.
    type Driver: Driver<Crtc = Self>;
}

/// A CRTC: the part of a device that shows a picture in a mode.
///
/// Dereferences to the driver's part. Its vertical blanking events come from a timer that runs at
/// the rate of the mode, as the hardware has none.
///
/// C counterpart: `struct drm_crtc`.
///
/// # Invariants
///
/// `raw` is an initialized CRTC of a device of driver `C::Driver`.
#[repr(C)]
#[pin_data]
pub struct Crtc<C: DriverCrtc> {
    raw: Opaque<bindings::drm_crtc>,
    #[pin]
    inner: C,
}

// SAFETY: The C part is protected by its own locks, and the driver's part is `Send`.
unsafe impl<C: DriverCrtc> Send for Crtc<C> {}

// SAFETY: The C part is protected by its own locks, and the driver's part is `Sync`.
unsafe impl<C: DriverCrtc> Sync for Crtc<C> {}

impl<C: DriverCrtc> Crtc<C> {
    const FUNCS: bindings::drm_crtc_funcs = bindings::drm_crtc_funcs {
        set_config: Some(bindings::drm_atomic_helper_set_config),
        page_flip: Some(bindings::drm_atomic_helper_page_flip),
        destroy: Some(Self::destroy_callback),
        atomic_create_state: Some(bindings::drm_atomic_helper_crtc_create_state),
        atomic_duplicate_state: Some(bindings::drm_atomic_helper_crtc_duplicate_state),
        atomic_destroy_state: Some(bindings::drm_atomic_helper_crtc_destroy_state),
        enable_vblank: Some(bindings::drm_crtc_vblank_helper_enable_vblank_timer),
        disable_vblank: Some(bindings::drm_crtc_vblank_helper_disable_vblank_timer),
        get_vblank_timestamp: Some(
            bindings::drm_crtc_vblank_helper_get_vblank_timestamp_from_timer,
        ),
        ..pin_init::zeroed()
    };

    const HELPER_FUNCS: bindings::drm_crtc_helper_funcs = bindings::drm_crtc_helper_funcs {
        atomic_flush: Some(bindings::drm_crtc_vblank_atomic_flush),
        atomic_enable: Some(bindings::drm_crtc_vblank_atomic_enable),
        atomic_disable: Some(bindings::drm_crtc_vblank_atomic_disable),
        ..pin_init::zeroed()
    };

    /// Creates a CRTC. The mode configuration of `dev` must be initialized, and `dev` mustn't be
    /// registered yet, which is why only `Setup` calls this.
    pub(super) fn new<'a>(
        dev: &'a drm::Device<C::Driver>,
        primary: &Plane<<C::Driver as Driver>::Plane>,
        cursor: Option<&Plane<<C::Driver as Driver>::Plane>>,
        data: impl PinInit<C, Error>,
    ) -> Result<&'a Self> {
        let is_valid = |plane: *mut bindings::drm_plane, plane_type| {
            // SAFETY: The pointer comes from a reference to an initialized plane.
            unsafe { (*plane).dev == dev.as_raw() && (*plane).type_ == plane_type }
        };

        let primary = primary.as_raw();
        if !is_valid(primary, bindings::drm_plane_type_DRM_PLANE_TYPE_PRIMARY) {
            return Err(EINVAL);
        }
        let cursor = match cursor {
            Some(cursor) => cursor.as_raw(),
            None => ptr::null_mut(),
        };
        if !cursor.is_null() && !is_valid(cursor, bindings::drm_plane_type_DRM_PLANE_TYPE_CURSOR) {
            return Err(EINVAL);
        }

        let this = KBox::pin_init(
            try_pin_init!(Self {
                raw: Opaque::zeroed(),
                inner <- data,
            }),
            GFP_KERNEL,
        )?;
        let raw = this.raw.get();

        // SAFETY: `dev` is valid, `raw` is zeroed memory for a CRTC, which stays where it is, the
        // planes are those of the same device, and the name is allowed to be `NULL`.
        to_result(unsafe {
            bindings::drm_crtc_init_with_planes(
                dev.as_raw(),
                raw,
                primary,
                cursor,
                &Self::FUNCS,
                ptr::null(),
            )
        })
        .inspect_err(|_| {
            // Its last step may fail with the CRTC on the list of the device already.
            //
            // SAFETY: `raw` was zeroed before, so that it is on the list if it has a neighbour,
            // and then it has all that is cleaned up.
            unsafe {
                if !(*raw).head.next.is_null() {
                    bindings::drm_crtc_cleanup(raw);
                }
            }
        })?;

        // SAFETY: The CRTC was initialized above, and nobody uses it before registration.
        unsafe { (*raw).helper_private = &Self::HELPER_FUNCS };

        // INVARIANT: The CRTC was initialized above.
        //
        // SAFETY: The allocation is owned by the mode configuration from here on, which frees it
        // through `destroy_callback()` when the device is released. It is never moved.
        Ok(unsafe { &*KBox::into_raw(Pin::into_inner_unchecked(this)) })
    }

    /// # Safety
    ///
    /// `crtc` must be embedded in a `Crtc<C>` that was created by [`Crtc::new`], and not be used
    /// afterwards.
    unsafe extern "C" fn destroy_callback(crtc: *mut bindings::drm_crtc) {
        // SAFETY: By the safety requirements of this function.
        unsafe { bindings::drm_crtc_cleanup(crtc) };

        // SAFETY: `raw` is the first field of `Crtc`, which was allocated by `KBox` in `new()`.
        drop(unsafe { KBox::from_raw(crtc.cast::<Self>()) });
    }
}

impl<C: DriverCrtc> Deref for Crtc<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.inner
    }
}
