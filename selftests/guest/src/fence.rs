// SPDX-License-Identifier: GPL-2.0

//! The fence of a commit, in the file that user space has of it.

use std::fmt;
use std::os::fd::{
    FromRawFd,
    OwnedFd,
    RawFd, //
};

use anyhow::{
    Result,
    bail,
    ensure, //
};
use drm::control::{
    AtomicCommitFlags,
    Device as _,
    ResourceHandle,
    atomic::AtomicModeReq,
    crtc,
    framebuffer,
    plane,
    property, //
};
use drm::{
    ClientCapability,
    Device as _, //
};
use rustix::event::{
    PollFd,
    PollFlags,
    Timespec,
    poll, //
};
use rustix::ioctl::{
    Updater,
    ioctl,
    opcode, //
};

use crate::card::{
    Card,
    restarted, //
};

/// How long a fence may take, on the guest's clock.
const LIMIT: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// A fence.
pub struct Fence(OwnedFd);

impl Fence {
    /// Shows `framebuffer` on `crtc`, which shows another one of its size, and does not wait. The fence is signalled when it is shown.
    pub fn of_flip(
        card: &Card,
        crtc: crtc::Handle,
        framebuffer: framebuffer::Handle,
    ) -> Result<Self> {
        card.set_client_capability(ClientCapability::Atomic, true)?;
        let plane = primary_plane(card, crtc)?;
        let mut fd: RawFd = -1;
        let mut request = AtomicModeReq::new();
        request.add_property(
            plane,
            property_of(card, plane, "FB_ID")?,
            property::Value::Framebuffer(Some(framebuffer)),
        );
        request.add_property(
            crtc,
            property_of(card, crtc, "OUT_FENCE_PTR")?,
            property::Value::Unknown(&raw mut fd as u64),
        );
        restarted(|| card.atomic_commit(AtomicCommitFlags::NONBLOCK, request.clone()))?;
        ensure!(fd >= 0, "the commit has no fence");
        // SAFETY: The kernel has just opened it for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// What the kernel knows of the fence.
    pub fn info(&self) -> Result<Info> {
        let mut fence = sync_fence_info::default();
        let mut file = sync_file_info {
            num_fences: 1,
            sync_fence_info: &raw mut fence as u64,
            ..Default::default()
        };
        // SAFETY: The opcode is that of a `sync_file_info`, which has room for one fence.
        unsafe { ioctl(&self.0, Updater::<FILE_INFO, _>::new(&mut file))? };
        ensure!(file.num_fences == 1, "there are {} fences", file.num_fences);
        Ok(Info {
            status: fence.status,
            driver: text(&fence.driver_name),
            timeline: text(&fence.obj_name),
        })
    }

    /// Waits until the fence is signalled.
    pub fn wait(&self) -> Result<()> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let count = poll(&mut fds, Some(&LIMIT))?;
        ensure!(
            count > 0,
            "the fence was not signalled within {} s",
            LIMIT.tv_sec
        );
        Ok(())
    }
}

/// What the kernel says of a fence: 0 is one that is not signalled, 1 one that is, and less is an error.
pub struct Info {
    status: i32,
    driver: String,
    timeline: String,
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.status, self.driver, self.timeline)
    }
}

fn primary_plane(card: &Card, crtc: crtc::Handle) -> Result<plane::Handle> {
    for plane in card.plane_handles()? {
        if card.get_plane(plane)?.crtc() == Some(crtc) {
            return Ok(plane);
        }
    }
    bail!("no plane shows anything on {crtc:?}")
}

fn property_of(card: &Card, object: impl ResourceHandle, name: &str) -> Result<property::Handle> {
    for (handle, _) in &card.get_properties(object)? {
        if card.get_property(*handle)?.name().to_str() == Ok(name) {
            return Ok(*handle);
        }
    }
    bail!("there is no property {name}")
}

/// A text that ends with a zero.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// As in `linux/sync_file.h`.
#[repr(C)]
#[derive(Default)]
struct sync_file_info {
    name: [u8; 32],
    status: i32,
    flags: u32,
    num_fences: u32,
    pad: u32,
    sync_fence_info: u64,
}

/// As in `linux/sync_file.h`.
#[repr(C)]
#[derive(Default)]
struct sync_fence_info {
    obj_name: [u8; 32],
    driver_name: [u8; 32],
    status: i32,
    flags: u32,
    timestamp_ns: u64,
}

/// `SYNC_IOC_FILE_INFO`
const FILE_INFO: rustix::ioctl::Opcode = opcode::read_write::<sync_file_info>(b'>', 4);
