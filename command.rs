// SPDX-License-Identifier: GPL-2.0

//! Commands and answers, one type each.
//!
//! A command is built here, complete and with its padding zero; the only place where an answer is
//! read is here too. What the host says is checked once, on a copy that the host cannot change any
//! more: [`check`] looks at length and type, the types below at the numbers. Behind this door
//! nothing is known of the wire.
//!
//! Nothing in here knows DRM, and nothing sleeps.

use core::mem::size_of;
use kernel::prelude::*;
use zerocopy::{
    FromBytes,
    FromZeros as _,
    Immutable,
    IntoBytes, //
};

use crate::uapi::{
    self,
    cmd,
    resp,
    CtrlHdr,
    WireRect, //
};

/// The largest answer that has no data: a header.
pub(crate) const HEADER_LEN: usize = size_of::<CtrlHdr>();

/// The largest width and height of a display that is believed, in pixels.
///
/// Twice what the driver can show. A host that says more is clamped.
pub(crate) const DISPLAY_MAX: u32 = 16384;

/// A rectangle in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rect {
    pub(crate) x: u32,
    pub(crate) y: u32,
    pub(crate) width: u32,
    pub(crate) height: u32,
}

impl Rect {
    /// The byte at which the first pixel of the rectangle stands in a buffer.
    ///
    /// `pitch` is the length of a line and `cpp` the size of a pixel, both in bytes.
    pub(crate) fn offset(&self, pitch: u32, cpp: u32) -> u64 {
        u64::from(self.y) * u64::from(pitch) + u64::from(self.x) * u64::from(cpp)
    }
}

impl From<Rect> for WireRect {
    fn from(r: Rect) -> Self {
        Self {
            x: r.x.into(),
            y: r.y.into(),
            width: r.width.into(),
            height: r.height.into(),
        }
    }
}

/// A command of the control queue.
pub(crate) trait Command: IntoBytes + Immutable {
    /// The command's number.
    const TYPE: u32;
    /// The number of the answer that says that it was carried out.
    const OK: u32 = resp::OK_NODATA;
    /// How long an answer is at the most, in bytes.
    const ANSWER_LEN: usize = HEADER_LEN;
}

macro_rules! commands {
    ($($name:ident => $ty:ident $(, $ok:ident: $answer:ident)?;)*) => {
        $(impl Command for uapi::$name {
            const TYPE: u32 = cmd::$ty;
            $(
                const OK: u32 = resp::$ok;
                const ANSWER_LEN: usize = size_of::<uapi::$answer>();
            )?
        })*
    };
}

commands! {
    ResourceUnref => RESOURCE_UNREF;
    ResourceCreate2d => RESOURCE_CREATE_2D;
    SetScanout => SET_SCANOUT;
    ResourceFlush => RESOURCE_FLUSH;
    TransferToHost2d => TRANSFER_TO_HOST_2D;
    ResourceAttachBacking => RESOURCE_ATTACH_BACKING;
    GetEdid => GET_EDID, OK_EDID: RespEdid;
    StatusFreezing => STATUS_FREEZING;
}

/// A command that is a header and no more: only `GET_DISPLAY_INFO` is one.
impl Command for CtrlHdr {
    const TYPE: u32 = cmd::GET_DISPLAY_INFO;
    const OK: u32 = resp::OK_DISPLAY_INFO;
    const ANSWER_LEN: usize = size_of::<uapi::RespDisplayInfo>();
}

/// Asks for size and place of every scanout.
pub(crate) fn get_display_info() -> CtrlHdr {
    CtrlHdr::new(cmd::GET_DISPLAY_INFO)
}

/// Asks for the EDID of one scanout.
pub(crate) fn get_edid(scanout: u32) -> uapi::GetEdid {
    uapi::GetEdid {
        hdr: CtrlHdr::new(cmd::GET_EDID),
        scanout: scanout.into(),
        padding: 0.into(),
    }
}

/// Creates a two-dimensional resource; the host allocates it.
pub(crate) fn resource_create_2d(
    resource_id: u32,
    format: u32,
    width: u32,
    height: u32,
) -> uapi::ResourceCreate2d {
    uapi::ResourceCreate2d {
        hdr: CtrlHdr::new(cmd::RESOURCE_CREATE_2D),
        resource_id: resource_id.into(),
        format: format.into(),
        width: width.into(),
        height: height.into(),
    }
}

/// Destroys a resource. The host lets go of its backing, too.
pub(crate) fn resource_unref(resource_id: u32) -> uapi::ResourceUnref {
    uapi::ResourceUnref {
        hdr: CtrlHdr::new(cmd::RESOURCE_UNREF),
        resource_id: resource_id.into(),
        padding: 0.into(),
    }
}

/// Tells where in guest memory a resource's contents are; `nr_entries` of [`mem_entry`] follow.
pub(crate) fn resource_attach_backing(
    resource_id: u32,
    nr_entries: u32,
) -> uapi::ResourceAttachBacking {
    uapi::ResourceAttachBacking {
        hdr: CtrlHdr::new(cmd::RESOURCE_ATTACH_BACKING),
        resource_id: resource_id.into(),
        nr_entries: nr_entries.into(),
    }
}

/// One contiguous piece of a backing.
pub(crate) fn mem_entry(addr: u64, length: u32) -> uapi::MemEntry {
    uapi::MemEntry {
        addr: addr.into(),
        length: length.into(),
        padding: 0.into(),
    }
}

/// Shows `rect` of a resource on a scanout. Resource 0 switches the scanout off.
pub(crate) fn set_scanout(scanout_id: u32, resource_id: u32, rect: Rect) -> uapi::SetScanout {
    uapi::SetScanout {
        hdr: CtrlHdr::new(cmd::SET_SCANOUT),
        r: rect.into(),
        scanout_id: scanout_id.into(),
        resource_id: resource_id.into(),
    }
}

/// Copies a rectangle from guest memory, where it starts at byte `offset`, into the resource.
pub(crate) fn transfer_to_host_2d(
    resource_id: u32,
    offset: u64,
    rect: Rect,
) -> uapi::TransferToHost2d {
    uapi::TransferToHost2d {
        hdr: CtrlHdr::new(cmd::TRANSFER_TO_HOST_2D),
        r: rect.into(),
        offset: offset.into(),
        resource_id: resource_id.into(),
        padding: 0.into(),
    }
}

/// Brings a rectangle of a resource onto every scanout that shows it.
pub(crate) fn resource_flush(resource_id: u32, rect: Rect) -> uapi::ResourceFlush {
    uapi::ResourceFlush {
        hdr: CtrlHdr::new(cmd::RESOURCE_FLUSH),
        r: rect.into(),
        resource_id: resource_id.into(),
        padding: 0.into(),
    }
}

/// Tells the host whether to keep everything over the reset to come.
pub(crate) fn status_freezing(freezing: bool) -> uapi::StatusFreezing {
    uapi::StatusFreezing {
        hdr: CtrlHdr::new(cmd::STATUS_FREEZING),
        freezing: u32::from(freezing).into(),
        padding: 0.into(),
    }
}

/// Checks what the host wrote: is it long enough for a header, and does its type say `ok`?
///
/// Returns the type on error, where there was one, for the message.
///
/// Errors: [`EPROTO`] for an answer that is too short or of a type that makes no sense, otherwise
/// what comes closest to the host's error.
pub(crate) fn check(answer: &[u8], ok: u32) -> Result<(), (Error, u32)> {
    let Ok((hdr, _)) = CtrlHdr::read_from_prefix(answer) else {
        return Err((EPROTO, 0));
    };
    match hdr.ty.get() {
        ty if ty == ok => Ok(()),
        ty @ resp::ERR_OUT_OF_MEMORY => Err((ENOMEM, ty)),
        ty @ resp::ERR_UNSPEC => Err((EREMOTEIO, ty)),
        ty @ resp::ERR_UNSPEC..=resp::ERR_INVALID_PARAMETER => Err((EINVAL, ty)),
        ty => Err((EPROTO, ty)),
    }
}

/// What the host says of one scanout, within bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DisplayInfo {
    /// Whether something is connected.
    pub(crate) enabled: bool,
    /// What the host would like to see, 0 by 0 if it does not care.
    pub(crate) width: u32,
    pub(crate) height: u32,
}

impl DisplayInfo {
    /// Puts it into one word, so that it can be replaced and looked at as a whole.
    pub(crate) fn to_word(self) -> u64 {
        // No size is larger than `DISPLAY_MAX`, which has 15 bits.
        u64::from(self.enabled) << 32 | u64::from(self.width << 16 | self.height)
    }

    /// The opposite of [`DisplayInfo::to_word`].
    pub(crate) fn from_word(word: u64) -> Self {
        Self {
            enabled: word >> 32 != 0,
            width: word as u32 >> 16,
            height: word as u32 & 0xffff,
        }
    }
}

/// The answer to [`get_display_info`].
///
/// `clamped` is set where the host named a size that no display has.
pub(crate) struct Displays {
    pub(crate) info: [DisplayInfo; uapi::MAX_SCANOUTS],
    pub(crate) clamped: bool,
}

impl Displays {
    /// Reads a checked answer.
    pub(crate) fn parse(answer: &[u8]) -> Result<Self> {
        let (wire, _) = uapi::RespDisplayInfo::ref_from_prefix(answer).map_err(|_| EPROTO)?;
        let mut displays = Self {
            info: Default::default(),
            clamped: false,
        };

        for (info, one) in displays.info.iter_mut().zip(&wire.pmodes) {
            let (width, height) = (one.r.width.get(), one.r.height.get());

            info.enabled = one.enabled.get() != 0;
            info.width = width.min(DISPLAY_MAX);
            info.height = height.min(DISPLAY_MAX);
            displays.clamped |= width > DISPLAY_MAX || height > DISPLAY_MAX;
        }
        Ok(displays)
    }
}

/// Finds the EDID in a checked answer to [`get_edid`].
///
/// The bytes themselves are not looked at: that is the business of who can read an EDID.
pub(crate) fn edid(answer: &[u8]) -> Result<&[u8]> {
    let (wire, _) = uapi::RespEdid::ref_from_prefix(answer).map_err(|_| EPROTO)?;
    let size = usize::try_from(wire.size.get())?;

    wire.edid.get(..size).ok_or(EPROTO)
}

#[kunit_tests(virtgpu_rs_command)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_little_endian_and_padding_is_zero() {
        let wire = status_freezing(true);
        let bytes = wire.as_bytes();

        assert_eq!(bytes.len(), 32);
        assert_eq!(bytes[..4], [0x00, 0x04, 0, 0]);
        assert_eq!(bytes[4..24], [0; 20]);
        assert_eq!(bytes[24..], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(status_freezing(false).as_bytes()[24..], [0; 8]);
    }

    #[test]
    fn a_rectangle_starts_where_its_first_pixel_is() {
        let rect = Rect {
            x: 3,
            y: 2,
            width: 1,
            height: 1,
        };

        assert_eq!(rect.offset(4096, 4), 2 * 4096 + 12);
        // Where 32 bits would overflow.
        let rect = Rect { y: 0xffff, ..rect };
        assert_eq!(rect.offset(0x2_0000, 4), 0xffff * 0x2_0000 + 12);
    }

    #[test]
    fn an_answer_is_checked_for_length_and_type() {
        let hdr = CtrlHdr::new(resp::OK_NODATA);
        let is = |answer: &[u8], ok| check(answer, ok).map_err(|(e, ty)| (e.to_errno(), ty));
        let errno = |e: Error| e.to_errno();

        assert_eq!(is(hdr.as_bytes(), resp::OK_NODATA), Ok(()));
        assert_eq!(
            is(hdr.as_bytes(), resp::OK_EDID),
            Err((errno(EPROTO), resp::OK_NODATA))
        );
        assert_eq!(
            is(&hdr.as_bytes()[..23], resp::OK_NODATA),
            Err((errno(EPROTO), 0))
        );
        assert_eq!(is(&[], resp::OK_NODATA), Err((errno(EPROTO), 0)));
        for (ty, error) in [
            (0x1200, EREMOTEIO),
            (0x1201, ENOMEM),
            (0x1202, EINVAL),
            (0x1203, EINVAL),
            (0x1204, EINVAL),
            (0x1205, EINVAL),
            (0x1206, EPROTO),
            (0, EPROTO),
            (u32::MAX, EPROTO),
        ] {
            let hdr = CtrlHdr::new(ty);
            assert_eq!(is(hdr.as_bytes(), resp::OK_NODATA), Err((errno(error), ty)));
        }
    }

    #[test]
    fn display_sizes_are_bounded() {
        let mut wire = uapi::RespDisplayInfo::new_zeroed();
        wire.pmodes[0].enabled = 7.into();
        wire.pmodes[0].r.width = 1024.into();
        wire.pmodes[0].r.height = 768.into();
        let displays = Displays::parse(wire.as_bytes()).expect("a full answer is read");
        assert!(!displays.clamped);
        assert_eq!(
            displays.info[0],
            DisplayInfo {
                enabled: true,
                width: 1024,
                height: 768
            }
        );
        assert_eq!(displays.info[15], DisplayInfo::default());

        wire.pmodes[3].r.width = u32::MAX.into();
        let displays = Displays::parse(wire.as_bytes()).expect("a full answer is read");
        assert!(displays.clamped);
        assert_eq!(displays.info[3].width, DISPLAY_MAX);
        for info in displays.info {
            assert_eq!(DisplayInfo::from_word(info.to_word()), info);
        }
        assert!(Displays::parse(&wire.as_bytes()[..407]).is_err());
    }

    #[test]
    fn an_edid_is_no_longer_than_its_answer() {
        let mut wire = uapi::RespEdid::new_zeroed();
        wire.size = 128.into();
        wire.edid[127] = 9;
        assert_eq!(edid(wire.as_bytes()).map_or(0, |e| e[127]), 9);
        assert_eq!(edid(wire.as_bytes()).map_or(0, |e| e.len()), 128);
        for size in [1025, u32::MAX] {
            wire.size = size.into();
            assert!(edid(wire.as_bytes()).is_err());
        }
        assert!(edid(&wire.as_bytes()[..1055]).is_err());
    }
}
