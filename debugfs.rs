// SPDX-License-Identifier: GPL-2.0

//! The files that the C driver has in debugfs.

use kernel::{
    drm::{
        self,
        debugfs::DebugfsFile, //
    },
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::atomic::Relaxed, //
};

use crate::driver::{
    Device,
    DrmDriver, //
};

/// `virtio-gpu-features`: what was agreed on with the host.
struct FeaturesFile;

impl DebugfsFile for FeaturesFile {
    type Driver = DrmDriver;

    fn show(drm: &Device, m: &SeqFile) -> Result {
        let features = &drm.features;
        let flags = [
            ("virgl", false),
            ("edid", features.edid),
            ("indirect", features.indirect),
            ("resource uuid", false),
            ("blob resources", false),
            ("context init", false),
        ];
        let yes_no = |flag| if flag { "yes" } else { "no" };

        for (name, flag) in flags {
            seq_print!(m, "{:<16} : {}\n", name, yes_no(flag));
        }
        seq_print!(m, "{:<16} : {}\n", "cap sets", 0);
        seq_print!(m, "{:<16} : {}\n", "scanouts", features.num_scanouts);
        if drm.freezing.load(Relaxed) {
            seq_print!(m, "{:<16} : {}\n", "freezing", yes_no(true));
        }
        Ok(())
    }
}

/// `virtio-gpu-irq-fence`: the last fence issued and the last one signalled.
struct IrqFenceFile;

impl DebugfsFile for IrqFenceFile {
    type Driver = DrmDriver;

    fn show(_drm: &Device, m: &SeqFile) -> Result {
        seq_print!(m, "fence {} {}\n", 0, 0);
        Ok(())
    }
}

/// `virtio-gpu-host-visible-mm`: what of the host's memory is mapped.
struct HostVisibleMmFile;

impl DebugfsFile for HostVisibleMmFile {
    type Driver = DrmDriver;

    fn show(_drm: &Device, m: &SeqFile) -> Result {
        seq_print!(m, "Host allocations not visible to guest\n");
        Ok(())
    }
}

/// Adds the files.
pub(crate) fn init(registration: &drm::Registration<'_, DrmDriver>) {
    registration.debugfs_file::<FeaturesFile>(c"virtio-gpu-features");
    registration.debugfs_file::<IrqFenceFile>(c"virtio-gpu-irq-fence");
    registration.debugfs_file::<HostVisibleMmFile>(c"virtio-gpu-host-visible-mm");
}
