// SPDX-License-Identifier: GPL-2.0

//! Which of QEMU's accelerators runs a kernel here.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{
    Command,
    Stdio, //
};
use std::sync::OnceLock;

/// How long a kernel may take, in seconds, to find out that it has no root. With KVM that is a second.
const PROBE_LIMIT: &str = "20";

/// Returns QEMU's `-accel`: KVM if a kernel boots with it, else TCG.
///
/// That /dev/kvm can be opened says little: nested in some virtual machines, guests hang or QEMU ends.
pub fn fastest(image: &Path) -> &'static str {
    static FASTEST: OnceLock<&str> = OnceLock::new();
    FASTEST.get_or_init(|| match boots_with_kvm(image) {
        true => "kvm",
        false => "tcg,thread=multi",
    })
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
