// SPDX-License-Identifier: GPL-2.0

//! EDID: what a display says about itself.
//!
//! C header: [`include/drm/drm_edid.h`](srctree/include/drm/drm_edid.h)

use super::{
    Connector,
    DriverConnector, //
};
use crate::{
    bindings,
    error::to_result,
    prelude::*, //
};
use core::ptr;

/// Size of a block, in bytes.
const BLOCK: usize = bindings::EDID_LENGTH as usize;

/// Returns bytes `[index * BLOCK, index * BLOCK + len)` of `edid`, if it has as many.
fn block(edid: &[u8], index: usize, len: usize) -> Option<&[u8]> {
    let start = index.checked_mul(BLOCK)?;
    edid.get(start..start.checked_add(len)?)
}

/// Copies one block out of the slice that `context` points to.
///
/// # Safety
///
/// `context` must point to a `&[u8]`, and `buf` to `len` bytes of writable memory.
unsafe extern "C" fn read_block(
    context: *mut c_void,
    buf: *mut u8,
    index: c_uint,
    len: usize,
) -> c_int {
    // SAFETY: By the safety requirements of this function.
    let edid = unsafe { *context.cast::<&[u8]>() };

    match block(edid, index as usize, len) {
        Some(block) => {
            // SAFETY: `block` has `len` bytes, and so has `buf` by the safety requirements of this
            // function. They don't overlap, as nobody else has a reference to `buf`.
            unsafe { ptr::copy_nonoverlapping(block.as_ptr(), buf, len) };
            0
        }
        None => -1,
    }
}

impl<C: DriverConnector> Connector<C> {
    /// Takes over what an EDID says about the display, and sets the `EDID` property.
    ///
    /// With [`None`], the display is one that doesn't say anything. The bytes may be anything: what
    /// isn't an EDID, or has fewer blocks than it claims, counts as none. User space may override
    /// the EDID, in which case the bytes aren't looked at.
    ///
    /// Must be called from process context. It takes the lock of the mode configuration, hence it
    /// mustn't be called from the callbacks of mode objects.
    ///
    /// # Errors
    ///
    /// - `EINVAL` if there are bytes, and they are not an EDID, or if the connector was created
    ///   without an `EDID` property.
    /// - `ENOMEM`.
    ///
    /// C counterparts: `drm_edid_read_custom()`, `drm_edid_connector_update()`.
    pub fn update_edid(&self, edid: Option<&[u8]>) -> Result {
        let raw = self.as_raw();

        // SAFETY: `raw` is a valid connector, and its device has a mode configuration.
        let lock = unsafe { &raw mut (*(*raw).dev).mode_config.mutex };

        // SAFETY: The mutex is initialized, and lives as long as the device.
        unsafe { bindings::mutex_lock(lock) };

        let parsed = match edid {
            // SAFETY: `raw` is valid, and `read_block` gets the pointer to the slice that it wants.
            Some(mut edid) => unsafe {
                bindings::drm_edid_read_custom(
                    raw,
                    Some(read_block),
                    ptr::from_mut(&mut edid).cast(),
                )
            },
            None => ptr::null(),
        };

        // SAFETY: `raw` is valid, the lock is held, and `parsed` is either `NULL` or what
        // `drm_edid_read_custom()` returned.
        let ret = unsafe { bindings::drm_edid_connector_update(raw, parsed) };

        // SAFETY: We locked it above.
        unsafe { bindings::mutex_unlock(lock) };

        // SAFETY: We own `parsed`; it is allowed to be `NULL`.
        unsafe { bindings::drm_edid_free(parsed) };

        to_result(ret)?;

        if edid.is_some() && parsed.is_null() {
            return Err(EINVAL);
        }
        Ok(())
    }
}

#[macros::kunit_tests(rust_drm_kms_edid)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_within_the_edid() {
        let edid = [0u8; BLOCK + 1];
        assert_eq!(block(&edid, 0, BLOCK).map(<[u8]>::len), Some(BLOCK));
        assert!(block(&edid, 1, BLOCK).is_none());
        assert!(block(&edid, usize::MAX, BLOCK).is_none());
        assert!(block(&edid, usize::MAX / BLOCK, BLOCK).is_none());
        assert!(block(&[], 0, BLOCK).is_none());
    }
}
