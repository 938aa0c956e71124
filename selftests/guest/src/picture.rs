// SPDX-License-Identifier: GPL-2.0

//! Test pictures, which the guest draws and the host expects.

/// Returns the colour, `0xRRGGBB`, of a pixel of test picture `seed`.
///
/// Within a picture no two pixels of a 4096x4096 area have the same colour, so that a picture that is shifted, scaled or cropped
/// differs from the right one. Two seeds differ in every pixel.
pub const fn pixel(seed: u8, x: u32, y: u32) -> u32 {
    let red = (x as u8).wrapping_add(seed.wrapping_mul(31));
    let green = (y as u8).wrapping_add(seed.wrapping_mul(57));
    let blue = ((x >> 8 << 4 | y >> 8) as u8).wrapping_add(seed.wrapping_mul(97));
    (red as u32) << 16 | (green as u32) << 8 | blue as u32
}

/// Fingerprint of a picture's pixels, row by row, each as `0xRRGGBB` (64-bit FNV-1a, a pixel a step).
pub fn fingerprint(pixels: impl IntoIterator<Item = u32>) -> u64 {
    pixels
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, pixel| {
            (hash ^ u64::from(pixel)).wrapping_mul(0x100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_in_every_pixel() {
        for seed in 1..=u8::MAX {
            assert_ne!(pixel(0, 300, 700), pixel(seed, 300, 700));
        }
    }

    #[test]
    fn fingerprint_sees_order() {
        assert_ne!(fingerprint([1, 2]), fingerprint([2, 1]));
    }
}
