// SPDX-License-Identifier: GPL-2.0

//! Suspend on the reference host, which keeps everything while the guest sleeps, if it is asked to and keeps its word.

use anyhow::Result;
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::Machine;

const SIZE: (u32, u32) = (1024, 768);

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![trial("freezing::kept", kept)];
    for conduct in ["drop-all", "drop-one"] {
        trials.push(trial(format!("freezing::{conduct}"), move |case| {
            broken_promise(case, conduct)
        }));
    }
    trials
}

/// What is recovered, is recovered from a known state: nothing of what the host has kept all the same is in the way.
fn broken_promise(case: &mut Case, conduct: &str) -> Result<()> {
    // The question whether the sentinel is there.
    case.expect_refused("RESOURCE_UNREF");
    let vm = case.boot(&Machine::on_reference_host(&["--conduct", conduct]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let mark = vm.mark();
    Sleep::S3.cycle(vm)?;
    vm.wait_console("the host did not keep its resources", mark)?;
    vm.wait_console("resources recovered", mark)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

fn kept(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}
