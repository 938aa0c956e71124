// SPDX-License-Identifier: GPL-2.0

//! The two C programs of the benchmark: QEMU's plugin and the guest's part.

use std::path::{
    Path,
    PathBuf, //
};
use std::process::Command;

use anyhow::{
    Context,
    Result,
    ensure, //
};

fn compile(source: &str, arguments: &[&str], to: &Path) -> Result<()> {
    let status = Command::new("cc")
        .args(["-O2", "-Wall", "-Werror", "-o"])
        .arg(to)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
        .args(arguments)
        .status()
        .context("cannot run cc")?;
    ensure!(status.success(), "{source} does not compile");
    Ok(())
}

/// Compiles QEMU's plugin into `dir`.
pub fn plugin(dir: &Path) -> Result<PathBuf> {
    let to = dir.join("plugin.so");
    compile(
        "plugin.c",
        &["-shared", "-fPIC", "-fvisibility=hidden"],
        &to,
    )?;
    Ok(to)
}

/// Compiles the guest's program into `dir`.
pub fn guest(dir: &Path) -> Result<PathBuf> {
    let to = dir.join("virtgpu-bench");
    compile("guest.c", &["-static"], &to)?;
    Ok(to)
}
