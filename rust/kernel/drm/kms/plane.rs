// SPDX-License-Identifier: GPL-2.0

//! Planes.
//!
//! C header: [`include/drm/drm_plane.h`](srctree/include/drm/drm_plane.h)

use super::{
    Driver,
    Framebuffer,
    Rect, //
};
use crate::{
    alloc::KBox,
    bindings,
    drm,
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    types::Opaque, //
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit,
    ops::Deref,
    ptr::{
        self,
        NonNull, //
    },
};

/// How many formats the DRM core takes.
const MAX_FORMATS: usize = 64;

/// What a plane is for.
///
/// C counterpart: `enum drm_plane_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaneType {
    /// The picture of a CRTC.
    Primary,
    /// The mouse cursor.
    Cursor,
}

impl PlaneType {
    const fn as_raw(self) -> bindings::drm_plane_type {
        match self {
            Self::Primary => bindings::drm_plane_type_DRM_PLANE_TYPE_PRIMARY,
            Self::Cursor => bindings::drm_plane_type_DRM_PLANE_TYPE_CURSOR,
        }
    }
}

/// The driver's part of a plane.
///
/// C counterpart: `struct drm_plane_helper_funcs`.
pub trait DriverPlane: Send + Sync + Sized + 'static {
    /// The driver that the plane belongs to.
    type Driver: Driver<Plane = Self>;

    /// Checks a new state of the plane.
    ///
    /// Called in process context, with the plane's lock held, as often as it takes to find a state
    /// that is valid. It mustn't change anything but the new state.
    ///
    /// The default demands that the plane covers its CRTC, which is what a primary plane without
    /// scaling needs; see [`PlaneCheck::no_scaling`].
    fn atomic_check(_plane: &Plane<Self>, check: &PlaneCheck<'_, Self::Driver>) -> Result {
        check.no_scaling(false)
    }

    /// Carries out a new state of the plane, which has a framebuffer.
    ///
    /// Called in process context, as a part of a commit that can't fail anymore. The CRTC of the
    /// plane isn't necessarily active, see [`PlaneUpdate::crtc_active`].
    fn atomic_update(plane: &Plane<Self>, update: &PlaneUpdate<'_, Self::Driver>);

    /// Carries out a new state of the plane, which has no framebuffer, but had one before.
    ///
    /// Called in the same context as [`atomic_update`](Self::atomic_update).
    fn atomic_disable(plane: &Plane<Self>, update: &PlaneUpdate<'_, Self::Driver>);
}

/// A plane: a source of pixels for a CRTC.
///
/// Dereferences to the driver's part.
///
/// C counterpart: `struct drm_plane`.
///
/// # Invariants
///
/// `raw` is an initialized plane of a device of driver `P::Driver`.
#[repr(C)]
#[pin_data]
pub struct Plane<P: DriverPlane> {
    raw: Opaque<bindings::drm_plane>,
    #[pin]
    inner: P,
}

// SAFETY: The C part is protected by its own locks, and the driver's part is `Send`.
unsafe impl<P: DriverPlane> Send for Plane<P> {}

// SAFETY: The C part is protected by its own locks, and the driver's part is `Sync`.
unsafe impl<P: DriverPlane> Sync for Plane<P> {}

impl<P: DriverPlane> Plane<P> {
    const FUNCS: bindings::drm_plane_funcs = bindings::drm_plane_funcs {
        update_plane: Some(bindings::drm_atomic_helper_update_plane),
        disable_plane: Some(bindings::drm_atomic_helper_disable_plane),
        destroy: Some(Self::destroy_callback),
        atomic_create_state: Some(bindings::drm_atomic_helper_plane_create_state),
        atomic_duplicate_state: Some(bindings::drm_atomic_helper_plane_duplicate_state),
        atomic_destroy_state: Some(bindings::drm_atomic_helper_plane_destroy_state),
        ..pin_init::zeroed()
    };

    const HELPER_FUNCS: bindings::drm_plane_helper_funcs = bindings::drm_plane_helper_funcs {
        prepare_fb: Some(bindings::drm_gem_plane_helper_prepare_fb),
        atomic_check: Some(Self::atomic_check_callback),
        atomic_update: Some(Self::atomic_update_callback),
        atomic_disable: Some(Self::atomic_disable_callback),
        ..pin_init::zeroed()
    };

    /// Creates a plane. The mode configuration of `dev` must be initialized, and `dev` mustn't be
    /// registered yet, which is why only `Setup` calls this.
    pub(super) fn new<'a>(
        dev: &'a drm::Device<P::Driver>,
        plane_type: PlaneType,
        possible_crtcs: u32,
        formats: &[u32],
        data: impl PinInit<P, Error>,
    ) -> Result<&'a Self> {
        if formats.len() > MAX_FORMATS {
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

        // SAFETY: `dev` is valid, `raw` is zeroed memory for a plane, which stays where it is, the
        // formats are copied, and the modifiers and the name are allowed to be `NULL`.
        to_result(unsafe {
            bindings::drm_universal_plane_init(
                dev.as_raw(),
                raw,
                possible_crtcs,
                &Self::FUNCS,
                formats.as_ptr(),
                formats.len() as c_uint,
                ptr::null(),
                plane_type.as_raw(),
                ptr::null(),
            )
        })?;

        // SAFETY: The plane was initialized above, and nobody uses it before registration.
        unsafe { (*raw).helper_private = &Self::HELPER_FUNCS };

        if plane_type == PlaneType::Primary {
            // SAFETY: As above.
            unsafe { bindings::drm_plane_enable_fb_damage_clips(raw) };
        }

        // INVARIANT: The plane was initialized above.
        //
        // SAFETY: The allocation is owned by the mode configuration from here on, which frees it
        // through `destroy_callback()` when the device is released. It is never moved.
        Ok(unsafe { &*KBox::into_raw(Pin::into_inner_unchecked(this)) })
    }

    pub(super) fn as_raw(&self) -> *mut bindings::drm_plane {
        self.raw.get()
    }

    /// # Safety
    ///
    /// `ptr` must be embedded in a `Plane<P>` that stays valid for the duration of `'a`.
    unsafe fn from_raw<'a>(ptr: *mut bindings::drm_plane) -> &'a Self {
        // SAFETY: `raw` is the first field of `Plane`, which is `repr(C)`.
        unsafe { &*ptr.cast() }
    }

    /// Returns the device that the plane belongs to.
    pub fn dev(&self) -> &drm::Device<P::Driver> {
        // SAFETY: By the type invariants, this is a device of driver `P::Driver`. It outlives its
        // planes.
        unsafe { drm::Device::from_raw((*self.as_raw()).dev) }
    }

    /// # Safety
    ///
    /// `plane` must be embedded in a `Plane<P>` that was created by [`Plane::new`], and not be used
    /// afterwards.
    unsafe extern "C" fn destroy_callback(plane: *mut bindings::drm_plane) {
        // SAFETY: By the safety requirements of this function.
        unsafe { bindings::drm_plane_cleanup(plane) };

        // SAFETY: `raw` is the first field of `Plane`, which was allocated by `KBox` in `new()`.
        drop(unsafe { KBox::from_raw(plane.cast::<Self>()) });
    }

    /// # Safety
    ///
    /// `plane` must be embedded in a `Plane<P>`, and be a part of `state`, which is being checked.
    unsafe extern "C" fn atomic_check_callback(
        plane: *mut bindings::drm_plane,
        state: *mut bindings::drm_atomic_commit,
    ) -> c_int {
        // SAFETY: By the safety requirements of this function, `plane` is a part of `state`.
        let (old, new) = unsafe {
            (
                bindings::drm_atomic_get_old_plane_state(state, plane),
                bindings::drm_atomic_get_new_plane_state(state, plane),
            )
        };

        from_result(|| {
            let check = PlaneCheck {
                state,
                old: NonNull::new(old).ok_or(EINVAL)?,
                new: NonNull::new(new).ok_or(EINVAL)?,
                _driver: PhantomData,
            };

            // SAFETY: By the safety requirements of this function.
            P::atomic_check(unsafe { Self::from_raw(plane) }, &check)?;
            Ok(0)
        })
    }

    /// Calls `f` with the update of `plane` in `state`.
    ///
    /// # Safety
    ///
    /// `plane` must be embedded in a `Plane<P>`, and be a part of `state`, which is being carried
    /// out.
    unsafe fn with_update(
        plane: *mut bindings::drm_plane,
        state: *mut bindings::drm_atomic_commit,
        f: impl FnOnce(&Self, &PlaneUpdate<'_, P::Driver>),
    ) {
        // SAFETY: By the safety requirements of this function, `plane` is a part of `state`.
        let (old, new) = unsafe {
            (
                bindings::drm_atomic_get_old_plane_state(state, plane),
                bindings::drm_atomic_get_new_plane_state(state, plane),
            )
        };

        let (Some(old), Some(new)) = (NonNull::new(old), NonNull::new(new)) else {
            return;
        };

        let update = PlaneUpdate {
            state,
            old,
            new,
            _driver: PhantomData,
        };

        // SAFETY: By the safety requirements of this function.
        f(unsafe { Self::from_raw(plane) }, &update);
    }

    /// # Safety
    ///
    /// As for [`Self::with_update`].
    unsafe extern "C" fn atomic_update_callback(
        plane: *mut bindings::drm_plane,
        state: *mut bindings::drm_atomic_commit,
    ) {
        // SAFETY: By the safety requirements of this function.
        unsafe {
            Self::with_update(plane, state, |plane, update| {
                // The core asks for an update also of planes that were, and stay, disabled.
                if update.fb().is_some() {
                    P::atomic_update(plane, update);
                }
            })
        };
    }

    /// # Safety
    ///
    /// As for [`Self::with_update`].
    unsafe extern "C" fn atomic_disable_callback(
        plane: *mut bindings::drm_plane,
        state: *mut bindings::drm_atomic_commit,
    ) {
        // SAFETY: By the safety requirements of this function.
        unsafe { Self::with_update(plane, state, P::atomic_disable) };
    }
}

impl<P: DriverPlane> Deref for Plane<P> {
    type Target = P;

    fn deref(&self) -> &P {
        &self.inner
    }
}

/// A new state of a plane that is to be checked.
///
/// # Invariants
///
/// `old` and `new` are the states of one plane in `state`, which is a commit of a device of driver
/// `D` that is being checked. All of them are valid for the duration of `'a`.
pub struct PlaneCheck<'a, D: Driver> {
    state: *mut bindings::drm_atomic_commit,
    old: NonNull<bindings::drm_plane_state>,
    new: NonNull<bindings::drm_plane_state>,
    _driver: PhantomData<&'a D>,
}

impl<'a, D: Driver> PlaneCheck<'a, D> {
    /// Returns the new framebuffer, or [`None`] if the plane is to be disabled.
    pub fn fb(&self) -> Option<&'a Framebuffer<D>> {
        // SAFETY: By the type invariants; the state holds a reference to its framebuffer.
        unsafe { Framebuffer::from_raw_opt((*self.new.as_ptr()).fb) }
    }

    /// Returns whether there is another framebuffer than before.
    #[inline]
    pub fn fb_changed(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { (*self.old.as_ptr()).fb != (*self.new.as_ptr()).fb }
    }

    /// Checks that the plane doesn't scale, and, unless it `can_position`, that it covers its CRTC.
    ///
    /// Does nothing for a plane that is to be disabled. If the framebuffer has changed, the damage
    /// that user space may have named is ignored from here on: it says what has changed within a
    /// framebuffer, not how one framebuffer differs from another.
    ///
    /// # Errors
    ///
    /// - `ERANGE` or `EINVAL` if the plane scales or doesn't cover its CRTC.
    ///
    /// C counterpart: `drm_atomic_helper_check_plane_state()`.
    pub fn no_scaling(&self, can_position: bool) -> Result {
        let new = self.new.as_ptr();

        // SAFETY: By the type invariants. `new` isn't accessed by anybody else during the check.
        let (fb, crtc) = unsafe { ((*new).fb, (*new).crtc) };
        if fb.is_null() || crtc.is_null() {
            return Ok(());
        }

        // SAFETY: By the type invariants, as above.
        unsafe {
            // Also where it hasn't: the flag is copied from state to state, and nobody else
            // clears it.
            (*new).ignore_damage_clips = self.fb_changed();
        }

        // SAFETY: By the type invariants, `state` is being checked, and `crtc` is of its device.
        let crtc_state = unsafe { bindings::drm_atomic_get_new_crtc_state(self.state, crtc) };
        if crtc_state.is_null() {
            // The core adds the CRTC of a plane to a commit with the plane.
            return Err(EINVAL);
        }

        // SAFETY: By the type invariants, and `crtc_state` is that of the plane's CRTC.
        to_result(unsafe {
            bindings::drm_atomic_helper_check_plane_state(
                new,
                crtc_state,
                bindings::DRM_PLANE_NO_SCALING as c_int,
                bindings::DRM_PLANE_NO_SCALING as c_int,
                can_position,
                true,
            )
        })
    }
}

/// A new state of a plane that is being carried out, and the one it replaces.
///
/// # Invariants
///
/// `old` and `new` are the states of one plane in `state`, which is a commit of a device of driver
/// `D` that is being carried out. All of them are valid, and not written to, for the duration of
/// `'a`.
pub struct PlaneUpdate<'a, D: Driver> {
    state: *mut bindings::drm_atomic_commit,
    old: NonNull<bindings::drm_plane_state>,
    new: NonNull<bindings::drm_plane_state>,
    _driver: PhantomData<&'a D>,
}

impl<'a, D: Driver> PlaneUpdate<'a, D> {
    fn old_state(&self) -> &'a bindings::drm_plane_state {
        // SAFETY: By the type invariants.
        unsafe { &*self.old.as_ptr() }
    }

    fn new_state(&self) -> &'a bindings::drm_plane_state {
        // SAFETY: By the type invariants.
        unsafe { &*self.new.as_ptr() }
    }

    /// Returns the new framebuffer, or [`None`] if the plane is being disabled.
    pub fn fb(&self) -> Option<&'a Framebuffer<D>> {
        // SAFETY: By the type invariants; the state holds a reference to its framebuffer.
        unsafe { Framebuffer::from_raw_opt(self.new_state().fb) }
    }

    /// Returns the new state of the CRTC that shows the plane, if it has one.
    #[inline]
    fn crtc_state(&self) -> Option<NonNull<bindings::drm_crtc_state>> {
        let crtc = NonNull::new(self.new_state().crtc)?;

        // SAFETY: By the type invariants, and `crtc` is of the same device.
        NonNull::new(unsafe { bindings::drm_atomic_get_new_crtc_state(self.state, crtc.as_ptr()) })
    }

    /// Returns whether the CRTC that shows the plane is, or is about to be, switched on.
    pub fn crtc_active(&self) -> bool {
        self.crtc_state()
            // SAFETY: By the type invariants, the states in the commit are valid.
            .is_some_and(|state| unsafe { (*state.as_ptr()).active })
    }

    /// Returns whether the same commit sets the mode of the CRTC that shows the plane, or switches
    /// it on or off.
    ///
    /// The answer is that of the commit at hand, and it is the same before and after the mode is
    /// set.
    ///
    /// C counterpart: `drm_atomic_crtc_needs_modeset()`.
    #[inline]
    pub fn needs_modeset(&self) -> bool {
        self.crtc_state().is_some_and(|state| {
            // SAFETY: By the type invariants, the states in the commit are valid.
            unsafe { bindings::drm_atomic_crtc_needs_modeset(state.as_ptr()) }
        })
    }

    /// Returns the part of the framebuffer that is shown, without fractions of pixels.
    pub fn src(&self) -> Rect {
        let new = self.new_state();
        Rect::from_fixed(new.src_x, new.src_y, new.src_w, new.src_h)
    }

    /// Returns whether the part of the framebuffer that is shown has moved, or is of another size.
    #[inline]
    pub fn src_changed(&self) -> bool {
        let (old, new) = (self.old_state(), self.new_state());
        (old.src_x, old.src_y, old.src_w, old.src_h) != (new.src_x, new.src_y, new.src_w, new.src_h)
    }

    /// Returns whether there is another framebuffer than before.
    pub fn fb_changed(&self) -> bool {
        self.old_state().fb != self.new_state().fb
    }

    /// Returns a rectangle of the framebuffer that contains everything that has changed and is
    /// shown, or [`None`] if nothing has.
    ///
    /// It lies within the framebuffer and isn't empty.
    ///
    /// C counterpart: `drm_atomic_helper_damage_merged()`.
    #[inline]
    pub fn damage_merged(&self) -> Option<Rect> {
        let fb = self.fb()?;
        let mut rect = MaybeUninit::zeroed();

        // SAFETY: By the type invariants.
        let damaged = unsafe {
            bindings::drm_atomic_helper_damage_merged(
                self.old.as_ptr(),
                self.new.as_ptr(),
                rect.as_mut_ptr(),
            )
        };
        if !damaged {
            return None;
        }

        // SAFETY: The rectangle was zeroed, which is a valid value.
        Rect::from_raw(unsafe { rect.assume_init_ref() }, fb.width(), fb.height())
    }
}
