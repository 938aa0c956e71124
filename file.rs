// SPDX-License-Identifier: GPL-2.0

//! A client: an open file of the DRM device.

use kernel::{
    drm,
    prelude::*, //
};

use crate::driver::{
    Device,
    DrmDriver, //
};

/// A client has no state of its own as long as there are no 3D contexts.
pub(crate) struct File;

impl drm::file::DriverFile for File {
    type Driver = DrmDriver;

    fn open(_device: &Device) -> Result<Pin<KBox<Self>>> {
        Ok(KBox::new(Self, GFP_KERNEL)?.into())
    }
}
