// SPDX-License-Identifier: GPL-2.0

//! Pixel formats, as DRM fourcc codes.
//!
//! C header: [`include/uapi/drm/drm_fourcc.h`](srctree/include/uapi/drm/drm_fourcc.h)

/// Composes a code of its four characters.
const fn code(chars: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*chars)
}

/// `DRM_FORMAT_XRGB8888`: 32 bits per pixel, `[31:0] x:R:G:B 8:8:8:8`, little endian.
pub const XRGB8888: u32 = code(b"XR24");

/// `DRM_FORMAT_BGRX8888`: 32 bits per pixel, `[31:0] B:G:R:x 8:8:8:8`, little endian.
pub const BGRX8888: u32 = code(b"BX24");

/// [`XRGB8888`] in the byte order of the CPU (`DRM_FORMAT_HOST_XRGB8888`).
pub const HOST_XRGB8888: u32 = if cfg!(target_endian = "little") {
    XRGB8888
} else {
    BGRX8888
};
