// SPDX-License-Identifier: GPL-2.0

//! Responses: what the host answers.

use crate::{DisplayOne, Header, Wire, EDID_SIZE, HEADER_SIZE, MAX_SCANOUTS};

macro_rules! types {
    ($($(#[$doc:meta])* $name:ident $kind:literal $text:literal,)*) => {
        /// The type of a response.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum ResponseType {
            $($(#[$doc])* $name = $kind,)*
        }

        impl ResponseType {
            /// The name without `VIRTIO_GPU_RESP_`.
            pub fn name(self) -> &'static str {
                match self {
                    $(ResponseType::$name => $text,)*
                }
            }

            /// The type with this number.
            pub fn from_kind(kind: u32) -> Option<Self> {
                match kind {
                    $($kind => Some(ResponseType::$name),)*
                    _ => None,
                }
            }
        }
    };
}

types! {
    /// Done.
    OkNoData 0x1100 "OK_NODATA",
    /// The scanouts.
    OkDisplayInfo 0x1101 "OK_DISPLAY_INFO",
    /// A capability set's parameters.
    OkCapsetInfo 0x1102 "OK_CAPSET_INFO",
    /// A capability set.
    OkCapset 0x1103 "OK_CAPSET",
    /// An EDID.
    OkEdid 0x1104 "OK_EDID",
    /// A UUID.
    OkResourceUuid 0x1105 "OK_RESOURCE_UUID",
    /// How to map a blob.
    OkMapInfo 0x1106 "OK_MAP_INFO",
    /// Refused, for no reason that has a number.
    ErrUnspec 0x1200 "ERR_UNSPEC",
    /// Refused: out of memory.
    ErrOutOfMemory 0x1201 "ERR_OUT_OF_MEMORY",
    /// Refused: no such scanout.
    ErrInvalidScanoutId 0x1202 "ERR_INVALID_SCANOUT_ID",
    /// Refused: no such resource.
    ErrInvalidResourceId 0x1203 "ERR_INVALID_RESOURCE_ID",
    /// Refused: no such context.
    ErrInvalidContextId 0x1204 "ERR_INVALID_CONTEXT_ID",
    /// Refused: something else in the command.
    ErrInvalidParameter 0x1205 "ERR_INVALID_PARAMETER",
}

/// An answer.
// There is no allocator to put the large variant elsewhere.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response<'a> {
    /// OK_NODATA.
    NoData,
    /// OK_DISPLAY_INFO.
    DisplayInfo([DisplayOne; MAX_SCANOUTS]),
    /// OK_CAPSET_INFO.
    CapsetInfo {
        /// The set's id.
        id: u32,
        /// Its highest version.
        max_version: u32,
        /// Its size, in bytes.
        max_size: u32,
    },
    /// OK_CAPSET.
    Capset(&'a [u8]),
    /// OK_EDID, up to [`EDID_SIZE`] bytes.
    Edid(&'a [u8]),
    /// OK_RESOURCE_UUID.
    Uuid([u8; 16]),
    /// OK_MAP_INFO.
    MapInfo(u32),
    /// Any of the errors.
    Error(ResponseType),
}

impl<'a> Response<'a> {
    /// The type on the wire.
    pub fn response_type(&self) -> ResponseType {
        match self {
            Response::NoData => ResponseType::OkNoData,
            Response::DisplayInfo(_) => ResponseType::OkDisplayInfo,
            Response::CapsetInfo { .. } => ResponseType::OkCapsetInfo,
            Response::Capset(_) => ResponseType::OkCapset,
            Response::Edid(_) => ResponseType::OkEdid,
            Response::Uuid(_) => ResponseType::OkResourceUuid,
            Response::MapInfo(_) => ResponseType::OkMapInfo,
            Response::Error(error) => *error,
        }
    }

    /// The size on the wire, in bytes.
    pub fn size(&self) -> usize {
        HEADER_SIZE
            + match self {
                Response::NoData | Response::Error(_) => 0,
                Response::DisplayInfo(_) => MAX_SCANOUTS * DisplayOne::SIZE,
                Response::CapsetInfo { .. } | Response::Uuid(_) => 16,
                Response::Capset(data) => data.len(),
                Response::Edid(_) => 8 + EDID_SIZE,
                Response::MapInfo(_) => 8,
            }
    }

    /// Gives the bytes of the answer to `put`, in order. An EDID that is too long is cut.
    pub fn encode(&self, header: &Header, put: &mut dyn FnMut(&[u8])) {
        header.put(self.response_type() as u32, put);
        match self {
            Response::NoData | Response::Error(_) => {}
            Response::DisplayInfo(displays) => displays.put(put),
            Response::CapsetInfo {
                id,
                max_version,
                max_size,
            } => [*id, *max_version, *max_size, 0].put(put),
            Response::Capset(data) => put(data),
            Response::Edid(data) => {
                let data = &data[..data.len().min(EDID_SIZE)];
                [data.len() as u32, 0].put(put);
                put(data);
                put(&[0; EDID_SIZE][data.len()..]);
            }
            Response::Uuid(uuid) => put(uuid),
            Response::MapInfo(info) => [*info, 0].put(put),
        }
    }

    /// Decodes an answer and the header it came with. `None` if the type is unknown, the answer
    /// too short for it, or a size inside it larger than the answer.
    pub fn decode(bytes: &'a [u8]) -> Option<(Header, Self)> {
        let (kind, header, _) = Header::get(bytes)?;
        let body = &bytes[HEADER_SIZE..];
        let kind = ResponseType::from_kind(kind)?;
        let response = match kind {
            ResponseType::OkNoData => Response::NoData,
            ResponseType::OkDisplayInfo => Response::DisplayInfo(Wire::get(body)?),
            ResponseType::OkCapsetInfo => {
                let [id, max_version, max_size, _] = Wire::get(body)?;
                Response::CapsetInfo {
                    id,
                    max_version,
                    max_size,
                }
            }
            ResponseType::OkCapset => Response::Capset(body),
            ResponseType::OkEdid => {
                let [size, _] = <[u32; 2]>::get(body)?;
                let size = usize::try_from(size).ok().filter(|&s| s <= EDID_SIZE)?;
                Response::Edid(body.get(8..8 + EDID_SIZE)?.get(..size)?)
            }
            ResponseType::OkResourceUuid => Response::Uuid(Wire::get(body)?),
            ResponseType::OkMapInfo => {
                let [info, _] = <[u32; 2]>::get(body)?;
                Response::MapInfo(info)
            }
            error => Response::Error(error),
        };
        Some((header, response))
    }
}
