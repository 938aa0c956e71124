// SPDX-License-Identifier: GPL-2.0

//! Which of QEMU's accelerators runs a kernel here.

use std::fs::{
    self,
    OpenOptions, //
};
use std::path::Path;
use std::process::{
    Command,
    Stdio, //
};
use std::sync::OnceLock;

use crate::kernel::results;

/// How long a kernel may take, in seconds, to find out that it has no root. With KVM that is a second.
const PROBE_LIMIT: &str = "10";

const KVM: &str = "kvm";
const TCG: &str = "tcg,thread=multi";

/// Returns QEMU's `-accel`: KVM if a kernel boots with it, else TCG.
///
/// That /dev/kvm can be opened says little: nested in some virtual machines, guests hang or QEMU ends.
pub fn fastest(image: &Path) -> &'static str {
    static FASTEST: OnceLock<&str> = OnceLock::new();
    FASTEST.get_or_init(|| {
        let kvm = known().unwrap_or_else(|| {
            let kvm = boots_with_kvm(image);
            remember(kvm);
            kvm
        });
        match kvm {
            true => KVM,
            false => TCG,
        }
    })
}

/// The machine, as long as it is not booted anew.
fn this_boot() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}

/// What an earlier process has found out.
fn known() -> Option<bool> {
    let found = fs::read_to_string(results().ok()?.join("accelerator")).ok()?;
    let (kvm, boot) = found.split_once(' ')?;
    (boot == this_boot()?).then_some(kvm == "yes")
}

fn remember(kvm: bool) {
    let (Ok(results), Some(boot)) = (results(), this_boot()) else {
        return;
    };
    // Without it, the next process asks again.
    let _ = fs::write(
        results.join("accelerator"),
        format!("{} {boot}", if kvm { "yes" } else { "no" }),
    );
}

fn boots_with_kvm(image: &Path) -> bool {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if kvm.is_err() {
        return false;
    }
    let output = Command::new("timeout")
        .args([
            PROBE_LIMIT,
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .args([
            "-accel", "kvm", "-cpu", "max", "-m", "256M", "-display", "none", "-serial", "stdio",
        ])
        .args(["-append", "console=ttyS0 panic=-1", "-kernel"])
        .arg(image)
        .stdin(Stdio::null())
        .output();
    // The kernel gets as far as it can without an initramfs.
    output.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).contains("Unable to mount root")
    })
}
