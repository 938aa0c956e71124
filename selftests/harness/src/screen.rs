// SPDX-License-Identifier: GPL-2.0

//! What a guest's screens show, as the host sees it.

use std::time::{
    Duration,
    Instant, //
};

use anyhow::{
    Context,
    Result,
    bail, //
};
use image::{
    Rgb,
    RgbImage,
    imageops, //
};
use serde_json::json;
use virtgpu_guest::picture;

use crate::vm::{
    GPU,
    Vm, //
};

/// How long a screen may take to show what the guest says that it shows.
pub const SCREEN_LIMIT: Duration = Duration::from_secs(10);

/// Returns what the host shows on a head of the GPU.
pub fn dump(vm: &mut Vm, head: u32) -> Result<RgbImage> {
    if let Some(host) = &vm.host {
        return host.picture(head);
    }
    let path = vm.dir.join(format!("head{head}.ppm"));
    let arguments = json!({ "filename": path, "device": GPU, "head": head });
    vm.monitor("screendump", arguments)?;
    let picture = image::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    std::fs::remove_file(path)?;
    Ok(picture.into_rgb8())
}

/// Looks at a head until `right` is content with it, and returns the last picture seen and whether it was right.
///
/// The host says nothing when a picture has reached a screen, so this looks again and again.
pub fn watch(
    vm: &mut Vm,
    head: u32,
    limit: Duration,
    mut right: impl FnMut(&RgbImage) -> bool,
) -> Result<(RgbImage, bool)> {
    let end = Instant::now() + limit * vm.patience;
    loop {
        let picture = dump(vm, head)?;
        let is_right = right(&picture);
        if is_right || Instant::now() > end {
            return Ok((picture, is_right));
        }
    }
}

/// Waits until a head shows `expected`, pixel for pixel. If it does not, leaves both pictures as PNG in the guest's directory.
pub fn expect(vm: &mut Vm, head: u32, what: &str, expected: &RgbImage) -> Result<()> {
    let (seen, right) = watch(vm, head, SCREEN_LIMIT, |picture| picture == expected)?;
    if right {
        return Ok(());
    }
    seen.save(vm.dir.join(format!("head{head}-seen.png")))?;
    expected.save(vm.dir.join(format!("head{head}-expected.png")))?;
    // Whose fault it is: did the guest never draw it, or did it get lost on the way?
    let drawn = match vm.framebuffers() {
        Err(error) => format!("unknown, {error:#}"),
        Ok(all) => {
            let wanted = fingerprint(expected);
            all.iter()
                .any(|shown| shown.fingerprint == wanted)
                .to_string()
        }
    };
    let difference = difference(&seen, expected);
    bail!(
        "head {head} does not show {what}: {difference}; a framebuffer in the guest has it: {drawn}"
    )
}

/// Says how two pictures differ.
pub fn difference(seen: &RgbImage, expected: &RgbImage) -> String {
    if seen.dimensions() != expected.dimensions() {
        return format!(
            "{:?} pixels instead of {:?}",
            seen.dimensions(),
            expected.dimensions()
        );
    }
    let total = seen.pixels().len();
    let pixels = seen.enumerate_pixels().zip(expected.pixels());
    let mut different = pixels.filter(|((_, _, seen), expected)| seen != expected);
    match different.next() {
        None => "the same".into(),
        Some(((x, y, seen), expected)) => format!(
            "{} of {} pixels differ, the first at {x},{y}: {:02x?} instead of {:02x?}",
            different.count() + 1,
            total,
            seen.0,
            expected.0
        ),
    }
}

/// Returns test picture `seed`.
pub fn test_picture(seed: u8, width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let [_, red, green, blue] = picture::pixel(seed, x, y).to_be_bytes();
        Rgb([red, green, blue])
    })
}

/// Fingerprint of a picture, as the guest calculates it for its framebuffers.
pub fn fingerprint(picture: &RgbImage) -> u64 {
    picture::fingerprint(
        picture
            .pixels()
            .map(|Rgb([red, green, blue])| u32::from_be_bytes([0, *red, *green, *blue])),
    )
}

/// Whether a picture has nothing in it.
pub fn is_black(picture: &RgbImage) -> bool {
    picture.pixels().all(|pixel| *pixel == Rgb([0, 0, 0]))
}

/// Puts two pictures side by side, with a grey line between.
pub fn side_by_side(left: &RgbImage, right: &RgbImage) -> RgbImage {
    const GAP: u32 = 16;
    let width = left.width() + GAP + right.width();
    let height = left.height().max(right.height());
    let mut both = RgbImage::from_pixel(width, height, Rgb([128, 128, 128]));
    imageops::replace(&mut both, left, 0, 0);
    imageops::replace(&mut both, right, (left.width() + GAP).into(), 0);
    both
}
