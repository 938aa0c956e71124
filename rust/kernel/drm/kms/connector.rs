// SPDX-License-Identifier: GPL-2.0

//! Connectors.
//!
//! C header: [`include/drm/drm_connector.h`](srctree/include/drm/drm_connector.h)

use super::{
    DisplayMode,
    Driver,
    Encoder,
    ModeStatus, //
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
    marker::PhantomData,
    ops::Deref, //
};

/// Whether there is a display at a connector.
///
/// C counterpart: `enum drm_connector_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectorStatus {
    /// There is one.
    Connected,
    /// There is none.
    Disconnected,
}

/// The driver's part of a connector.
///
/// All callbacks are called in process context, with the lock of the mode configuration or modeset
/// locks held. They mustn't call methods of [`drm::Device`] and [`Connector`] that take them.
///
/// C counterparts: `struct drm_connector_funcs`, `struct drm_connector_helper_funcs`.
pub trait DriverConnector: Send + Sync + Sized + 'static {
    /// The driver that the connector belongs to.
    type Driver: Driver<Connector = Self>;

    /// Returns whether there is a display.
    fn detect(connector: &Connector<Self>) -> ConnectorStatus;

    /// Adds the modes of the display to `probe`, and returns how many were added.
    ///
    /// Only called if there is a display.
    fn get_modes(connector: &Connector<Self>, probe: &mut Probe<'_>) -> u32;

    /// Returns whether a mode can be used on this connector.
    fn mode_valid(_connector: &Connector<Self>, _mode: &DisplayMode) -> ModeStatus {
        ModeStatus::Ok
    }
}

/// A connector: what a display is attached to.
///
/// Dereferences to the driver's part.
///
/// C counterpart: `struct drm_connector`.
///
/// # Invariants
///
/// `raw` is an initialized connector of a device of driver `C::Driver`.
#[repr(C)]
#[pin_data]
pub struct Connector<C: DriverConnector> {
    raw: Opaque<bindings::drm_connector>,
    #[pin]
    inner: C,
}

// SAFETY: The C part is protected by its own locks, and the driver's part is `Send`.
unsafe impl<C: DriverConnector> Send for Connector<C> {}

// SAFETY: The C part is protected by its own locks, and the driver's part is `Sync`.
unsafe impl<C: DriverConnector> Sync for Connector<C> {}

impl<C: DriverConnector> Connector<C> {
    const FUNCS: bindings::drm_connector_funcs = bindings::drm_connector_funcs {
        detect: Some(Self::detect_callback),
        fill_modes: Some(bindings::drm_helper_probe_single_connector_modes),
        destroy: Some(Self::destroy_callback),
        atomic_create_state: Some(bindings::drm_atomic_helper_connector_create_state),
        atomic_duplicate_state: Some(bindings::drm_atomic_helper_connector_duplicate_state),
        atomic_destroy_state: Some(bindings::drm_atomic_helper_connector_destroy_state),
        ..pin_init::zeroed()
    };

    const HELPER_FUNCS: bindings::drm_connector_helper_funcs =
        bindings::drm_connector_helper_funcs {
            get_modes: Some(Self::get_modes_callback),
            mode_valid: Some(Self::mode_valid_callback),
            ..pin_init::zeroed()
        };

    /// Creates a connector. The mode configuration of `dev` must be initialized, and `dev` mustn't
    /// be registered yet, which is why only `Setup` calls this.
    pub(super) fn new<'a>(
        dev: &'a drm::Device<C::Driver>,
        encoder: &Encoder<C::Driver>,
        edid: bool,
        data: impl PinInit<C, Error>,
    ) -> Result<&'a Self> {
        let encoder = encoder.as_raw();
        // SAFETY: The pointer comes from a reference to an initialized encoder.
        if unsafe { (*encoder).dev } != dev.as_raw() {
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

        // SAFETY: `dev` is valid and `raw` is zeroed memory for a connector, which stays where it
        // is.
        to_result(unsafe {
            bindings::drm_connector_init(
                dev.as_raw(),
                raw,
                &Self::FUNCS,
                bindings::DRM_MODE_CONNECTOR_VIRTUAL as c_int,
            )
        })?;

        // INVARIANT: The connector was initialized above.
        //
        // SAFETY: The allocation is owned by the mode configuration from here on, which frees it
        // through `destroy_callback()` when the device is released. It is never moved.
        let this = unsafe { &*KBox::into_raw(Pin::into_inner_unchecked(this)) };

        // SAFETY: The connector was initialized above, and nobody uses it before registration.
        unsafe { (*raw).helper_private = &Self::HELPER_FUNCS };

        if edid {
            // SAFETY: As above.
            unsafe { bindings::drm_connector_attach_edid_property(raw) };
        }

        // SAFETY: As above, and the encoder is of the same device.
        to_result(unsafe { bindings::drm_connector_attach_encoder(raw, encoder) })?;

        Ok(this)
    }

    pub(super) fn as_raw(&self) -> *mut bindings::drm_connector {
        self.raw.get()
    }

    /// # Safety
    ///
    /// `ptr` must be embedded in a `Connector<C>` that stays valid for the duration of `'a`.
    pub(super) unsafe fn from_raw<'a>(ptr: *mut bindings::drm_connector) -> &'a Self {
        // SAFETY: `raw` is the first field of `Connector`, which is `repr(C)`.
        unsafe { &*ptr.cast() }
    }

    /// Returns the device that the connector belongs to.
    pub fn dev(&self) -> &drm::Device<C::Driver> {
        // SAFETY: By the type invariants, this is a device of driver `C::Driver`. It outlives its
        // connectors.
        unsafe { drm::Device::from_raw((*self.as_raw()).dev) }
    }

    /// # Safety
    ///
    /// `connector` must be embedded in a `Connector<C>` that was created by [`Connector::new`], and
    /// not be used afterwards.
    unsafe extern "C" fn destroy_callback(connector: *mut bindings::drm_connector) {
        // SAFETY: By the safety requirements of this function.
        unsafe { bindings::drm_connector_cleanup(connector) };

        // SAFETY: `raw` is the first field of `Connector`, which was allocated by `KBox` in
        // `new()`.
        drop(unsafe { KBox::from_raw(connector.cast::<Self>()) });
    }

    /// # Safety
    ///
    /// `connector` must be embedded in a `Connector<C>`.
    unsafe extern "C" fn detect_callback(
        connector: *mut bindings::drm_connector,
        _force: bool,
    ) -> bindings::drm_connector_status {
        // SAFETY: By the safety requirements of this function.
        match C::detect(unsafe { Self::from_raw(connector) }) {
            ConnectorStatus::Connected => bindings::drm_connector_status_connector_status_connected,
            ConnectorStatus::Disconnected => {
                bindings::drm_connector_status_connector_status_disconnected
            }
        }
    }

    /// # Safety
    ///
    /// `connector` must be embedded in a `Connector<C>` that is being probed.
    unsafe extern "C" fn get_modes_callback(connector: *mut bindings::drm_connector) -> c_int {
        // INVARIANT: By the safety requirements of this function.
        let mut probe = Probe {
            connector,
            _lifetime: PhantomData,
        };

        // SAFETY: By the safety requirements of this function.
        C::get_modes(unsafe { Self::from_raw(connector) }, &mut probe)
            .try_into()
            .unwrap_or(c_int::MAX)
    }

    /// # Safety
    ///
    /// `connector` must be embedded in a `Connector<C>`, and `mode` be valid.
    unsafe extern "C" fn mode_valid_callback(
        connector: *mut bindings::drm_connector,
        mode: *const bindings::drm_display_mode,
    ) -> bindings::drm_mode_status {
        // SAFETY: By the safety requirements of this function.
        let (connector, mode) = unsafe { (Self::from_raw(connector), DisplayMode::from_raw(mode)) };

        C::mode_valid(connector, mode).as_raw()
    }
}

impl<C: DriverConnector> Deref for Connector<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.inner
    }
}

/// A connector whose modes are being probed.
///
/// # Invariants
///
/// `connector` is valid, and the lock of its mode configuration is held, for the duration of `'a`.
pub struct Probe<'a> {
    connector: *mut bindings::drm_connector,
    _lifetime: PhantomData<&'a mut bindings::drm_connector>,
}

impl Probe<'_> {
    /// The largest width and height of a mode that [`add_cvt_mode`](Self::add_cvt_mode) takes.
    const CVT_MAX: u32 = 16384;

    /// Adds the modes of the EDID that was last given to [`Connector::update_edid`], and returns
    /// how many there are.
    ///
    /// C counterpart: `drm_edid_connector_add_modes()`.
    pub fn add_edid_modes(&mut self) -> u32 {
        // SAFETY: By the type invariants.
        let count = unsafe { bindings::drm_edid_connector_add_modes(self.connector) };
        count.try_into().unwrap_or(0)
    }

    /// Adds the standard modes up to the given size, in pixels, and returns how many there are.
    ///
    /// C counterpart: `drm_add_modes_noedid()`.
    pub fn add_modes_noedid(&mut self, max_width: u32, max_height: u32) -> u32 {
        // SAFETY: By the type invariants.
        let count =
            unsafe { bindings::drm_add_modes_noedid(self.connector, max_width, max_height) };
        count.try_into().unwrap_or(0)
    }

    /// Adds a mode of the given size, in pixels, with 60 Hz and the timings of the VESA CVT
    /// standard, which rounds the width down to a multiple of 8.
    ///
    /// # Errors
    ///
    /// `EINVAL` if one of the numbers is 0 or larger than 16384, `ENOMEM`.
    ///
    /// C counterpart: `drm_cvt_mode()`.
    pub fn add_cvt_mode(&mut self, width: u32, height: u32, preferred: bool) -> Result {
        if !(1..=Self::CVT_MAX).contains(&width) || !(1..=Self::CVT_MAX).contains(&height) {
            return Err(EINVAL);
        }

        // SAFETY: By the type invariants, the connector, and with it its device, is valid. The
        // arguments are in a range in which the calculation can't overflow.
        let mode = unsafe {
            bindings::drm_cvt_mode(
                (*self.connector).dev,
                width as c_int,
                height as c_int,
                60,
                false,
                false,
                false,
            )
        };
        if mode.is_null() {
            return Err(ENOMEM);
        }

        if preferred {
            // SAFETY: `drm_cvt_mode()` returned a mode which we own.
            unsafe { (*mode).type_ |= bindings::DRM_MODE_TYPE_PREFERRED as u8 };
        }

        // SAFETY: By the type invariants; the connector takes over the mode.
        unsafe { bindings::drm_mode_probed_add(self.connector, mode) };
        Ok(())
    }

    /// Marks the modes of the given size, in pixels, as preferred.
    ///
    /// C counterpart: `drm_set_preferred_mode()`.
    pub fn set_preferred_mode(&mut self, width: u32, height: u32) {
        if let (Ok(width), Ok(height)) = (width.try_into(), height.try_into()) {
            // SAFETY: By the type invariants.
            unsafe { bindings::drm_set_preferred_mode(self.connector, width, height) };
        }
    }
}
