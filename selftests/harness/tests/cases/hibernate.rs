// SPDX-License-Identifier: GPL-2.0

//! The picture survives hibernation.

use anyhow::{
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::vm::{
    Machine,
    Vm, //
};

const SIZE: (u32, u32) = (1280, 800);

/// Enough for an image of the guest's memory, in MiB.
const ENOUGH: u32 = 512;

/// Too little for an image.
const TOO_LITTLE: u32 = 2;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("hibernate::test_resume", test_resume),
        trial("hibernate::shutdown", shutdown),
        trial("hibernate::aborted", aborted),
    ]
}

fn boot(case: &mut Case, swap: u32) -> Result<&mut Vm> {
    let vm = case.boot(&Machine {
        swap: Some(swap),
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    vm.run("mkswap /dev/vda && swapon /dev/vda")?;
    Ok(vm)
}

/// The image is written, and read back at once.
fn test_resume(case: &mut Case) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    for round in 1..=2 {
        let mark = vm.mark();
        vm.run("echo test_resume > /sys/power/disk && echo disk > /sys/power/state")?;
        vm.wait_console("Hibernation image restored successfully", mark)?;
        client.expect(vm, round)?;
        client.draw(vm, round + 1)?;
    }
    client.end(vm)
}

/// The machine is switched off, and another process of QEMU goes on with what is on its disk.
fn shutdown(case: &mut Case) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    client.draw(vm, 2)?;
    let mark = vm.mark();
    let writer = vm.start_program(&[
        "sh",
        "-c",
        "echo shutdown > /sys/power/disk && echo disk > /sys/power/state",
    ])?;
    vm.wait_event("SHUTDOWN", mark)?;

    let vm = case.boot_again()?;
    let output = vm.wait_end(writer)?;
    ensure!(
        output.code == 0,
        "the guest reports a failed hibernation: {} {}",
        output.code,
        output.err
    );
    client.expect(vm, 2)?;
    client.draw(vm, 3)?;
    client.end(vm)
}

/// There is no room for the image: the devices were down, and come back for nothing.
fn aborted(case: &mut Case) -> Result<()> {
    let vm = boot(case, TOO_LITTLE)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    for round in 1..=2 {
        let output =
            vm.try_run("echo shutdown > /sys/power/disk && echo disk > /sys/power/state")?;
        ensure!(output.code != 0, "the image found room in {TOO_LITTLE} MiB");
        client.expect(vm, round)?;
        client.draw(vm, round + 1)?;
    }
    client.end(vm)
}
