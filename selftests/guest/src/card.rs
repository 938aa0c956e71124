// SPDX-License-Identifier: GPL-2.0

//! The card: what every client needs of it.

use std::fs::{
    File,
    OpenOptions, //
};
use std::io;
use std::os::fd::{
    AsFd,
    BorrowedFd, //
};

use anyhow::{
    Context,
    Result,
    bail, //
};
use drm::control::{
    Device as _,
    Mode,
    ModeTypeFlags,
    RawResourceHandle,
    connector,
    crtc,
    dumbbuffer::DumbBuffer,
    framebuffer, //
};
use drm::{
    Device as _,
    DriverCapability, //
};
use rustix::mm::{
    MapFlags,
    ProtFlags, //
};
use virtgpu_guest::{
    picture,
    wire, //
};

/// Makes a system call again if something has interrupted it, as libdrm does.
///
/// DRM's locks are given up for a signal, and the freezer, which stops every task before the guest sleeps, is as good as one.
pub fn restarted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// An open primary node.
pub struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

impl Card {
    /// Opens the first card that is driven by `virtio_gpu`.
    pub fn open() -> Result<Self> {
        for minor in 0..16 {
            let path = format!("/dev/dri/card{minor}");
            let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else {
                continue;
            };
            let card = Self(file);
            if card.get_driver().with_context(|| path)?.name() == "virtio_gpu" {
                return Ok(card);
            }
        }
        bail!("no card in /dev/dri is driven by virtio_gpu")
    }

    /// Version of the driver: major, minor, patch level.
    pub fn version(&self) -> io::Result<[i32; 3]> {
        let version = drm_ffi::get_version(self.as_fd(), None, None, None)?;
        Ok([
            version.version_major,
            version.version_minor,
            version.version_patchlevel,
        ])
    }

    /// Returns the connectors, probed anew.
    pub fn connectors(&self) -> io::Result<Vec<connector::Info>> {
        self.resource_handles()?
            .connectors()
            .iter()
            .map(|&handle| self.get_connector(handle, true))
            .collect()
    }

    /// Gives each connected connector a CRTC of its own.
    pub fn connected(&self) -> Result<Vec<(connector::Info, crtc::Handle)>> {
        let resources = self.resource_handles()?;
        let mut taken = Vec::new();
        let mut pairs = Vec::new();
        for connector in self.connectors()? {
            if connector.state() != connector::State::Connected {
                continue;
            }
            let mut possible = Vec::new();
            for &encoder in connector.encoders() {
                possible
                    .extend(resources.filter_crtcs(self.get_encoder(encoder)?.possible_crtcs()));
            }
            let crtc = possible.into_iter().find(|crtc| !taken.contains(crtc));
            let crtc = crtc.with_context(|| format!("no CRTC is left for {connector}"))?;
            taken.push(crtc);
            pairs.push((connector, crtc));
        }
        Ok(pairs)
    }

    /// Returns what `virtgpu-guest info` prints.
    pub fn info(&self) -> Result<wire::CardInfo> {
        let outputs = self
            .connectors()?
            .into_iter()
            .map(|connector| wire::Output {
                connector: connector.handle().into(),
                name: connector.to_string(),
                connected: connector.state() == connector::State::Connected,
                modes: connector.modes().iter().map(mode_info).collect(),
            });
        const CAPABILITIES: [DriverCapability; 13] = [
            DriverCapability::DumbBuffer,
            DriverCapability::VBlankHighCRTC,
            DriverCapability::DumbPreferredDepth,
            DriverCapability::DumbPreferShadow,
            DriverCapability::Prime,
            DriverCapability::MonotonicTimestamp,
            DriverCapability::ASyncPageFlip,
            DriverCapability::CursorWidth,
            DriverCapability::CursorHeight,
            DriverCapability::AddFB2Modifiers,
            DriverCapability::CRTCInVBlankEvent,
            DriverCapability::SyncObj,
            DriverCapability::TimelineSyncObj,
        ];
        let mut capabilities = Vec::new();
        for capability in CAPABILITIES {
            let value = self.get_driver_capability(capability)?;
            capabilities.push((format!("{capability:?}"), value));
        }
        Ok(wire::CardInfo {
            capabilities,
            driver: self.get_driver()?.name().to_string_lossy().into_owned(),
            version: self.version()?,
            outputs: outputs.collect(),
        })
    }

    /// Returns what `virtgpu-guest framebuffers` prints. Needs to be root, to look at other clients' framebuffers.
    pub fn shown(&self) -> Result<Vec<wire::Shown>> {
        let mut all = Vec::new();
        for connector in self.connectors()? {
            let Some(encoder) = connector.current_encoder() else {
                continue;
            };
            let Some(crtc) = self.get_encoder(encoder)?.crtc() else {
                continue;
            };
            let Some(handle) = self.get_crtc(crtc)?.framebuffer() else {
                continue;
            };
            let framebuffer = self.get_framebuffer(handle)?;
            let (width, height) = framebuffer.size();
            all.push(wire::Shown {
                connector: connector.handle().into(),
                width,
                height,
                fingerprint: self.fingerprint(&framebuffer)?,
            });
        }
        Ok(all)
    }

    fn fingerprint(&self, framebuffer: &framebuffer::Info) -> Result<u64> {
        let buffer = framebuffer
            .buffer()
            .context("the framebuffer's buffer is not for us")?;
        let (width, height) = framebuffer.size();
        let pitch = framebuffer.pitch() as usize;
        let size = pitch * height as usize;
        let offset = drm_ffi::mode::dumbbuffer::map(
            self.as_fd(),
            RawResourceHandle::from(buffer).into(),
            0,
            0,
        )?
        .offset;

        // SAFETY: The kernel chooses the address, so no memory of ours is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ,
                MapFlags::SHARED,
                &self.0,
                offset,
            )?
        };
        // SAFETY: The mapping is `size` bytes long, readable, and stays until the end of this function. Another client may be
        // drawing to it; then any value that is read will do.
        let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), size) };
        let fingerprint = picture::fingerprint(bytes.chunks_exact(pitch).flat_map(|row| {
            let pixels = row.chunks_exact(4).take(width as usize);
            pixels.map(|pixel| u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]))
        }));
        // SAFETY: This is the mapping made above, and nothing refers to it any more.
        unsafe { rustix::mm::munmap(start, size)? };
        Ok(fingerprint)
    }

    /// Draws a part of test picture `seed` into `buffer`: `width` x `height` pixels at `x`, `y`.
    pub fn draw(
        &self,
        buffer: &mut DumbBuffer,
        seed: u8,
        [x, y, width, height]: [u32; 4],
    ) -> io::Result<()> {
        use drm::buffer::Buffer;

        let pitch = buffer.pitch() as usize;
        let mut map = self.map_dumb_buffer(buffer)?;
        for row in y..y + height {
            let start = row as usize * pitch + x as usize * 4;
            let pixels = map[start..start + width as usize * 4].chunks_exact_mut(4);
            for (column, bytes) in (x..).zip(pixels) {
                bytes.copy_from_slice(&picture::pixel(seed, column, row).to_le_bytes());
            }
        }
        Ok(())
    }
}

/// Describes a mode for the harness.
pub fn mode_info(mode: &Mode) -> wire::Mode {
    let (width, height) = mode.size();
    wire::Mode {
        width: width.into(),
        height: height.into(),
        refresh: mode.vrefresh(),
        preferred: mode.mode_type().contains(ModeTypeFlags::PREFERRED),
    }
}
