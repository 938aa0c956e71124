// SPDX-License-Identifier: GPL-2.0

//! What the driver shares with the outside: the protocol it speaks with the host.
//!
//! All fields are little-endian on the wire, whatever the guest is; the types say so, and have an
//! alignment of one, so that none of the structures has padding of its own.
//!
//! C header: [`include/uapi/linux/virtio_gpu.h`](srctree/include/uapi/linux/virtio_gpu.h);
//! specification: virtio 1.4, section "GPU Device".

use core::mem::offset_of;
use kernel::{
    prelude::*,
    uapi, //
};
use zerocopy::{
    byteorder::little_endian::{
        U32,
        U64, //
    },
    FromZeros as _, //
};
use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

/// The virtio device id of a GPU, `VIRTIO_ID_GPU`.
pub(crate) const VIRTIO_ID_GPU: u32 = 16;

/// Feature bits of the device, `VIRTIO_GPU_F_*`, and those of virtio itself that the driver reads.
pub(crate) mod feature {
    /// The host has an EDID for each scanout.
    pub(crate) const EDID: u32 = super::uapi::VIRTIO_GPU_F_EDID;
    /// Blob resources.
    pub(crate) const RESOURCE_BLOB: u32 = super::uapi::VIRTIO_GPU_F_RESOURCE_BLOB;
    /// Sizes of blobs are multiples of what the config space says at
    /// [`BLOB_ALIGNMENT`](super::config::BLOB_ALIGNMENT).
    pub(crate) const BLOB_ALIGNMENT: u32 = super::uapi::VIRTIO_GPU_F_BLOB_ALIGNMENT;
    /// The host keeps its resources while the guest sleeps (`VIRTIO_GPU_F_FREEZING`).
    ///
    /// The number was proposed before virtio 1.4 gave it to [`BLOB_ALIGNMENT`]; which of the two a
    /// host means is found out at run time.
    pub(crate) const FREEZING: u32 = super::uapi::VIRTIO_GPU_F_FREEZING;
    /// Indirect descriptors (`VIRTIO_RING_F_INDIRECT_DESC`).
    pub(crate) const INDIRECT_DESC: u32 = 28;
    /// A device that follows virtio 1.0 or later (`VIRTIO_F_VERSION_1`).
    pub(crate) const VERSION_1: u32 = 32;
}

/// Byte offsets in the device's config space, `struct virtio_gpu_config`.
pub(crate) mod config {
    use super::{
        offset_of,
        uapi::virtio_gpu_config, //
    };

    /// Pending events, read only.
    pub(crate) const EVENTS_READ: usize = offset_of!(virtio_gpu_config, events_read);
    /// Written to clear events.
    pub(crate) const EVENTS_CLEAR: usize = offset_of!(virtio_gpu_config, events_clear);
    /// How many scanouts the host offers.
    pub(crate) const NUM_SCANOUTS: usize = offset_of!(virtio_gpu_config, num_scanouts);
    /// How many capability sets the host offers.
    pub(crate) const NUM_CAPSETS: usize = offset_of!(virtio_gpu_config, num_capsets);
    /// What blobs are aligned to, in bytes.
    pub(crate) const BLOB_ALIGNMENT: usize = offset_of!(virtio_gpu_config, blob_alignment);

    /// The display configuration has changed, a bit of [`EVENTS_READ`].
    pub(crate) const EVENT_DISPLAY: u32 = super::uapi::VIRTIO_GPU_EVENT_DISPLAY;
}

/// The most scanouts that the protocol can name, `VIRTIO_GPU_MAX_SCANOUTS`.
pub(crate) const MAX_SCANOUTS: usize = uapi::VIRTIO_GPU_MAX_SCANOUTS as usize;

/// The room for an EDID in [`RespEdid`], in bytes.
pub(crate) const EDID_MAX: usize = 1024;

/// The type of a command, `enum virtio_gpu_ctrl_type`.
pub(crate) mod cmd {
    pub(crate) use super::uapi::{
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO as GET_DISPLAY_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_EDID as GET_EDID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING as RESOURCE_ATTACH_BACKING,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D as RESOURCE_CREATE_2D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH as RESOURCE_FLUSH,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF as RESOURCE_UNREF,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT as SET_SCANOUT,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_STATUS_FREEZING as STATUS_FREEZING,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D as TRANSFER_TO_HOST_2D, //
    };
}

/// The type of an answer, `enum virtio_gpu_ctrl_type`.
pub(crate) mod resp {
    pub(crate) use super::uapi::{
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER as ERR_INVALID_PARAMETER,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID as ERR_INVALID_RESOURCE_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY as ERR_OUT_OF_MEMORY,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_UNSPEC as ERR_UNSPEC,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO as OK_DISPLAY_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_EDID as OK_EDID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA as OK_NODATA, //
    };
}

/// 32 bits per pixel, blue in the lowest eight of a word, the highest ones unused. The formats are
/// named by the bytes in memory.
pub(crate) const FORMAT_HOST_XRGB8888: u32 = if cfg!(target_endian = "big") {
    uapi::virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8R8G8B8_UNORM
} else {
    uapi::virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM
};

macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $($(#[$fmeta])* pub(crate) $field: $ty,)* }
    )*};
}

wire! {
    /// The start of every command and of every answer, `struct virtio_gpu_ctrl_hdr`.
    CtrlHdr {
        ty: U32,
        flags: U32,
        fence_id: U64,
        ctx_id: U32,
        ring_idx: u8,
        padding: [u8; 3],
    }

    /// `struct virtio_gpu_rect`, in pixels.
    WireRect {
        x: U32,
        y: U32,
        width: U32,
        height: U32,
    }

    /// `struct virtio_gpu_resource_unref`.
    ResourceUnref {
        hdr: CtrlHdr,
        resource_id: U32,
        padding: U32,
    }

    /// `struct virtio_gpu_resource_create_2d`.
    ResourceCreate2d {
        hdr: CtrlHdr,
        resource_id: U32,
        format: U32,
        width: U32,
        height: U32,
    }

    /// `struct virtio_gpu_set_scanout`.
    SetScanout {
        hdr: CtrlHdr,
        r: WireRect,
        scanout_id: U32,
        resource_id: U32,
    }

    /// `struct virtio_gpu_resource_flush`.
    ResourceFlush {
        hdr: CtrlHdr,
        r: WireRect,
        resource_id: U32,
        padding: U32,
    }

    /// `struct virtio_gpu_transfer_to_host_2d`.
    TransferToHost2d {
        hdr: CtrlHdr,
        r: WireRect,
        offset: U64,
        resource_id: U32,
        padding: U32,
    }

    /// `struct virtio_gpu_mem_entry`: one contiguous piece of a resource's backing.
    MemEntry {
        addr: U64,
        length: U32,
        padding: U32,
    }

    /// `struct virtio_gpu_resource_attach_backing`, followed by `nr_entries` of [`MemEntry`].
    ResourceAttachBacking {
        hdr: CtrlHdr,
        resource_id: U32,
        nr_entries: U32,
    }

    /// `struct virtio_gpu_cmd_get_edid`.
    GetEdid {
        hdr: CtrlHdr,
        scanout: U32,
        padding: U32,
    }

    /// `struct virtio_gpu_status_freezing`.
    StatusFreezing {
        hdr: CtrlHdr,
        freezing: U32,
        padding: U32,
    }

    /// What the host says of one scanout, `struct virtio_gpu_display_one`.
    DisplayOne {
        r: WireRect,
        enabled: U32,
        flags: U32,
    }

    /// `struct virtio_gpu_resp_display_info`.
    RespDisplayInfo {
        hdr: CtrlHdr,
        pmodes: [DisplayOne; MAX_SCANOUTS],
    }

    /// `struct virtio_gpu_resp_edid`.
    RespEdid {
        hdr: CtrlHdr,
        size: U32,
        padding: U32,
        edid: [u8; EDID_MAX],
    }
}

impl CtrlHdr {
    /// The header of a command without a fence.
    pub(crate) fn new(ty: u32) -> Self {
        Self {
            ty: U32::new(ty),
            ..Self::new_zeroed()
        }
    }
}

/// The name of a command, for messages.
pub(crate) fn command_name(ty: u32) -> &'static str {
    match ty {
        cmd::GET_DISPLAY_INFO => "GET_DISPLAY_INFO",
        cmd::RESOURCE_CREATE_2D => "RESOURCE_CREATE_2D",
        cmd::RESOURCE_UNREF => "RESOURCE_UNREF",
        cmd::SET_SCANOUT => "SET_SCANOUT",
        cmd::RESOURCE_FLUSH => "RESOURCE_FLUSH",
        cmd::TRANSFER_TO_HOST_2D => "TRANSFER_TO_HOST_2D",
        cmd::RESOURCE_ATTACH_BACKING => "RESOURCE_ATTACH_BACKING",
        cmd::GET_EDID => "GET_EDID",
        cmd::STATUS_FREEZING => "STATUS_FREEZING",
        _ => "unknown command",
    }
}

#[kunit_tests(virtgpu_rs_uapi)]
mod tests {
    use super::*;
    use core::mem::size_of;

    macro_rules! same_layout {
        ($ours:ident, $theirs:ident: $($field:ident),* $(,)?) => {
            assert_eq!(size_of::<$ours>(), size_of::<uapi::$theirs>());
            $(assert_eq!(offset_of!($ours, $field), offset_of!(uapi::$theirs, $field));)*
        };
    }

    #[test]
    fn layout_is_that_of_the_c_header() {
        assert_eq!(size_of::<CtrlHdr>(), size_of::<uapi::virtio_gpu_ctrl_hdr>());
        assert_eq!(
            offset_of!(CtrlHdr, ty),
            offset_of!(uapi::virtio_gpu_ctrl_hdr, type_)
        );
        same_layout!(CtrlHdr, virtio_gpu_ctrl_hdr: flags, fence_id, ctx_id, ring_idx, padding);
        same_layout!(WireRect, virtio_gpu_rect: x, y, width, height);
        same_layout!(ResourceUnref, virtio_gpu_resource_unref: hdr, resource_id, padding);
        same_layout!(ResourceCreate2d, virtio_gpu_resource_create_2d:
            hdr, resource_id, format, width, height);
        same_layout!(SetScanout, virtio_gpu_set_scanout: hdr, r, scanout_id, resource_id);
        same_layout!(ResourceFlush, virtio_gpu_resource_flush: hdr, r, resource_id, padding);
        same_layout!(TransferToHost2d, virtio_gpu_transfer_to_host_2d:
            hdr, r, offset, resource_id, padding);
        same_layout!(MemEntry, virtio_gpu_mem_entry: addr, length, padding);
        same_layout!(ResourceAttachBacking, virtio_gpu_resource_attach_backing:
            hdr, resource_id, nr_entries);
        same_layout!(GetEdid, virtio_gpu_cmd_get_edid: hdr, scanout, padding);
        same_layout!(StatusFreezing, virtio_gpu_status_freezing: hdr, freezing, padding);
        same_layout!(DisplayOne, virtio_gpu_resp_display_info_virtio_gpu_display_one:
            r, enabled, flags);
        same_layout!(RespDisplayInfo, virtio_gpu_resp_display_info: hdr, pmodes);
        same_layout!(RespEdid, virtio_gpu_resp_edid: hdr, size, padding, edid);
    }
}
