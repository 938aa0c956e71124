// SPDX-License-Identifier: GPL-2.0

//! A typed encoder and decoder of the virtio-gpu protocol.
//!
//! Everything that crosses the two virtqueues of a virtio-gpu device, as in the virtio
//! specification and Linux' `include/uapi/linux/virtio_gpu.h`, and the FREEZING extension. Nothing
//! is allocated, no input makes it panic, and what the decoder tolerates but the specification
//! forbids comes back as [`Findings`].
//!
//! ```
//! use virtio_gpu_protocol::{Command, Header, Request, Tail};
//!
//! let request = Request {
//!     header: Header::default(),
//!     command: Command::ResourceUnref { resource_id: 7 },
//!     tail: Tail::None,
//! };
//! let mut bytes = Vec::new();
//! request.encode(&mut |piece| bytes.extend_from_slice(piece));
//! assert_eq!(bytes.len(), 32);
//!
//! let (decoded, findings) = Request::decode(&bytes).unwrap();
//! assert_eq!(decoded, request);
//! assert!(findings.is_clean());
//! ```

#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod command;
mod response;
mod wire;

pub use command::{
    Command, DecodeError, Entries, Header, Numbers, Request, Tail, FLAG_FENCE, FLAG_INFO_RING_IDX,
    HEADER_SIZE,
};
pub use response::{Response, ResponseType};
pub use wire::{Config, Cuboid, DisplayOne, MemEntry, Rect, Wire};

/// The virtio device id of a GPU.
pub const VIRTIO_ID_GPU: u32 = 16;

/// Feature bit: 3D with virgl.
pub const F_VIRGL: u32 = 0;
/// Feature bit: GET_EDID.
pub const F_EDID: u32 = 1;
/// Feature bit: RESOURCE_ASSIGN_UUID.
pub const F_RESOURCE_UUID: u32 = 2;
/// Feature bit: blob resources.
pub const F_RESOURCE_BLOB: u32 = 3;
/// Feature bit: contexts of several kinds, with several timelines.
pub const F_CONTEXT_INIT: u32 = 4;
/// Feature bit: `blob_alignment` in the configuration space is valid.
pub const F_BLOB_ALIGNMENT: u32 = 5;
/// Feature bit: STATUS_FREEZING, in the place where it was proposed in 2023. Later versions of the
/// specification gave the bit to [`F_BLOB_ALIGNMENT`], so that a device offers one of the two.
pub const F_FREEZING: u32 = 5;

/// The type of [`Command::StatusFreezing`].
pub const CMD_STATUS_FREEZING: u32 = 0x0400;

/// The most scanouts a device can have.
pub const MAX_SCANOUTS: usize = 16;
/// The place for an EDID in the answer to GET_EDID, in bytes.
pub const EDID_SIZE: usize = 1024;
/// Bit of `events_read`: displays were plugged, unplugged or resized.
pub const EVENT_DISPLAY: u32 = 1 << 0;

/// `blob_mem`: the blob is guest memory.
pub const BLOB_MEM_GUEST: u32 = 1;
/// `blob_mem`: the blob is memory of the host.
pub const BLOB_MEM_HOST3D: u32 = 2;
/// `blob_mem`: the blob is memory of the host, shadowed by guest memory.
pub const BLOB_MEM_HOST3D_GUEST: u32 = 3;

/// `blob_flags`: may be mapped.
pub const BLOB_FLAG_USE_MAPPABLE: u32 = 1 << 0;
/// `blob_flags`: may be shared with other drivers in the guest.
pub const BLOB_FLAG_USE_SHAREABLE: u32 = 1 << 1;
/// `blob_flags`: may be shared with other devices.
pub const BLOB_FLAG_USE_CROSS_DEVICE: u32 = 1 << 2;

/// The mapping's caching, in OK_MAP_INFO.
pub const MAP_CACHE_MASK: u32 = 0x0f;
/// Cached.
pub const MAP_CACHE_CACHED: u32 = 1;

/// The id of the shared memory region that MAP_BLOB maps into.
pub const SHM_ID_HOST_VISIBLE: u8 = 1;

/// `flags` of RESOURCE_CREATE_3D: the first line is the top one.
pub const RESOURCE_FLAG_Y_0_TOP: u32 = 1 << 0;

/// What a command has that the specification forbids, although it can be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// A padding field is not zero.
    pub padding: bool,
    /// A bit of `hdr.flags` that is not defined.
    pub flags: bool,
    /// The number of bytes after the end of the command.
    pub trailing: usize,
}

impl Findings {
    /// Whether there is nothing to say.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

/// A pixel format. All have four bytes a pixel; the name gives the bytes in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Format {
    /// Blue, green, red, alpha.
    B8G8R8A8 = 1,
    /// Blue, green, red, unused.
    B8G8R8X8 = 2,
    /// Alpha, red, green, blue.
    A8R8G8B8 = 3,
    /// Unused, red, green, blue.
    X8R8G8B8 = 4,
    /// Red, green, blue, alpha.
    R8G8B8A8 = 67,
    /// Unused, blue, green, red.
    X8B8G8R8 = 68,
    /// Alpha, blue, green, red.
    A8B8G8R8 = 121,
    /// Red, green, blue, unused.
    R8G8B8X8 = 134,
}

impl Format {
    /// The size of a pixel, in bytes.
    pub const BYTES: u32 = 4;

    /// The format with this number.
    pub fn from_wire(format: u32) -> Option<Self> {
        [
            Format::B8G8R8A8,
            Format::B8G8R8X8,
            Format::A8R8G8B8,
            Format::X8R8G8B8,
            Format::R8G8B8A8,
            Format::X8B8G8R8,
            Format::A8B8G8R8,
            Format::R8G8B8X8,
        ]
        .into_iter()
        .find(|&known| known as u32 == format)
    }

    /// Whether there is an alpha channel.
    pub fn has_alpha(self) -> bool {
        matches!(
            self,
            Format::B8G8R8A8 | Format::A8R8G8B8 | Format::R8G8B8A8 | Format::A8B8G8R8
        )
    }

    /// The pixel as red, green, blue, alpha. Alpha is 255 for a format without it.
    pub fn rgba(self, pixel: [u8; 4]) -> [u8; 4] {
        let [p, q, r, s] = pixel;
        match self {
            Format::B8G8R8A8 => [r, q, p, s],
            Format::B8G8R8X8 => [r, q, p, 255],
            Format::A8R8G8B8 => [q, r, s, p],
            Format::X8R8G8B8 => [q, r, s, 255],
            Format::R8G8B8A8 => [p, q, r, s],
            Format::R8G8B8X8 => [p, q, r, 255],
            Format::A8B8G8R8 => [s, r, q, p],
            Format::X8B8G8R8 => [s, r, q, 255],
        }
    }
}
