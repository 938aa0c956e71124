// SPDX-License-Identifier: GPL-2.0

//! Framebuffers.
//!
//! C header: [`include/drm/drm_framebuffer.h`](srctree/include/drm/drm_framebuffer.h)

use super::Driver;
use crate::{
    bindings,
    drm::{
        self,
        gem::IntoGEMObject, //
    },
    types::Opaque, //
};
use core::marker::PhantomData;

/// A framebuffer: a picture in one or more GEM objects.
///
/// That the objects are large enough for the picture was checked when it was created.
///
/// C counterpart: `struct drm_framebuffer`.
///
/// # Invariants
///
/// The `struct drm_framebuffer` is initialized, was created by `drm_gem_fb_create_with_dirty()`,
/// and is one of a device of driver `D`, which was registered at some point: framebuffers are made
/// for system calls and in-kernel clients only.
#[repr(transparent)]
pub struct Framebuffer<D: Driver>(Opaque<bindings::drm_framebuffer>, PhantomData<D>);

// SAFETY: A framebuffer isn't changed after it was created.
unsafe impl<D: Driver> Send for Framebuffer<D> {}

// SAFETY: A framebuffer isn't changed after it was created.
unsafe impl<D: Driver> Sync for Framebuffer<D> {}

impl<D: Driver> Framebuffer<D> {
    /// # Safety
    ///
    /// `ptr` must be `NULL`, or point to a framebuffer of a device of driver `D` that stays valid
    /// for the duration of `'a`.
    pub(super) unsafe fn from_raw_opt<'a>(ptr: *mut bindings::drm_framebuffer) -> Option<&'a Self> {
        // INVARIANT: `drm_gem_fb_create_with_dirty()` is the `fb_create` callback of all drivers.
        //
        // SAFETY: By the safety requirements of this function. `Framebuffer` is a transparent
        // wrapper.
        unsafe { ptr.cast::<Self>().as_ref() }
    }

    fn raw(&self) -> *mut bindings::drm_framebuffer {
        self.0.get()
    }

    /// The device that the framebuffer belongs to.
    pub fn dev(&self) -> &drm::Device<D, drm::Ioctl> {
        // SAFETY: By the type invariants, this is a device of driver `D` that was registered at
        // some point. It outlives its framebuffers.
        unsafe { drm::Device::from_raw((*self.raw()).dev) }
    }

    /// Width, in pixels.
    pub fn width(&self) -> u32 {
        // SAFETY: By the type invariants.
        unsafe { (*self.raw()).width }
    }

    /// Height, in pixels.
    pub fn height(&self) -> u32 {
        // SAFETY: By the type invariants.
        unsafe { (*self.raw()).height }
    }

    /// Memory plane `index`. There is one, unless the components of a pixel lie in different
    /// places.
    pub fn plane(&self, index: usize) -> Option<FramebufferPlane<'_, D>> {
        // SAFETY: By the type invariants; a framebuffer always has a format.
        let count = usize::from(unsafe { (*(*self.raw()).format).num_planes });

        if index >= count {
            return None;
        }

        // SAFETY: By the type invariants, the framebuffer is initialised, and these don't change.
        // There is no reference to all of it, since its reference count does.
        let (objects, pitches, offsets) = unsafe {
            let raw = self.raw();

            ((*raw).obj, (*raw).pitches, (*raw).offsets)
        };
        let object = *objects.get(index)?;

        if object.is_null() {
            return None;
        }

        Some(FramebufferPlane {
            // SAFETY: `drm_gem_fb_create_with_dirty()` looks the objects up among the handles of a
            // file, and only objects of type `D::Object` can get a handle on a device of driver
            // `D`. The framebuffer holds a reference to them.
            object: unsafe { D::Object::from_raw(object) },
            pitch: *pitches.get(index)?,
            offset: *offsets.get(index)?,
        })
    }
}

/// Where a memory plane of a [`Framebuffer`] is.
pub struct FramebufferPlane<'a, D: Driver> {
    /// The object that contains it.
    pub object: &'a D::Object,
    /// Bytes from one line to the next.
    pub pitch: u32,
    /// Bytes from the beginning of the object to the first pixel.
    pub offset: u32,
}
