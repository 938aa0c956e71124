// SPDX-License-Identifier: GPL-2.0

//! Encoders.
//!
//! C header: [`include/drm/drm_encoder.h`](srctree/include/drm/drm_encoder.h)

use super::Driver;
use crate::{
    alloc::KBox,
    bindings,
    drm,
    error::to_result,
    prelude::*,
    types::Opaque, //
};
use core::{
    marker::PhantomData,
    ptr, //
};

/// An encoder, the link between a CRTC and a connector.
///
/// Atomic drivers which have nothing to set up between the two need it for its routing only, hence
/// it has no callbacks.
///
/// C counterpart: `struct drm_encoder`.
///
/// # Invariants
///
/// `raw` is an initialized encoder of a device of driver `D`.
#[repr(transparent)]
pub struct Encoder<D: Driver> {
    raw: Opaque<bindings::drm_encoder>,
    _driver: PhantomData<D>,
}

// SAFETY: An encoder has no interior that can be changed through `Encoder`.
unsafe impl<D: Driver> Send for Encoder<D> {}

// SAFETY: An encoder has no interior that can be changed through `Encoder`.
unsafe impl<D: Driver> Sync for Encoder<D> {}

impl<D: Driver> Encoder<D> {
    const FUNCS: bindings::drm_encoder_funcs = bindings::drm_encoder_funcs {
        destroy: Some(Self::destroy_callback),
        ..pin_init::zeroed()
    };

    /// Creates an encoder. The mode configuration of `dev` must be initialized, and `dev` mustn't
    /// be registered yet, which is why only `Setup` calls this.
    pub(super) fn new(dev: &drm::Device<D>, possible_crtcs: u32) -> Result<&Self> {
        let this = KBox::new(
            Self {
                raw: Opaque::zeroed(),
                _driver: PhantomData,
            },
            GFP_KERNEL,
        )?;

        // SAFETY: `dev` is valid, `this` is zeroed memory for an encoder, which stays where it is,
        // and the name is allowed to be `NULL`.
        to_result(unsafe {
            bindings::drm_encoder_init(
                dev.as_raw(),
                this.raw.get(),
                &Self::FUNCS,
                bindings::DRM_MODE_ENCODER_VIRTUAL as c_int,
                ptr::null(),
            )
        })?;

        // SAFETY: The encoder was initialized above, and nobody uses it before registration.
        unsafe { (*this.raw.get()).possible_crtcs = possible_crtcs };

        // INVARIANT: The encoder was initialized above.
        //
        // SAFETY: The allocation is owned by the mode configuration from here on, which frees it
        // through `destroy_callback()` when the device is released.
        Ok(unsafe { &*KBox::into_raw(this) })
    }

    pub(super) fn as_raw(&self) -> *mut bindings::drm_encoder {
        self.raw.get()
    }

    /// # Safety
    ///
    /// `encoder` must be embedded in an `Encoder<D>` that was created by [`Encoder::new`], and not
    /// be used afterwards.
    unsafe extern "C" fn destroy_callback(encoder: *mut bindings::drm_encoder) {
        // SAFETY: By the safety requirements of this function.
        unsafe { bindings::drm_encoder_cleanup(encoder) };

        // SAFETY: `Encoder` is a transparent wrapper, and was allocated by `KBox` in `new()`.
        drop(unsafe { KBox::from_raw(encoder.cast::<Self>()) });
    }
}
