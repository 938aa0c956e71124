// SPDX-License-Identifier: GPL-2.0

//! Memory that is shared with a virtio device.

use crate::{
    bindings,
    error::to_result,
    page::{
        page_align,
        PAGE_SIZE, //
    },
    prelude::*,
    types::Opaque, //
};
use core::{
    mem::{
        align_of,
        needs_drop,
        size_of, //
    },
    ptr::{
        self,
        NonNull, //
    }, //
};
use zerocopy::Immutable;

/// Pages that are shared with a device, and hold nothing else.
///
/// They are contiguous and in the linear map. The device may change them at any time, so there are
/// no references to what is in them; it is copied in and out.
///
/// # Invariants
///
/// `memory` was allocated by `alloc_pages_exact()` with a size of `len`, which is a multiple of
/// eight, and is only accessed through this structure and by the device.
pub(super) struct DmaPages {
    memory: NonNull<u64>,
    len: usize,
}

// SAFETY: Pages can be freed from any thread.
unsafe impl Send for DmaPages {}

// SAFETY: A shared reference allows no more than reading what the device may write to anyway.
unsafe impl Sync for DmaPages {}

impl DmaPages {
    /// Allocates at least `len` bytes of zeroes. Process context.
    pub(super) fn new(len: usize) -> Result<Self> {
        let len = page_align(len).filter(|len| *len > 0).ok_or(EINVAL)?;

        // The device may have a say in the length, so that there may not be that much memory.
        let flags = GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN;

        // SAFETY: `len` is not zero.
        let memory = unsafe { bindings::alloc_pages_exact_noprof(len, flags.as_raw()) };

        // INVARIANT: It was just allocated. Pages are a multiple of eight bytes.
        Ok(Self {
            memory: NonNull::new(memory.cast()).ok_or(ENOMEM)?,
            len,
        })
    }

    /// Returns a pointer to the byte at `offset`, which is followed by `len` others.
    ///
    /// Errors: [`EINVAL`] if it is not.
    pub(super) fn as_ptr(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(EINVAL);
        }

        // SAFETY: By the check above, this is within the memory.
        Ok(unsafe { self.memory.as_ptr().cast::<u8>().add(offset) })
    }

    /// Copies `data` to `offset`.
    ///
    /// Errors: [`EINVAL`] if there is no room.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Result {
        let to = self.as_ptr(offset, data.len())?;

        // SAFETY: By the type invariant, the memory is valid for writes, `to` is followed by as
        // many bytes as `data` has, and nothing but the device accesses them.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }

    /// Makes `len` bytes at `offset` zero.
    ///
    /// Errors: [`EINVAL`] if there are not as many.
    pub(super) fn clear(&mut self, offset: usize, len: usize) -> Result {
        let to = self.as_ptr(offset, len)?;

        // SAFETY: By the type invariant, the memory is valid for writes, `to` is followed by as
        // many bytes, and nothing but the device accesses them.
        unsafe { ptr::write_bytes(to, 0, len) };
        Ok(())
    }

    /// Returns the word at `offset`, a multiple of eight.
    ///
    /// # Safety
    ///
    /// At least one byte of it must be within the memory.
    unsafe fn word(&self, offset: usize) -> u64 {
        // SAFETY: By the safety requirements, one byte of this word is within the memory, and by
        // the type invariant, all of it is. The access is volatile because the device may write to
        // the word at the same time.
        unsafe { self.memory.as_ptr().add(offset / 8).read_volatile() }
    }

    /// Copies `len` bytes from `offset`, a multiple of eight, to the beginning of `words`, along
    /// with the rest of the word that the last of them is in.
    ///
    /// Errors: [`EINVAL`] if there are not as many bytes here, or if there is no room for them.
    pub(super) fn read_words(&self, offset: usize, len: usize, words: &mut [u64]) -> Result {
        self.as_ptr(offset, len)?;

        let words = words.get_mut(..len.div_ceil(8)).ok_or(EINVAL)?;

        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: By the check above, at least one byte of this word is within the memory.
            *word = unsafe { self.word(offset + 8 * i) };
        }
        Ok(())
    }

    /// Copies what is at `offset`, a multiple of eight, to `data`.
    ///
    /// Errors: [`EINVAL`] if there are not as many bytes.
    fn read(&self, offset: usize, data: &mut [u8]) -> Result {
        self.as_ptr(offset, data.len())?;

        for (i, chunk) in data.chunks_mut(8).enumerate() {
            // SAFETY: By the check above, at least one byte of this word is within the memory.
            let word = unsafe { self.word(offset + 8 * i) };

            chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

impl Drop for DmaPages {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the memory was allocated with that length.
        unsafe { bindings::free_pages_exact(self.memory.as_ptr().cast(), self.len) };
    }
}

/// Device-writable memory of any length, for a response.
///
/// It consists of whole pages that nothing else is in. What the device wrote is copied before it is
/// looked at, so that it cannot change any more.
///
/// # Examples
///
/// ```
/// use kernel::virtio::queue::ResponseBuf;
///
/// let buf = ResponseBuf::new(1056)?;
///
/// assert_eq!(buf.capacity(), 1056);
/// assert!(ResponseBuf::new(0).is_err());
/// # Ok::<(), Error>(())
/// ```
pub struct ResponseBuf {
    shared: DmaPages,
    copy: KVVec<u8>,
    written: usize,
}

impl ResponseBuf {
    /// Allocates room for `len` bytes. Process context.
    ///
    /// Errors: [`EINVAL`] if `len` is zero or more than 32 bits hold, [`ENOMEM`].
    pub fn new(len: usize) -> Result<Self> {
        if u32::try_from(len).is_err() {
            return Err(EINVAL);
        }

        Ok(Self {
            shared: DmaPages::new(len)?,
            copy: KVVec::zeroed(len, GFP_KERNEL)?,
            written: 0,
        })
    }

    /// Returns how many bytes the device may write.
    pub fn capacity(&self) -> usize {
        self.copy.len()
    }

    /// Returns what the device wrote.
    pub(super) fn as_slice(&self) -> &[u8] {
        self.copy.get(..self.written).unwrap_or(&[])
    }

    pub(super) fn shared(&self) -> Result<*mut u8> {
        self.shared.as_ptr(0, self.capacity())
    }

    /// Copies the `written` bytes that the device wrote, nothing if there is no room for as many.
    pub(super) fn complete(&mut self, written: usize) {
        self.written = 0;
        if let Some(copy) = self.copy.get_mut(..written) {
            if self.shared.read(0, copy).is_ok() {
                self.written = written;
            }
        }
    }
}

/// The largest piece of memory that a bounce buffer of the DMA API is sure to hold, in bytes.
const PIECE_MAX: usize = 128 * 1024;

/// Device-readable memory of any length, which follows a request.
///
/// # Examples
///
/// ```
/// use kernel::virtio::queue::Payload;
///
/// let mut data = KVVec::new();
///
/// assert!(Payload::new(KVVec::<u8>::new()).is_err());
/// data.extend_with(100, [0u8; 4], GFP_KERNEL)?;
/// assert_eq!(Payload::new(data)?.pieces(), 1);
///
/// // What is not contiguous comes in pieces.
/// let large = Payload::new(KVVec::<u8>::zeroed(1 << 20, GFP_KERNEL)?)?;
/// assert!(large.pieces() >= 8);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// The entries of `list` refer to the elements of `_data`, each byte once and in order.
pub struct Payload {
    list: List,
    _data: KVVec<u8>,
}

/// # Invariants
///
/// What is in there is initialised, a table by one of the `sg_alloc_table()` family.
enum List {
    One(Opaque<bindings::scatterlist>),
    Table(Opaque<bindings::sg_table>),
}

// SAFETY: A list and what it refers to can be used and freed from any thread, one at a time.
unsafe impl Send for Payload {}

// SAFETY: A shared reference only allows to read the list.
unsafe impl Sync for Payload {}

impl Payload {
    /// Prepares `data` for the device. Process context.
    ///
    /// Errors: [`EINVAL`] if there is none, [`ENOMEM`].
    pub fn new<T: IntoBytes + Immutable>(data: KVVec<T>) -> Result<Self> {
        const { assert!(align_of::<T>() == 1 && !needs_drop::<T>()) };

        let (ptr, len, capacity) = data.into_raw_parts();

        // SAFETY: The parts are those of a vector with the same allocator. What it has allocated
        // has the size and the alignment of that many bytes, and the first `len` elements consist
        // of initialised ones. By the check above, it makes no difference that they are not dropped
        // as elements.
        Self::from_bytes(unsafe {
            KVVec::from_raw_parts(ptr.cast(), len * size_of::<T>(), capacity * size_of::<T>())
        })
    }

    fn from_bytes(data: KVVec<u8>) -> Result<Self> {
        if data.is_empty() {
            return Err(EINVAL);
        }

        // SAFETY: `data` has a valid address.
        let list = if unsafe { bindings::is_vmalloc_addr(data.as_ptr().cast()) } {
            let table = Opaque::zeroed();

            Self::scatter(&table, &data)?;
            List::Table(table)
        } else if data.len() <= PIECE_MAX {
            let list = Opaque::zeroed();

            // SAFETY: `list` is valid for writes. `data` is in the linear map, and its length fits.
            unsafe {
                bindings::sg_init_one(list.get(), data.as_ptr().cast(), data.len() as c_uint)
            };
            List::One(list)
        } else {
            let table = Opaque::zeroed();

            Self::split(&table, &data)?;
            List::Table(table)
        };

        // INVARIANT: The list was just set up. Moving `data` does not move its elements.
        Ok(Self { list, _data: data })
    }

    /// Sets up `table` for memory in the linear map.
    fn split(table: &Opaque<bindings::sg_table>, data: &[u8]) -> Result {
        let pieces = u32::try_from(data.len().div_ceil(PIECE_MAX))?;

        // SAFETY: `table` is valid for writes.
        to_result(unsafe { bindings::sg_alloc_table(table.get(), pieces, GFP_KERNEL.as_raw()) })?;

        // SAFETY: The table was just allocated.
        let mut sg = unsafe { (*table.get()).sgl };

        for piece in data.chunks(PIECE_MAX) {
            // SAFETY: The table has as many entries as there are pieces, so `sg` is one of them.
            // `piece` is in the linear map, and its length fits.
            unsafe {
                bindings::sg_set_buf(sg, piece.as_ptr().cast(), piece.len() as c_uint);
                sg = bindings::sg_next(sg);
            }
        }
        Ok(())
    }

    /// Sets up `table` for memory that is contiguous in virtual addresses only.
    fn scatter(table: &Opaque<bindings::sg_table>, data: &[u8]) -> Result {
        let count = data.len().div_ceil(PAGE_SIZE);
        let mut pages = KVVec::with_capacity(count, GFP_KERNEL)?;

        for page in data.chunks(PAGE_SIZE) {
            // SAFETY: `page` is in memory that `vmalloc()` allocated.
            let page = unsafe { bindings::vmalloc_to_page(page.as_ptr().cast()) };

            pages.push(page, GFP_KERNEL)?;
        }

        // SAFETY: `table` is valid for writes. `pages` has `count` valid pages, which the data
        // begins at the start of and ends in the last of.
        to_result(unsafe {
            bindings::sg_alloc_table_from_pages_segment(
                table.get(),
                pages.as_mut_ptr(),
                u32::try_from(count)?,
                0,
                data.len(),
                PIECE_MAX as c_uint,
                GFP_KERNEL.as_raw(),
            )
        })
    }

    /// Returns how many descriptors it takes.
    pub fn pieces(&self) -> usize {
        match &self.list {
            List::One(_) => 1,
            // SAFETY: By the type invariant, the table is initialised.
            List::Table(table) => unsafe { (*table.get()).orig_nents as usize },
        }
    }

    /// Returns the list, which must not be written to, and is valid as long as `self` is not moved.
    pub(super) fn sgl(&self) -> *mut bindings::scatterlist {
        match &self.list {
            List::One(list) => list.get(),
            // SAFETY: By the type invariant, the table is initialised.
            List::Table(table) => unsafe { (*table.get()).sgl },
        }
    }
}

impl Drop for List {
    fn drop(&mut self) {
        if let List::Table(table) = self {
            // SAFETY: By the type invariant, the table is initialised.
            unsafe { bindings::sg_free_table(table.get()) };
        }
    }
}
