// SPDX-License-Identifier: GPL-2.0

//! Commands: what the guest sends.

use crate::{Cuboid, Findings, MemEntry, Rect, Wire, CMD_STATUS_FREEZING};

/// The size of the header that every command and every response starts with, in bytes.
pub const HEADER_SIZE: usize = 24;

/// `hdr.flags`: answer only when the command has completed, and echo the fence.
pub const FLAG_FENCE: u32 = 1 << 0;
/// `hdr.flags`: `hdr.ring_idx` is valid.
pub const FLAG_INFO_RING_IDX: u32 = 1 << 1;

/// The header of a command or a response, without its type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`FLAG_FENCE`] and [`FLAG_INFO_RING_IDX`].
    pub flags: u32,
    /// With [`FLAG_FENCE`], the guest's name for the fence.
    pub fence_id: u64,
    /// The rendering context, 0 for none.
    pub ctx_id: u32,
    /// With [`FLAG_INFO_RING_IDX`], the context's timeline.
    pub ring_idx: u8,
}

impl Header {
    /// Reads type, header and whether the padding was zero.
    pub(crate) fn get(bytes: &[u8]) -> Option<(u32, Header, bool)> {
        let bytes = bytes.get(..HEADER_SIZE)?;
        let header = Header {
            flags: Wire::get(&bytes[4..])?,
            fence_id: Wire::get(&bytes[8..])?,
            ctx_id: Wire::get(&bytes[16..])?,
            ring_idx: bytes[20],
        };
        Some((Wire::get(bytes)?, header, bytes[21..] == [0; 3]))
    }

    /// Writes the header with the given type.
    pub(crate) fn put(&self, kind: u32, put: &mut dyn FnMut(&[u8])) {
        kind.put(put);
        self.flags.put(put);
        self.fence_id.put(put);
        self.ctx_id.put(put);
        put(&[self.ring_idx, 0, 0, 0]);
    }

    /// The header that answers a command: the fence, where there is one, and nothing else.
    pub fn answer(&self) -> Header {
        if self.flags & FLAG_FENCE == 0 {
            return Header::default();
        }
        *self
    }
}

/// What follows a command's structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail<'a> {
    /// Nothing.
    None,
    /// The pieces of guest memory of ATTACH_BACKING and CREATE_BLOB.
    Entries(Entries<'a>),
    /// The commands of SUBMIT_3D.
    Data(&'a [u8]),
}

/// A list of [`MemEntry`] as it is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries<'a>(&'a [u8]);

impl<'a> Entries<'a> {
    /// Takes `bytes` for a list of entries; a rest that is no whole entry is not part of it.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(&bytes[..bytes.len() - bytes.len() % MemEntry::SIZE])
    }

    /// The entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = MemEntry> + 'a {
        self.0
            .chunks_exact(MemEntry::SIZE)
            .filter_map(MemEntry::get)
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.0.len() / MemEntry::SIZE
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Why a command could not be decoded. What could be read is there for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Not even a header.
    NoHeader,
    /// A type that no command has.
    UnknownType {
        /// The type.
        kind: u32,
        /// The rest of the header.
        header: Header,
    },
    /// Shorter than the command's structure with what its counts say must follow.
    TooShort {
        /// The type.
        kind: u32,
        /// The rest of the header.
        header: Header,
        /// The size that the command should have, in bytes.
        needed: u64,
    },
}

/// A command with its header and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The header.
    pub header: Header,
    /// The command.
    pub command: Command,
    /// What follows the command's structure.
    pub tail: Tail<'a>,
}

impl<'a> Request<'a> {
    /// Decodes a command, and says what is wrong with it although it could be decoded.
    pub fn decode(bytes: &'a [u8]) -> Result<(Self, Findings), DecodeError> {
        let (kind, header, clean) = Header::get(bytes).ok_or(DecodeError::NoHeader)?;
        let mut findings = Findings {
            padding: !clean,
            ..Findings::default()
        };
        findings.flags = header.flags & !(FLAG_FENCE | FLAG_INFO_RING_IDX) != 0;

        let size = Command::size(kind).ok_or(DecodeError::UnknownType { kind, header })?;
        let too_short = |needed| DecodeError::TooShort {
            kind,
            header,
            needed,
        };
        let (command, clean) = bytes
            .get(HEADER_SIZE..)
            .and_then(|body| Command::get(kind, body))
            .ok_or(too_short(size as u64))?;
        findings.padding |= !clean || command.has_dirty_padding();

        let rest = &bytes[size..];
        let length = command.tail_size();
        let used = match usize::try_from(length) {
            Ok(length) if length <= rest.len() => &rest[..length],
            _ => return Err(too_short(size as u64 + length)),
        };
        findings.trailing = rest.len() - used.len();
        let tail = match command {
            Command::ResourceAttachBacking { .. } | Command::ResourceCreateBlob { .. } => {
                let entries = Entries::new(used);
                findings.padding |= entries.iter().any(|entry| entry.padding != 0);
                Tail::Entries(entries)
            }
            Command::Submit3d { .. } => Tail::Data(used),
            _ => Tail::None,
        };
        Ok((
            Request {
                header,
                command,
                tail,
            },
            findings,
        ))
    }

    /// Gives the bytes of the command to `put`, in order. Padding is zero.
    pub fn encode(&self, put: &mut dyn FnMut(&[u8])) {
        self.header.put(self.command.kind(), put);
        self.command.put(put);
        match self.tail {
            Tail::None => {}
            Tail::Entries(Entries(bytes)) | Tail::Data(bytes) => put(bytes),
        }
    }
}

/// Counts padding, which has a place on the wire and none in [`Command`].
macro_rules! padding_size {
    () => {
        0
    };
    ($padding:literal) => {
        $padding
    };
}

macro_rules! commands {
    ($(
        $(#[$doc:meta])*
        $kind:literal $name:ident $text:literal
        { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* } $(pad $padding:literal)?
    )*) => {
        /// A command of the protocol. Fields are named as in `linux/virtio_gpu.h`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Command {
            $($(#[$doc])* $name { $($(#[$field_doc])* $field: $ty,)* },)*
        }

        impl Command {
            /// Every command's type and name.
            pub const ALL: &'static [(u32, &'static str)] = &[$(($kind, $text),)*];

            /// The name of the command with type `kind`, without `VIRTIO_GPU_CMD_`.
            pub fn name_of(kind: u32) -> Option<&'static str> {
                match kind {
                    $($kind => Some($text),)*
                    _ => None,
                }
            }

            /// The type on the wire.
            pub fn kind(&self) -> u32 {
                match self {
                    $(Command::$name { .. } => $kind,)*
                }
            }

            /// The size of header and structure, without what follows, `None` if there is no
            /// such command.
            pub fn size(kind: u32) -> Option<usize> {
                match kind {
                    $($kind => Some(
                        HEADER_SIZE $(+ <$ty as Wire>::SIZE)* + padding_size!($($padding)?)
                    ),)*
                    _ => None,
                }
            }

            /// Reads the structure of a command, and whether its padding was zero.
            fn get(kind: u32, body: &[u8]) -> Option<(Command, bool)> {
                match kind {
                    $($kind => {
                        let at = 0;
                        $(
                            let $field = <$ty as Wire>::get(body.get(at..)?)?;
                            let at = at + <$ty as Wire>::SIZE;
                        )*
                        let padding = body.get(at..at + padding_size!($($padding)?))?;
                        let clean = padding.iter().all(|&byte| byte == 0);
                        Some((Command::$name { $($field,)* }, clean))
                    })*
                    _ => None,
                }
            }

            fn put(&self, put: &mut dyn FnMut(&[u8])) {
                match self {
                    $(Command::$name { $($field,)* } => {
                        $($field.put(put);)*
                        put(&[0; padding_size!($($padding)?)]);
                    })*
                }
            }

            /// Calls `field` with the name of each field and its numbers, for printing.
            pub fn fields(&self, field: &mut dyn FnMut(&'static str, &dyn Numbers)) {
                // Not every command has a field.
                let _ = &field;
                match self {
                    $(Command::$name { $($field,)* } => {
                        $(field(stringify!($field), $field);)*
                    })*
                }
            }
        }
    };
}

/// A field's value as numbers.
pub trait Numbers {
    /// Calls `number` with each number in the value.
    fn each(&self, number: &mut dyn FnMut(u64));
}

impl<T: Wire> Numbers for T {
    fn each(&self, number: &mut dyn FnMut(u64)) {
        self.numbers(number);
    }
}

commands! {
    /// Ask which scanouts have a display, and its size.
    0x0100 GetDisplayInfo "GET_DISPLAY_INFO" {}
    /// Create a 2D resource.
    0x0101 ResourceCreate2d "RESOURCE_CREATE_2D" {
        /// The guest's choice, not 0.
        resource_id: u32,
        /// A [`crate::Format`].
        format: u32,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
    }
    /// Destroy a resource.
    0x0102 ResourceUnref "RESOURCE_UNREF" {
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Show a part of a 2D resource on a scanout.
    0x0103 SetScanout "SET_SCANOUT" {
        /// The part of the resource.
        r: Rect,
        /// The scanout.
        scanout_id: u32,
        /// The resource, 0 to disable the scanout.
        resource_id: u32,
    }
    /// Bring a resource's changes to the displays that show it.
    0x0104 ResourceFlush "RESOURCE_FLUSH" {
        /// The part of the resource.
        r: Rect,
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Copy from a resource's guest memory to the host.
    0x0105 TransferToHost2d "TRANSFER_TO_HOST_2D" {
        /// The part of the resource.
        r: Rect,
        /// Where the rectangle starts in the guest memory, in bytes.
        offset: u64,
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Give a resource its guest memory.
    0x0106 ResourceAttachBacking "RESOURCE_ATTACH_BACKING" {
        /// The resource.
        resource_id: u32,
        /// Number of entries that follow.
        nr_entries: u32,
    }
    /// Take a resource's guest memory away.
    0x0107 ResourceDetachBacking "RESOURCE_DETACH_BACKING" {
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Ask for a capability set's id, version and size.
    0x0108 GetCapsetInfo "GET_CAPSET_INFO" {
        /// Below `num_capsets`.
        capset_index: u32,
    } pad 4
    /// Ask for a capability set.
    0x0109 GetCapset "GET_CAPSET" {
        /// As GET_CAPSET_INFO gave it.
        capset_id: u32,
        /// Up to the version that GET_CAPSET_INFO gave.
        capset_version: u32,
    }
    /// Ask for a scanout's EDID.
    0x010a GetEdid "GET_EDID" {
        /// The scanout.
        scanout: u32,
    } pad 4
    /// Ask for a resource's UUID.
    0x010b ResourceAssignUuid "RESOURCE_ASSIGN_UUID" {
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Create a blob resource.
    0x010c ResourceCreateBlob "RESOURCE_CREATE_BLOB" {
        /// The guest's choice, not 0.
        resource_id: u32,
        /// [`crate::BLOB_MEM_GUEST`] and the like.
        blob_mem: u32,
        /// [`crate::BLOB_FLAG_USE_MAPPABLE`] and the like.
        blob_flags: u32,
        /// Number of entries that follow.
        nr_entries: u32,
        /// The context's name for the host's memory.
        blob_id: u64,
        /// Bytes.
        size: u64,
    }
    /// Show a part of a blob resource on a scanout.
    0x010d SetScanoutBlob "SET_SCANOUT_BLOB" {
        /// The part of the framebuffer.
        r: Rect,
        /// The scanout.
        scanout_id: u32,
        /// The resource, 0 to disable the scanout.
        resource_id: u32,
        /// Width of the framebuffer, in pixels.
        width: u32,
        /// Height of the framebuffer, in pixels.
        height: u32,
        /// A [`crate::Format`].
        format: u32,
        /// Must be zero.
        padding: u32,
        /// Bytes from one line to the next, for each plane.
        strides: [u32; 4],
        /// Where each plane starts, in bytes.
        offsets: [u32; 4],
    }
    /// Create a rendering context, named by `hdr.ctx_id`.
    0x0200 CtxCreate "CTX_CREATE" {
        /// Length of the name.
        nlen: u32,
        /// The capability set to use, in the low 8 bits.
        context_init: u32,
        /// The name.
        debug_name: [u8; 64],
    }
    /// Destroy a rendering context.
    0x0201 CtxDestroy "CTX_DESTROY" {}
    /// Make a resource usable in a context.
    0x0202 CtxAttachResource "CTX_ATTACH_RESOURCE" {
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Undo [`Command::CtxAttachResource`].
    0x0203 CtxDetachResource "CTX_DETACH_RESOURCE" {
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Create a 3D resource.
    0x0204 ResourceCreate3d "RESOURCE_CREATE_3D" {
        /// The guest's choice, not 0.
        resource_id: u32,
        /// Gallium's texture target.
        target: u32,
        /// A format.
        format: u32,
        /// Gallium's bind flags.
        bind: u32,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// Layers of a volume.
        depth: u32,
        /// Layers of an array.
        array_size: u32,
        /// Mipmap levels, less one.
        last_level: u32,
        /// Samples for a pixel.
        nr_samples: u32,
        /// [`crate::RESOURCE_FLAG_Y_0_TOP`].
        flags: u32,
    } pad 4
    /// Copy from guest memory to a 3D resource.
    0x0205 TransferToHost3d "TRANSFER_TO_HOST_3D" {
        /// The part of the resource.
        r#box: Cuboid,
        /// Where the box starts in the guest memory, in bytes.
        offset: u64,
        /// The resource.
        resource_id: u32,
        /// Mipmap level.
        level: u32,
        /// Bytes from line to line, 0 for packed.
        stride: u32,
        /// Bytes from layer to layer, 0 for packed.
        layer_stride: u32,
    }
    /// Copy from a 3D resource to guest memory.
    0x0206 TransferFromHost3d "TRANSFER_FROM_HOST_3D" {
        /// The part of the resource.
        r#box: Cuboid,
        /// Where the box starts in the guest memory, in bytes.
        offset: u64,
        /// The resource.
        resource_id: u32,
        /// Mipmap level.
        level: u32,
        /// Bytes from line to line, 0 for packed.
        stride: u32,
        /// Bytes from layer to layer, 0 for packed.
        layer_stride: u32,
    }
    /// Run the commands that follow in a context.
    0x0207 Submit3d "SUBMIT_3D" {
        /// Bytes that follow.
        size: u32,
    } pad 4
    /// Map a blob into the host-visible memory.
    0x0208 ResourceMapBlob "RESOURCE_MAP_BLOB" {
        /// The resource.
        resource_id: u32,
        /// Must be zero.
        padding: u32,
        /// Where in the host-visible memory, in bytes.
        offset: u64,
    }
    /// Undo [`Command::ResourceMapBlob`].
    0x0209 ResourceUnmapBlob "RESOURCE_UNMAP_BLOB" {
        /// The resource.
        resource_id: u32,
    } pad 4
    /// Set image, hotspot and place of the cursor; sent on the cursor queue, never answered.
    0x0300 UpdateCursor "UPDATE_CURSOR" {
        /// The scanout.
        scanout_id: u32,
        /// Where the hotspot is, in pixels.
        x: u32,
        /// Where the hotspot is, in pixels.
        y: u32,
        /// Must be zero.
        padding: u32,
        /// The image, 0 to hide the cursor.
        resource_id: u32,
        /// The hotspot in the image.
        hot_x: u32,
        /// The hotspot in the image.
        hot_y: u32,
    } pad 4
    /// Move the cursor; sent on the cursor queue, never answered.
    0x0301 MoveCursor "MOVE_CURSOR" {
        /// The scanout.
        scanout_id: u32,
        /// Where the hotspot is, in pixels.
        x: u32,
        /// Where the hotspot is, in pixels.
        y: u32,
        /// Must be zero.
        padding: u32,
        /// Not used by this command.
        resource_id: u32,
        /// Not used by this command.
        hot_x: u32,
        /// Not used by this command.
        hot_y: u32,
    } pad 4
    /// Tell the host that the guest suspends (1: keep everything over the resets to come) or that
    /// it is awake (0).
    0x0400 StatusFreezing "STATUS_FREEZING" {
        /// 0 or 1.
        freezing: u32,
    } pad 4
}

const _: () = assert!(CMD_STATUS_FREEZING == 0x0400);

impl Command {
    /// The name of the command, without `VIRTIO_GPU_CMD_`.
    pub fn name(&self) -> &'static str {
        // Every command is in the table that `name_of` reads.
        Self::name_of(self.kind()).unwrap_or("?")
    }

    /// The type of the command with this name, in any case.
    pub fn kind_of(name: &str) -> Option<u32> {
        Self::ALL
            .iter()
            .find(|(_, text)| text.eq_ignore_ascii_case(name))
            .map(|&(kind, _)| kind)
    }

    /// Whether the command belongs on the cursor queue.
    pub fn is_cursor(&self) -> bool {
        matches!(
            self,
            Command::UpdateCursor { .. } | Command::MoveCursor { .. }
        )
    }

    /// The number of bytes that follow the structure.
    pub fn tail_size(&self) -> u64 {
        match *self {
            Command::ResourceAttachBacking { nr_entries, .. }
            | Command::ResourceCreateBlob { nr_entries, .. } => {
                u64::from(nr_entries) * MemEntry::SIZE as u64
            }
            Command::Submit3d { size } => size.into(),
            _ => 0,
        }
    }

    /// Whether a padding field that is part of the structure is non-zero.
    fn has_dirty_padding(&self) -> bool {
        match *self {
            Command::SetScanoutBlob { padding, .. }
            | Command::ResourceMapBlob { padding, .. }
            | Command::UpdateCursor { padding, .. }
            | Command::MoveCursor { padding, .. } => padding != 0,
            _ => false,
        }
    }
}
