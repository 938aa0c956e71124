// SPDX-License-Identifier: GPL-2.0

//! Resources: pixels on the host, blobs, and the guest memory behind them.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use virtio_gpu_protocol::{Format, MemEntry, Rect};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// The bytes of a pixel.
const BYTES: u64 = Format::BYTES as u64;

/// A list of pieces of guest memory, addressed as if it were one.
#[derive(Debug)]
pub struct Backing {
    pieces: Vec<Piece>,
    size: u64,
}

#[derive(Debug)]
struct Piece {
    /// Where the piece starts within the whole.
    start: u64,
    addr: GuestAddress,
    length: usize,
}

impl Backing {
    /// Checks that every piece is guest memory.
    pub fn new(
        mem: &GuestMemoryMmap,
        entries: impl Iterator<Item = MemEntry>,
    ) -> Result<Self, String> {
        let mut size = 0;
        let mut pieces = Vec::new();
        for entry in entries {
            let addr = GuestAddress(entry.addr);
            let length = entry.length as usize;
            if length == 0 {
                return Err(format!("an entry at {:#x} has no length", entry.addr));
            }
            if !mem.check_range(addr, length, Permissions::ReadWrite) {
                return Err(format!(
                    "an entry of {length} bytes at {:#x} is not in guest memory",
                    entry.addr
                ));
            }
            pieces.push(Piece {
                start: size,
                addr,
                length,
            });
            size += length as u64;
        }
        Ok(Self { pieces, size })
    }

    /// The size of all pieces together, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Calls `copy` for each piece of the `length` bytes from `offset` on: the address, and where
    /// it is within the bytes. Fails if the range is not within the backing.
    fn walk(
        &self,
        offset: u64,
        length: usize,
        mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), String>,
    ) -> Result<(), String> {
        let end = offset
            .checked_add(length as u64)
            .filter(|&end| end <= self.size)
            .ok_or_else(|| {
                format!(
                    "{length} bytes at offset {offset} are past the {} bytes of backing",
                    self.size
                )
            })?;
        let first = self
            .pieces
            .partition_point(|piece| piece.start + piece.length as u64 <= offset);
        for piece in &self.pieces[first..] {
            if piece.start >= end {
                break;
            }
            let from = piece.start.max(offset);
            let to = (piece.start + piece.length as u64).min(end);
            let addr = GuestAddress(piece.addr.0 + (from - piece.start));
            copy(addr, (from - offset) as usize..(to - offset) as usize)?;
        }
        Ok(())
    }

    /// Reads from the guest's memory.
    pub fn read(&self, mem: &GuestMemoryMmap, offset: u64, to: &mut [u8]) -> Result<(), String> {
        self.walk(offset, to.len(), |addr, range| {
            mem.read_slice(&mut to[range], addr)
                .map_err(|error| error.to_string())
        })
    }

    /// Writes to the guest's memory.
    pub fn write(&self, mem: &GuestMemoryMmap, offset: u64, from: &[u8]) -> Result<(), String> {
        self.walk(offset, from.len(), |addr, range| {
            mem.write_slice(&from[range], addr)
                .map_err(|error| error.to_string())
        })
    }
}

/// Pixels, in the format that the guest chose.
#[derive(Clone, Debug)]
pub struct Image {
    /// The format.
    pub format: Format,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Line by line, without gaps.
    pub pixels: Vec<u8>,
    /// Whether anything was ever written.
    pub filled: bool,
}

impl Image {
    /// A black, transparent image.
    pub fn new(format: Format, width: u32, height: u32) -> Self {
        Self {
            format,
            width,
            height,
            pixels: vec![0; (u64::from(width) * u64::from(height) * BYTES) as usize],
            filled: false,
        }
    }

    /// Bytes from one line to the next.
    pub fn stride(&self) -> u64 {
        u64::from(self.width) * BYTES
    }

    /// The bytes of `r`'s part of a line, `r` being within the image.
    fn line(&self, r: &Rect, line: u32) -> std::ops::Range<usize> {
        let start = (u64::from(r.y + line) * self.stride() + u64::from(r.x) * BYTES) as usize;
        start..start + r.width as usize * BYTES as usize
    }

    /// Fills `r` from what `read` gives for an offset that starts at `offset` and grows by
    /// `stride` with each line.
    pub fn fill(
        &mut self,
        r: &Rect,
        offset: u64,
        stride: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        if r.width == self.width && stride == self.stride() {
            // Whole lines without gaps: one piece.
            let range = self.line(r, 0).start..self.line(r, r.height - 1).end;
            read(offset, &mut self.pixels[range])?;
        } else {
            for line in 0..r.height {
                let range = self.line(r, line);
                let offset = u64::from(line)
                    .checked_mul(stride)
                    .and_then(|lines| lines.checked_add(offset))
                    .ok_or("the offset overflows")?;
                read(offset, &mut self.pixels[range])?;
            }
        }
        self.filled = true;
        Ok(())
    }

    /// Gives the lines of `r` to `write`, the reverse of [`Image::fill`].
    pub fn drain(
        &self,
        r: &Rect,
        offset: u64,
        stride: u64,
        mut write: impl FnMut(u64, &[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        for line in 0..r.height {
            let offset = u64::from(line)
                .checked_mul(stride)
                .and_then(|lines| lines.checked_add(offset))
                .ok_or("the offset overflows")?;
            write(offset, &self.pixels[self.line(r, line)])?;
        }
        Ok(())
    }

    /// The image as red, green, blue, alpha.
    pub fn rgba(&self) -> Vec<u8> {
        self.pixels
            .chunks_exact(BYTES as usize)
            .flat_map(|pixel| self.format.rgba([pixel[0], pixel[1], pixel[2], pixel[3]]))
            .collect()
    }
}

/// A blob.
#[derive(Debug)]
pub struct Blob {
    /// [`virtio_gpu_protocol::BLOB_MEM_GUEST`] and the like.
    pub mem: u32,
    /// [`virtio_gpu_protocol::BLOB_FLAG_USE_MAPPABLE`] and the like.
    pub flags: u32,
    /// Bytes.
    pub size: u64,
    /// The host's memory, unless the blob is the guest's.
    pub host: Option<File>,
    /// Where it is mapped in the host-visible memory.
    pub mapped: Option<u64>,
}

/// What a resource is.
#[derive(Debug)]
pub enum Kind {
    /// Pixels that the host keeps.
    Image(Image),
    /// A 3D resource of no format or shape that is known here: accepted, and never looked at.
    Opaque,
    /// A blob.
    Blob(Blob),
}

/// A resource.
#[derive(Debug)]
pub struct Resource {
    /// What it is.
    pub kind: Kind,
    /// Its guest memory.
    pub backing: Option<Backing>,
    /// Its UUID, once it was asked for.
    pub uuid: Option<[u8; 16]>,
    /// Whether it was made by RESOURCE_CREATE_3D.
    pub is_3d: bool,
    /// The contexts that it is attached to.
    pub contexts: BTreeSet<u32>,
}

impl Resource {
    /// A resource without memory.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            backing: None,
            uuid: None,
            is_3d: false,
            contexts: BTreeSet::new(),
        }
    }

    /// The size of the memory that it takes on the host, in bytes.
    pub fn host_size(&self) -> u64 {
        match &self.kind {
            Kind::Image(image) => image.pixels.len() as u64,
            Kind::Opaque => 0,
            Kind::Blob(blob) => blob.host.as_ref().map_or(0, |_| blob.size),
        }
    }

    /// Reads a blob's memory, wherever it is.
    pub fn read_blob(
        &self,
        mem: &GuestMemoryMmap,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), String> {
        match (&self.kind, &self.backing) {
            (
                Kind::Blob(Blob {
                    host: Some(file), ..
                }),
                _,
            ) => file
                .read_exact_at(to, offset)
                .map_err(|error| format!("{} bytes at offset {offset}: {error}", to.len())),
            (_, Some(backing)) => backing.read(mem, offset, to),
            _ => Err("the blob has no memory".into()),
        }
    }
}
