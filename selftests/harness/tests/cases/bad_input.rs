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

/// What the host may hear of a buffer that is never shown.
const EXPECTED: [&str; 4] = [
    "res_create_2d",
    "res_back_attach",
    "res_back_detach",
    "res_unref",
];

pub fn trials() -> Vec<Trial> {
    vec![trial("bad_input::framebuffer", framebuffer)]
}

/// A framebuffer that reaches beyond its buffer is refused, and the host does not hear of it.
fn framebuffer(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let output = vm.try_run("virtgpu-guest selftest addfb_bad")?;
    ensure!(output.code == 0, "{}{}", output.out, output.err);

    // The console has the first resource and goes on showing it; the next one is the check's buffer.
    let log = fs::read_to_string(vm.dir.join("qemu.log"))?;
    let commands = logs::resource_commands(&log);
    let created = commands.iter().filter(|(name, _)| *name == "res_create_2d");
    let resources: Vec<_> = created.map(|(_, resource)| *resource).collect();
    ensure!(
        resources.len() == 2,
        "the host was asked for the resources {resources:?}"
    );
    let buffer = commands
        .iter()
        .filter(|(_, resource)| *resource == resources[1]);
    let others: Vec<_> = buffer
        .filter(|(name, _)| !EXPECTED.contains(name))
        .collect();
    ensure!(
        others.is_empty(),
        "the host was sent {others:?} for the buffer"
    );
    Ok(())
}
