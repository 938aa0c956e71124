// SPDX-License-Identifier: GPL-2.0

//! Rectangles within a framebuffer.

use crate::bindings;

/// A rectangle within a framebuffer, in pixels.
///
/// # Invariants
///
/// Neither `x + width` nor `y + height` exceeds [`u32::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

impl Rect {
    /// Creates a rectangle, or returns [`None`] if its right or lower edge can't be represented.
    pub const fn new(x: u32, y: u32, width: u32, height: u32) -> Option<Self> {
        if x.checked_add(width).is_none() || y.checked_add(height).is_none() {
            return None;
        }
        // INVARIANT: Checked above.
        Some(Self {
            x,
            y,
            width,
            height,
        })
    }

    /// Creates a rectangle from 16.16 fixed point numbers, without their fractions.
    pub(super) const fn from_fixed(x: u32, y: u32, width: u32, height: u32) -> Self {
        // INVARIANT: None of the numbers has more than 16 bits.
        Self {
            x: x >> 16,
            y: y >> 16,
            width: width >> 16,
            height: height >> 16,
        }
    }

    /// Creates a rectangle from the part of `rect` that lies within `width` and `height`, or
    /// returns [`None`] if there is no such part.
    pub(super) fn from_raw(rect: &bindings::drm_rect, width: u32, height: u32) -> Option<Self> {
        let clip = |from: i32, to: i32, limit: u32| {
            let from = u32::try_from(from.max(0)).ok()?;
            let to = u32::try_from(to.max(0)).ok()?.min(limit);
            (from < to).then(|| (from, to - from))
        };

        let (x, width) = clip(rect.x1, rect.x2, width)?;
        let (y, height) = clip(rect.y1, rect.y2, height)?;
        Self::new(x, y, width, height)
    }

    /// Distance of the left edge from that of the framebuffer.
    pub const fn x(&self) -> u32 {
        self.x
    }

    /// Distance of the upper edge from that of the framebuffer.
    pub const fn y(&self) -> u32 {
        self.y
    }

    /// Width.
    pub const fn width(&self) -> u32 {
        self.width
    }

    /// Height.
    pub const fn height(&self) -> u32 {
        self.height
    }
}

#[macros::kunit_tests(rust_drm_kms_rect)]
mod tests {
    use super::*;

    fn raw(x1: i32, y1: i32, x2: i32, y2: i32) -> bindings::drm_rect {
        bindings::drm_rect { x1, y1, x2, y2 }
    }

    #[test]
    fn edges_are_representable() {
        assert!(Rect::new(u32::MAX, 0, 1, 1).is_none());
        assert!(Rect::new(0, u32::MAX, 1, 1).is_none());
        assert!(Rect::new(u32::MAX - 1, u32::MAX - 1, 1, 1).is_some());
    }

    #[test]
    fn fractions_are_dropped() {
        let rect = Rect::from_fixed(0x1_8000, 0xffff, 0x280_0000, 0x1e0_ffff);
        assert_eq!(Some(rect), Rect::new(1, 0, 640, 480));

        let rect = Rect::from_fixed(u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        assert_eq!(Some(rect), Rect::new(0xffff, 0xffff, 0xffff, 0xffff));
    }

    #[test]
    fn damage_is_clipped() {
        assert_eq!(
            Rect::from_raw(&raw(10, 20, 30, 60), 640, 480),
            Rect::new(10, 20, 20, 40)
        );
        assert_eq!(
            Rect::from_raw(&raw(-10, -20, 1000, 1000), 640, 480),
            Rect::new(0, 0, 640, 480)
        );
    }

    #[test]
    fn no_damage_is_none() {
        assert_eq!(Rect::from_raw(&raw(10, 10, 10, 20), 640, 480), None);
        assert_eq!(Rect::from_raw(&raw(20, 10, 10, 20), 640, 480), None);
        assert_eq!(Rect::from_raw(&raw(640, 0, 650, 10), 640, 480), None);
        assert_eq!(Rect::from_raw(&raw(-20, 0, -10, 10), 640, 480), None);
        assert_eq!(
            Rect::from_raw(&raw(i32::MIN, i32::MIN, i32::MAX, i32::MAX), 0, 0),
            None
        );
    }
}
