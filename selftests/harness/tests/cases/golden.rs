// SPDX-License-Identifier: GPL-2.0

//! What the driver sends, command by command, is what was read through once: the traces in `golden/`.
//!
//! `make test CASES=golden GOLDEN=write` writes them anew, for the driver that `DRIVER` names.

use anyhow::Result;
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::kernel::Driver;
use virtgpu_lab::suspend::{
    Sleep,
    test_devices, //
};
use virtgpu_lab::trace::{
    self,
    Batches, //
};
use virtgpu_lab::vm::{
    Machine,
    REFERENCE,
    Vm, //
};

const SIZE: (u32, u32) = (1024, 768);

/// Without a console, whose cursor would blink into the trace.
const NO_CONSOLE: &str = "drm_client_lib.active=";

/// A way to go down and come back.
type Suspend = fn(&mut Vm) -> Result<()>;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("golden::probe", probe),
        trial("golden::modeset", modeset),
        trial("golden::flip", flip),
        trial("golden::dirtyfb", dirtyfb),
        trial("golden::close", close),
    ];
    let mut rows: Vec<(_, Machine, Suspend)> = vec![
        ("s3", machine(&["--freezing", "off"]), s3),
        ("s2idle", machine(&["--freezing", "off"]), s2idle),
        ("aborted", machine(&[]), test_devices),
        (
            "s4",
            Machine {
                swap: Some(512),
                ..machine(&[])
            },
            s4,
        ),
        (
            "no_soft_reset",
            Machine {
                host: Some(Vec::new()),
                append: NO_CONSOLE.into(),
                ..Machine::behind_root_port(&format!("{REFERENCE},x-pcie-pm-no-soft-reset=on"))
            },
            s3,
        ),
    ];
    // The C driver does not know of FREEZING.
    if Driver::from_env().is_ok_and(|driver| driver == Driver::Rust) {
        rows.push(("s3_kept", machine(&[]), s3));
        rows.push(("s2idle_kept", machine(&[]), s2idle));
        rows.push(("s3_broken", machine(&["--conduct", "drop-all"]), s3));
    }
    for (name, machine, go_down_and_come_back) in rows {
        trials.push(trial(format!("golden::{name}"), move |case| {
            suspend(case, name, &machine, go_down_and_come_back)
        }));
    }
    trials
}

fn machine(options: &[&str]) -> Machine {
    Machine {
        append: NO_CONSOLE.into(),
        ..Machine::on_reference_host(options)
    }
}

/// The driver is loaded.
fn probe(case: &mut Case) -> Result<()> {
    let driver = case.kernel.driver;
    let vm = case.boot(&machine(&[]))?;
    trace::expect(vm, driver, "probe", Batches::Hidden)
}

/// The first client makes two framebuffers, and shows one.
fn modeset(case: &mut Case) -> Result<()> {
    let driver = case.kernel.driver;
    let vm = case.boot(&machine(&[]))?;
    trace::begin(vm)?;
    let client = Client::start(vm, 1, &[SIZE])?;
    trace::expect(vm, driver, "modeset", Batches::Hidden)?;
    client.end(vm)
}

/// The client shows the other one.
fn flip(case: &mut Case) -> Result<()> {
    let driver = case.kernel.driver;
    let vm = case.boot(&machine(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    trace::begin(vm)?;
    client.draw(vm, 2)?;
    trace::expect(vm, driver, "flip", Batches::Shown)?;
    client.end(vm)
}

/// The client draws on screen, and says where. The first time after its mode was set, and once more.
fn dirtyfb(case: &mut Case) -> Result<()> {
    let driver = case.kernel.driver;
    let vm = case.boot(&machine(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    trace::begin(vm)?;
    client.draw_and_show_part(vm, 2, [64, 32, 128, 96])?;
    trace::step(vm, "the client draws once more")?;
    client.draw_and_show_part(vm, 3, [256, 128, 16, 8])?;
    trace::expect(vm, driver, "dirtyfb", Batches::Shown)?;
    client.end(vm)
}

/// The client gives up its framebuffers, and ends.
fn close(case: &mut Case) -> Result<()> {
    let driver = case.kernel.driver;
    let vm = case.boot(&machine(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    trace::begin(vm)?;
    client.end(vm)?;
    trace::expect(vm, driver, "close", Batches::Hidden)
}

/// The guest goes down and comes back while the client shows a framebuffer, and then shows the other one.
fn suspend(
    case: &mut Case,
    name: &str,
    machine: &Machine,
    go_down_and_come_back: Suspend,
) -> Result<()> {
    let driver = case.kernel.driver;
    match driver {
        // It asks whether the host has kept its word.
        Driver::Rust => case.expect_refused("RESOURCE_UNREF"),
        // It goes on with resources that are gone. All of that is in its trace.
        Driver::C => {
            case.expect_violations();
            case.expect_in_log("*ERROR* response 0x1203");
        }
    }
    let vm = case.boot(machine)?;
    if machine.swap.is_some() {
        vm.run("mkswap /dev/vda && swapon /dev/vda")?;
    }
    let client = Client::start(vm, 1, &[SIZE])?;
    trace::begin(vm)?;
    go_down_and_come_back(vm)?;
    trace::step(vm, "the client shows its other framebuffer")?;
    client.draw_unseen(vm, 2)?;
    trace::expect(vm, driver, name, Batches::Hidden)?;
    client.end(vm)
}

fn s3(vm: &mut Vm) -> Result<()> {
    Sleep::S3.cycle(vm)
}

fn s2idle(vm: &mut Vm) -> Result<()> {
    Sleep::Idle.cycle(vm)
}

/// Hibernation whose image is read back at once, by the kernel that wrote it.
fn s4(vm: &mut Vm) -> Result<()> {
    let mark = vm.mark();
    vm.run("echo test_resume > /sys/power/disk && echo disk > /sys/power/state")?;
    vm.wait_console("Hibernation image restored successfully", mark)
}
