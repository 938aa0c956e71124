// SPDX-License-Identifier: GPL-2.0

//! The driver's unit tests, which a kernel with KUnit runs when it loads the driver, and those of its abstractions, which it runs
//! when it boots.

use anyhow::{
    Context,
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::kernel::{
    Driver,
    Kernel, //
};
use virtgpu_lab::vm::Machine;

/// One for each file of ours that has tests.
const SUITES: [&str; 9] = [
    "rust_drm_kms_edid",
    "rust_drm_kms_rect",
    "rust_virtio_queue",
    "virtgpu_rs_command",
    "virtgpu_rs_display",
    "virtgpu_rs_features",
    "virtgpu_rs_pm",
    "virtgpu_rs_queue",
    "virtgpu_rs_uapi",
];

pub fn trials() -> Vec<Trial> {
    // The C driver has none.
    let other = Kernel::from_env().is_ok_and(|kernel| kernel.driver != Driver::Rust);
    vec![trial("kunit::driver", driver).with_ignored_flag(other)]
}

/// Every suite has run, and every test in it has passed.
fn driver(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        append: "kunit.enable=1 kunit.autorun=1".into(),
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    let log = vm.run("dmesg")?;
    let lines = || {
        log.lines()
            .map(|line| line.split_once("] ").map_or(line, |(_, text)| text))
    };
    let failed: Vec<_> = lines()
        .filter(|line| line.trim_start().starts_with("not ok "))
        .collect();
    ensure!(failed.is_empty(), "failed: {failed:?}");
    for suite in SUITES {
        let result =
            lines().find(|line| line.starts_with("ok ") && line.ends_with(&format!(" {suite}")));
        result.with_context(|| format!("{suite} has not run"))?;
        let tests = lines()
            .skip_while(|line| !line.ends_with(&format!("# Subtest: {suite}")))
            .skip(1)
            .take_while(|line| line.starts_with("    "))
            .filter(|line| line.starts_with("    ok ") && !line.contains("# SKIP"));
        ensure!(tests.count() > 0, "{suite} has no tests");
    }
    Ok(())
}
