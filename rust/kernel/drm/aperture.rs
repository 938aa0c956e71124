// SPDX-License-Identifier: GPL-2.0

//! Taking over a display from the firmware.
//!
//! C headers: [`include/linux/aperture.h`](srctree/include/linux/aperture.h),
//! [`include/video/nomodeset.h`](srctree/include/video/nomodeset.h)

use crate::{
    bindings,
    container_of,
    device::{
        Bound,
        Device, //
    },
    error::to_result,
    prelude::*,
    str::CStrExt as _, //
};

/// Returns the PCI device of the VGA class that `parent` is, if it is one.
fn vga_device(parent: &Device<Bound>) -> Option<*mut bindings::pci_dev> {
    let raw = parent.as_raw();

    // SAFETY: `raw` is a valid device.
    if !unsafe { bindings::dev_is_pci(raw) } {
        return None;
    }

    // SAFETY: A device on the PCI bus is embedded in a `struct pci_dev`.
    let pdev = unsafe { container_of!(raw, bindings::pci_dev, dev) };

    // SAFETY: `pdev` is valid as `parent` is.
    unsafe { bindings::pci_is_vga(pdev) }.then_some(pdev)
}

/// Removes the drivers of framebuffers that the firmware has set up on a PCI device of the VGA
/// class, and does nothing on other devices.
///
/// `name` is that of the driver which takes over. Must be called in process context, before the
/// driver uses the device.
///
/// C counterpart: `aperture_remove_conflicting_pci_devices()`.
pub fn remove_conflicting(parent: &Device<Bound>, name: &'static CStr) -> Result {
    let Some(pdev) = vga_device(parent) else {
        return Ok(());
    };

    // SAFETY: `pdev` is valid as `parent` is, and the name lives forever.
    to_result(unsafe {
        bindings::aperture_remove_conflicting_pci_devices(pdev, name.as_char_ptr())
    })
}

/// Returns whether the user wants no drivers but those of the firmware's framebuffers
/// (`nomodeset` on the kernel's command line).
///
/// C counterpart: `drm_firmware_drivers_only()`.
pub fn firmware_drivers_only() -> bool {
    // SAFETY: There are no preconditions.
    unsafe { bindings::drm_firmware_drivers_only() }
}
