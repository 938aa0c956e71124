// SPDX-License-Identifier: GPL-2.0

//! What must be refused.

use std::fs;

use anyhow::{
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::logs;
use virtgpu_lab::vm::Machine;

pub fn trials() -> Vec<Trial> {
    vec![trial("bad_input::framebuffer", framebuffer)]
}

/// A framebuffer that reaches beyond its buffer is refused, and the host does not hear of it.
fn framebuffer(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    // The console's cursor would blink in between.
    vm.run("printf '\\033[?25l' > /dev/tty1")?;
    let log = vm.dir.join("qemu.log");
    let before = logs::commands(&fs::read_to_string(&log)?).len();
    let output = vm.try_run("virtgpu-guest selftest addfb_bad")?;
    ensure!(output.code == 0, "{}{}", output.out, output.err);

    let log = fs::read_to_string(&log)?;
    let sent: Vec<_> = logs::commands(&log)[before..].to_vec();
    let buffers = [
        "res_create_2d",
        "res_back_attach",
        "res_back_detach",
        "res_unref",
    ];
    let others: Vec<_> = sent
        .iter()
        .filter(|command| !buffers.contains(command))
        .collect();
    ensure!(
        others.is_empty(),
        "beside the buffer itself, the host was sent {others:?}"
    );
    Ok(())
}
