// SPDX-License-Identifier: GPL-2.0

//! Scanouts: the displays, what is shown on them, the cursor.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use virtio_gpu_protocol::{DisplayOne, Format, Rect};

use crate::resource::Image;

/// How the bytes of a blob are a framebuffer.
#[derive(Clone, Copy, Debug)]
pub struct BlobLayout {
    /// The format.
    pub format: Format,
    /// Bytes from one line to the next.
    pub stride: u32,
    /// Where the first line starts, in bytes.
    pub offset: u32,
}

/// What a scanout shows.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The resource.
    pub resource_id: u32,
    /// The part of it.
    pub rect: Rect,
    /// For a blob, its layout.
    pub blob: Option<BlobLayout>,
}

/// The cursor of a scanout.
#[derive(Debug, Default)]
pub struct Cursor {
    /// The resource that the image came from, 0 if the cursor is hidden.
    pub resource_id: u32,
    /// Where the hotspot is, in pixels.
    pub x: u32,
    /// Where the hotspot is, in pixels.
    pub y: u32,
    /// The hotspot in the image.
    pub hot: (u32, u32),
    /// The image.
    pub image: Option<Image>,
}

/// A scanout.
#[derive(Debug)]
pub struct Scanout {
    /// Whether a display is plugged in.
    pub connected: bool,
    /// The size that the display prefers, in pixels.
    pub size: (u32, u32),
    /// What it shows.
    pub source: Option<Source>,
    /// Whether the source was set since the last flush, so that the next one shows all of it.
    pub stale: bool,
    /// What is on the display: changes with a flush, not with the resource.
    pub screen: Option<Image>,
    /// The cursor.
    pub cursor: Cursor,
}

impl Scanout {
    /// A scanout that shows nothing.
    pub fn new(size: Option<(u32, u32)>) -> Self {
        Self {
            connected: size.is_some(),
            size: size.unwrap_or((0, 0)),
            source: None,
            stale: false,
            screen: None,
            cursor: Cursor::default(),
        }
    }

    /// Shows nothing.
    pub fn disable(&mut self) {
        self.source = None;
        self.screen = None;
    }

    /// The scanout in the answer to GET_DISPLAY_INFO. `left` is the sum of the widths of those
    /// before it.
    pub fn info(&self, left: u32) -> DisplayOne {
        DisplayOne {
            r: Rect {
                x: if self.connected { left } else { 0 },
                y: 0,
                width: self.size.0,
                height: self.size.1,
            },
            enabled: self.connected.into(),
            flags: 0,
        }
    }
}

/// Writes `image` as a PNG file, without alpha if `opaque`.
pub fn write_png(path: &Path, image: &Image, opaque: bool) -> io::Result<()> {
    let mut pixels = image.rgba();
    if opaque {
        for pixel in pixels.chunks_exact_mut(4) {
            pixel[3] = 255;
        }
    }
    // Written under another name first: whoever waits for the file finds all of it.
    let unfinished = path.with_extension("png.tmp");
    let mut encoder = png::Encoder::new(
        BufWriter::new(File::create(&unfinished)?),
        image.width,
        image.height,
    );
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    std::fs::rename(unfinished, path)
}

/// The EDID of a display that prefers `size`, at 60 Hz.
pub fn edid(scanout: u32, size: (u32, u32)) -> [u8; 128] {
    let mut edid = [0; 128];
    edid[..8].copy_from_slice(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    // Manufacturer "VGH", five bits a letter.
    let letter = |c: u8| u16::from(c - b'A' + 1);
    let maker = letter(b'V') << 10 | letter(b'G') << 5 | letter(b'H');
    edid[8..10].copy_from_slice(&maker.to_be_bytes());
    edid[10..12].copy_from_slice(&0x1050u16.to_le_bytes());
    edid[12..16].copy_from_slice(&(scanout + 1).to_le_bytes());
    edid[16] = 1;
    edid[17] = (2024 - 1990) as u8;
    // EDID 1.4, digital, 8 bits a colour, DisplayPort.
    edid[18..21].copy_from_slice(&[1, 4, 0xa5]);
    // Size in centimetres, at 96 dots an inch.
    let millimetres = |pixels: u32| (u64::from(pixels) * 254 / 960).min(4095) as u32;
    edid[21] = (millimetres(size.0) / 10).min(255) as u8;
    edid[22] = (millimetres(size.1) / 10).min(255) as u8;
    // Gamma 2.2; RGB, the first timing is the native one.
    edid[23] = 120;
    edid[24] = 0x02;
    // sRGB primaries.
    edid[25..35].copy_from_slice(&[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    // 640x480, 800x600 and 1024x768 at 60 Hz.
    edid[35] = 0x21;
    edid[36] = 0x08;
    edid[38..54].fill(0x01);
    if let Some(timing) = timing(size, millimetres) {
        edid[54..72].copy_from_slice(&timing);
    } else {
        edid[54 + 3] = 0x10;
    }
    // Name, serial number.
    let mut text = |at: usize, tag: u8, text: &str| {
        let block = &mut edid[at..at + 18];
        block[3] = tag;
        block[5..].fill(b' ');
        block[5..5 + text.len()].copy_from_slice(text.as_bytes());
        block[5 + text.len()] = b'\n';
    };
    text(72, 0xfc, "virtgpu-host");
    text(90, 0xff, &format!("scanout {scanout}"));
    // No fourth descriptor.
    edid[108 + 3] = 0x10;
    edid[127] = edid[..127].iter().fold(0u8, |sum, &b| sum.wrapping_sub(b));
    edid
}

/// The detailed timing for a size, with blanking as for any flat panel. `None` where the format
/// of the descriptor does not allow the size.
fn timing((width, height): (u32, u32), millimetres: impl Fn(u32) -> u32) -> Option<[u8; 18]> {
    const H_BLANK: u32 = 160;
    const V_BLANK: u32 = 30;
    if width == 0 || height == 0 || width > 4095 || height > 4095 {
        return None;
    }
    let clock = u64::from(width + H_BLANK) * u64::from(height + V_BLANK) * 60 / 10_000;
    let clock = u16::try_from(clock).ok()?.to_le_bytes();
    let (h_mm, v_mm) = (millimetres(width), millimetres(height));
    Some([
        clock[0],
        clock[1],
        width as u8,
        H_BLANK as u8,
        (width >> 8 << 4) as u8,
        height as u8,
        V_BLANK as u8,
        (height >> 8 << 4) as u8,
        // Front porch 48 pixels and 3 lines, sync 32 pixels and 6 lines.
        48,
        32,
        3 << 4 | 6,
        0,
        h_mm as u8,
        v_mm as u8,
        (h_mm >> 8 << 4 | v_mm >> 8) as u8,
        0,
        0,
        // Digital, separate, both positive.
        0x1e,
    ])
}
