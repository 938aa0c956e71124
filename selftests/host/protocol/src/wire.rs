// SPDX-License-Identifier: GPL-2.0

//! Reading and writing the little-endian pieces that the structures are made of.

/// A piece of a wire structure, with a fixed size and without padding inside.
pub trait Wire: Copy {
    /// The size on the wire, in bytes.
    const SIZE: usize;

    /// Reads the piece from the first [`Wire::SIZE`] bytes of `bytes`, `None` if there are fewer.
    fn get(bytes: &[u8]) -> Option<Self>;

    /// Gives the bytes of the piece to `put`, in order.
    fn put(&self, put: &mut dyn FnMut(&[u8]));

    /// The piece as a list of numbers, for printing.
    fn numbers(&self, number: &mut dyn FnMut(u64));
}

macro_rules! integer {
    ($($ty:ty),*) => {$(
        impl Wire for $ty {
            const SIZE: usize = core::mem::size_of::<$ty>();

            fn get(bytes: &[u8]) -> Option<Self> {
                let bytes = bytes.get(..Self::SIZE)?;
                Some(Self::from_le_bytes(bytes.try_into().ok()?))
            }

            fn put(&self, put: &mut dyn FnMut(&[u8])) {
                put(&self.to_le_bytes());
            }

            fn numbers(&self, number: &mut dyn FnMut(u64)) {
                number((*self).into());
            }
        }
    )*};
}

integer!(u8, u32, u64);

impl<T: Wire + Default, const N: usize> Wire for [T; N] {
    const SIZE: usize = N * T::SIZE;

    fn get(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..Self::SIZE)?;
        let mut array = [T::default(); N];
        for (item, chunk) in array.iter_mut().zip(bytes.chunks_exact(T::SIZE)) {
            *item = T::get(chunk)?;
        }
        Some(array)
    }

    fn put(&self, put: &mut dyn FnMut(&[u8])) {
        for item in self {
            item.put(put);
        }
    }

    fn numbers(&self, number: &mut dyn FnMut(u64)) {
        for item in self {
            item.numbers(number);
        }
    }
}

macro_rules! pieces {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty,)*
        }

        impl Wire for $name {
            const SIZE: usize = 0 $(+ <$ty as Wire>::SIZE)*;

            fn get(bytes: &[u8]) -> Option<Self> {
                let mut rest = bytes;
                $(
                    let $field = <$ty as Wire>::get(rest)?;
                    rest = &rest[<$ty as Wire>::SIZE..];
                )*
                let _ = rest;
                Some(Self { $($field,)* })
            }

            fn put(&self, put: &mut dyn FnMut(&[u8])) {
                $(self.$field.put(put);)*
            }

            fn numbers(&self, number: &mut dyn FnMut(u64)) {
                $(self.$field.numbers(number);)*
            }
        }
    )*};
}

pieces! {
    /// A rectangle, in pixels.
    Rect {
        /// Left edge.
        x: u32,
        /// Top edge.
        y: u32,
        /// Width.
        width: u32,
        /// Height.
        height: u32,
    }

    /// A box in a 3D resource.
    Cuboid {
        /// Left edge.
        x: u32,
        /// Top edge.
        y: u32,
        /// First layer.
        z: u32,
        /// Width.
        w: u32,
        /// Height.
        h: u32,
        /// Number of layers.
        d: u32,
    }

    /// One scanout in the answer to GET_DISPLAY_INFO.
    DisplayOne {
        /// Where the scanout is, and its preferred size.
        r: Rect,
        /// Non-zero if a display is plugged in.
        enabled: u32,
        /// No flag is defined.
        flags: u32,
    }

    /// A piece of guest memory that backs a resource.
    MemEntry {
        /// Guest-physical (or DMA) address.
        addr: u64,
        /// Length in bytes.
        length: u32,
        /// Must be zero.
        padding: u32,
    }

    /// The device's configuration space.
    Config {
        /// Pending events, read-only: [`crate::EVENT_DISPLAY`].
        events_read: u32,
        /// Write a bit to clear that event.
        events_clear: u32,
        /// Number of scanouts, 1 to [`crate::MAX_SCANOUTS`].
        num_scanouts: u32,
        /// Number of capability sets.
        num_capsets: u32,
        /// With BLOB_ALIGNMENT, the alignment of blob sizes and offsets in bytes.
        blob_alignment: u32,
    }
}

impl Rect {
    /// Whether the rectangle is within a surface of `width` by `height` pixels, without overflow.
    pub fn is_within(&self, width: u32, height: u32) -> bool {
        u64::from(self.x) + u64::from(self.width) <= u64::from(width)
            && u64::from(self.y) + u64::from(self.height) <= u64::from(height)
    }

    /// Whether the rectangle contains no pixel.
    pub fn is_empty(&self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// The pixels that `self` and `other` share, `None` if there are none.
    pub fn intersect(&self, other: &Rect) -> Option<Rect> {
        let right = |r: &Rect| u64::from(r.x) + u64::from(r.width);
        let bottom = |r: &Rect| u64::from(r.y) + u64::from(r.height);
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        let width = right(self).min(right(other)).checked_sub(x.into())?;
        let height = bottom(self).min(bottom(other)).checked_sub(y.into())?;
        if width == 0 || height == 0 {
            return None;
        }
        Some(Rect {
            x,
            y,
            width: width as u32,
            height: height as u32,
        })
    }
}
