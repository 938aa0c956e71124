// SPDX-License-Identifier: GPL-2.0

//! Files in the debugfs directory of a DRM device.
//!
//! C header: [`include/drm/drm_debugfs.h`](srctree/include/drm/drm_debugfs.h)

use crate::{
    bindings,
    drm,
    prelude::*,
    seq_file::SeqFile,
    str::CStrExt as _, //
};
use core::ptr;

/// A read-only file in the debugfs directory of a DRM device.
///
/// See [`drm::Registration::debugfs_file`].
pub trait DebugfsFile {
    /// The driver whose devices have the file.
    type Driver: drm::Driver;

    /// Writes the contents of the file to `m`.
    ///
    /// Called in process context, whenever the file is read, until the registration of the device
    /// ends.
    ///
    /// An error is what reading the file returns.
    fn show(dev: &drm::Device<Self::Driver>, m: &SeqFile) -> Result;
}

/// # Safety
///
/// Must be called with a file that `drm_debugfs_add_file()` has added to a device of driver
/// `F::Driver`, while it is being read.
unsafe extern "C" fn show_callback<F: DebugfsFile>(
    m: *mut bindings::seq_file,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: By the safety requirements of this function, the private data is a
    // `struct drm_debugfs_entry`, and its device is one of driver `F::Driver`. Whoever ends the
    // registration has a reference to the device, and removes the files, which waits for readers.
    let dev = unsafe {
        let entry: *mut bindings::drm_debugfs_entry = (*m).private.cast();
        drm::Device::from_raw((*entry).dev)
    };

    // SAFETY: `m` is valid and used by this thread only while the file is being read.
    match F::show(dev, unsafe { SeqFile::from_raw(m) }) {
        Ok(()) => 0,
        Err(err) => err.to_errno(),
    }
}

impl<T: drm::Driver + 'static> drm::Registration<'_, T> {
    /// Adds a file to the debugfs directory of the device.
    ///
    /// Without memory, or without debugfs in the kernel, there is no file.
    ///
    /// C counterpart: `drm_debugfs_add_file()`.
    pub fn debugfs_file<F: DebugfsFile<Driver = T>>(&self, name: &'static CStr) {
        // SAFETY: The device is valid and registered, the name lives forever, and `show_callback`
        // is for the driver of the device.
        unsafe {
            bindings::drm_debugfs_add_file(
                self.device().as_raw(),
                name.as_char_ptr(),
                Some(show_callback::<F>),
                ptr::null_mut(),
            )
        };
    }
}
