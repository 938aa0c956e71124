// SPDX-License-Identifier: GPL-2.0

//! The picture survives hibernation.

use anyhow::{
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use serde_json::json;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::debugger::Debugger;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::{
    LIMIT,
    Machine,
    Note,
    Vm,
    event, //
};

use crate::identity::is_other_driver;

const SIZE: (u32, u32) = (1280, 800);

/// Enough for an image of the guest's memory, in MiB.
const ENOUGH: u32 = 512;

/// Too little for an image.
const TOO_LITTLE: u32 = 2;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("hibernate::test_resume", test_resume),
        trial("hibernate::platform", |case| goes_on(case, "platform")),
        trial("hibernate::shutdown", |case| goes_on(case, "shutdown")),
        trial("hibernate::reboot", |case| goes_on(case, "reboot")),
        trial("hibernate::s3_after_s4", s3_after_s4),
        trial("hibernate::s4_after_s3", s4_after_s3),
        trial("hibernate::hybrid::recovered", |case| {
            hybrid(case, &Machine::with_gpu("virtio-gpu-pci"), false)
        }),
        trial("hibernate::hybrid::kept", |case| {
            let host = Machine::on_reference_host(&["--display", "1280x800"]);
            hybrid(case, &host, true)
        })
        .with_ignored_flag(is_other_driver()),
        trial("hibernate::aborted", aborted),
        trial("hibernate::rolled_back", rolled_back),
    ]
}

fn boot(case: &mut Case, swap: u32) -> Result<&mut Vm> {
    boot_with(case, &Machine::with_gpu("virtio-gpu-pci"), swap)
}

fn boot_with<'a>(case: &'a mut Case, machine: &Machine, swap: u32) -> Result<&'a mut Vm> {
    let vm = case.boot(&Machine {
        swap: Some(swap),
        debugger: true,
        ..machine.clone()
    })?;
    vm.run("mkswap /dev/vda && swapon /dev/vda")?;
    Ok(vm)
}

/// The image is written, and read back at once.
fn test_resume(case: &mut Case) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    for seed in 2..=3 {
        let seeds = client.start_flips(vm)?;
        let mark = vm.mark();
        vm.run(&to_disk("test_resume"))?;
        vm.wait_console("Hibernation image restored successfully", mark)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        client.draw(vm, seed)?;
    }
    client.end(vm)
}

fn to_disk(mode: &str) -> String {
    format!("echo {mode} > /sys/power/disk && echo disk > /sys/power/state")
}

/// Hibernates until the machine is off, or starts again, as `mode` has it, and has another process of QEMU go on with what is on its disk.
fn off_and_on<'a>(case: &'a mut Case, mode: &str) -> Result<&'a mut Vm> {
    let vm = case.vm()?;
    let mark = vm.mark();
    let writer = vm.start_program(&["sh", "-c", &to_disk(mode)])?;
    if mode == "platform" {
        vm.wait_event("SUSPEND_DISK", mark)?;
    }
    let reason = vm.wait("the guest to end", mark, LIMIT, |note| match note {
        Note::Monitor(message) => {
            event(note, "SHUTDOWN").map(|()| message["data"]["reason"].clone())
        }
        _ => None,
    })?;
    let expected = match mode {
        "reboot" => "guest-reset",
        _ => "guest-shutdown",
    };
    ensure!(
        reason == expected,
        "the guest ended with {reason} instead of {expected} ({mode})"
    );

    let vm = case.boot_again()?;
    let output = vm.wait_end(writer)?;
    ensure!(
        output.code == 0,
        "the guest reports a failed hibernation ({mode}): {} {}",
        output.code,
        output.err
    );
    Ok(vm)
}

/// The machine ends in one of the ways that there are, and goes on.
fn goes_on(case: &mut Case, mode: &str) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let vm = hibernate(case, &client, mode)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

fn s3_after_s4(case: &mut Case) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let vm = hibernate(case, &client, "platform")?;
    client.draw(vm, 2)?;
    suspend(vm, &client)?;
    client.draw(vm, 3)?;
    client.end(vm)
}

fn s4_after_s3(case: &mut Case) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    suspend(vm, &client)?;
    client.draw(vm, 2)?;
    let vm = hibernate(case, &client, "platform")?;
    client.draw(vm, 3)?;
    client.end(vm)
}

/// Hibernates while the client flips.
fn hibernate<'a>(case: &'a mut Case, client: &Client, mode: &str) -> Result<&'a mut Vm> {
    let seeds = client.start_flips(case.vm()?)?;
    let vm = off_and_on(case, mode)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    Ok(vm)
}

/// Suspends to RAM while the client flips.
fn suspend(vm: &mut Vm, client: &Client) -> Result<()> {
    let seeds = client.start_flips(vm)?;
    Sleep::S3.cycle(vm)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)
}

/// An image is written, and then the guest sleeps in RAM; first it is woken up, and then the power fails. The host is asked to keep
/// everything in the second part of it only; if it can, it does until the guest wakes up, or is gone with the power.
fn hybrid(case: &mut Case, machine: &Machine, kept: bool) -> Result<()> {
    let vm = boot_with(case, machine, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let seeds = client.start_flips(vm)?;
    let mark = vm.mark();
    Sleep::Hybrid.cycle(vm)?;
    if kept {
        vm.wait_console("resumed, the host kept its resources", mark)?;
    }
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 2)?;

    let seeds = client.start_flips(vm)?;
    let sleeper = Sleep::Hybrid.begin(vm)?;
    vm.monitor("quit", json!({}))?;
    let vm = case.boot_again()?;
    vm.wait_end(sleeper.writer())?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 3)?;
    client.end(vm)
}

/// The image has been written and the devices are down for good, when something wakes the guest up. Then it hibernates again.
fn rolled_back(case: &mut Case) -> Result<()> {
    let vm = boot(case, ENOUGH)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let before = vm.creations()?;
    let seeds = client.start_flips(vm)?;
    let mark = vm.mark();
    let writer = vm.start_program(&["sh", "-c", &to_disk("platform")])?;
    vm.wait_console("PM: Image saving progress:   0%", mark)?;
    let mut debugger = Debugger::halt(vm)?;
    // Every device has had its turn when this is called. The variable is what a wakeup event sets.
    debugger.run_until("dpm_suspend_late")?;
    debugger.set("pm_abort_suspend", 1)?;
    debugger.go()?;
    vm.wait_console("rolling back", mark)?;
    vm.wait_end(writer)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 2)?;
    let lost = vm.creations()? - before;
    ensure!(
        lost == 2,
        "the host lost its resources {lost} times, not for the image and for the end"
    );

    let vm = hibernate(case, &client, "platform")?;
    client.draw(vm, 3)?;
    client.end(vm)
}

/// There is no room for the image: the devices were down, and come back for nothing.
fn aborted(case: &mut Case) -> Result<()> {
    let vm = boot(case, TOO_LITTLE)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    for seed in 2..=3 {
        let before = vm.creations()?;
        let seeds = client.start_flips(vm)?;
        let output = vm.try_run(&to_disk("shutdown"))?;
        ensure!(output.code != 0, "the image found room in {TOO_LITTLE} MiB");
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        client.draw(vm, seed)?;
        let lost = vm.creations()? - before;
        ensure!(lost == 1, "the host lost its resources {lost} times");
    }
    client.end(vm)
}
