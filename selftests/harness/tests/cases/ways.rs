// SPDX-License-Identifier: GPL-2.0

//! Ways to go down and come back that are not the plain ones.

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
use virtgpu_lab::client::Client;
use virtgpu_lab::host::after_mark;
use virtgpu_lab::suspend::{
    Sleep,
    test, //
};
use virtgpu_lab::vm::{
    GPU,
    Machine,
    reference_with, //
};

/// What the device offers first.
const SIZE: (u32, u32) = (1280, 800);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("ways::pm_test", pm_test),
        trial("ways::back_to_back", back_to_back),
        trial("ways::aborted", aborted),
        trial("ways::before_any_modeset", before_any_modeset),
        trial("ways::many_buffers", many_buffers),
        trial("ways::busy", busy),
        trial("ways::full_ring", full_ring),
        trial("ways::without_scanouts", without_scanouts),
    ]
}

/// Every level of pm_test, for every kind of sleep, with a client that flips.
fn pm_test(case: &mut Case) -> Result<()> {
    const LEVELS: [&str; 5] = ["freezer", "devices", "platform", "processors", "core"];
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    vm.run("echo deep > /sys/power/mem_sleep")?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let mut seed = 0;
    for state in ["mem", "freeze", "disk"] {
        for level in LEVELS {
            let before = vm.creations()?;
            let seeds = client.start_flips(vm)?;
            let tested = test(vm, state, level)?;
            client.expect_flips(vm, seeds)?;
            client.stop_flips(vm)?;
            seed += 1;
            client.draw(vm, seed)?;

            // There is no processor to halt in suspend to idle.
            let supported = state != "freeze" || !["processors", "core"].contains(&level);
            ensure!(
                tested == supported,
                "pm_test {level} for {state}: the guest did it: {tested}"
            );
            let lost = vm.creations()? - before;
            let expected = usize::from(supported && level != "freezer");
            ensure!(
                lost == expected,
                "pm_test {level} for {state}: the host lost its resources {lost} times instead of {expected}"
            );
        }
    }
    client.end(vm)
}

/// The guest goes down again as soon as it is up.
fn back_to_back(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for (seed, sleep) in (1..).zip([Sleep::S3, Sleep::Idle]) {
        let before = vm.creations()?;
        let seeds = client.start_flips(vm)?;
        sleep.cycles(vm, 3)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        client.draw(vm, seed)?;
        let lost = vm.creations()? - before;
        ensure!(lost == 3, "the host lost its resources {lost} times");
    }
    client.end(vm)
}

/// Another driver refuses to suspend when ours has suspended already, and what ours did is undone.
///
/// It is the kernel's alarm timer, for an alarm that is about to go off. Devices are suspended in the order in which they came, the
/// last one first, so ours is made to come last: first only as a virtio device, whose transport is not touched then, and then as a
/// PCI function, which is reset.
fn aborted(case: &mut Case) -> Result<()> {
    const PCI: &str = "/sys/bus/pci";
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    // One after the other.
    vm.run("echo 0 > /sys/power/pm_async && echo deep > /sys/power/mem_sleep")?;
    let function = vm.run("basename $(dirname $(readlink -f /sys/bus/virtio/devices/virtio0))")?;
    let function = function.trim();
    for (seed, anew, outcome) in [
        (
            10,
            format!(
                "echo {function} > {PCI}/drivers/virtio-pci/unbind && echo {function} > {PCI}/drivers/virtio-pci/bind"
            ),
            "resumed, the host kept its resources",
        ),
        (
            20,
            format!("echo 1 > {PCI}/devices/{function}/remove && echo 1 > {PCI}/rescan"),
            "resources recovered",
        ),
    ] {
        vm.run(&anew)?;
        let client = Client::start(vm, seed, &[SIZE])?;
        for round in 1..=2 {
            let mark = vm.mark();
            let alarm = vm.start_program(&["virtgpu-guest", "alarm"])?;
            vm.wait_line(alarm, "armed", mark)?;
            let seeds = client.start_flips(vm)?;
            let mark = vm.mark();
            let output = vm.try_run("echo mem > /sys/power/state")?;
            ensure!(output.code != 0, "the guest slept, whatever the alarm");
            vm.wait_console("alarmtimer", mark)?;
            vm.wait_console(outcome, mark)?;
            client.expect_flips(vm, seeds)?;
            client.stop_flips(vm)?;
            client.draw(vm, seed + round)?;
            vm.hang_up(alarm)?;
            vm.wait_end(alarm)?;
            // And then for good.
            Sleep::S3.cycle(vm)?;
            client.expect(vm, seed + round)?;
        }
        client.end(vm)?;
    }
    Ok(())
}

/// There has been nothing on the screen yet, and nobody has the card open.
fn before_any_modeset(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        // No console on the card.
        append: "drm_client_lib.active=".into(),
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    ensure!(vm.framebuffers()?.is_empty(), "something is shown already");
    for sleep in [Sleep::S3, Sleep::Idle] {
        sleep.cycle(vm)?;
        ensure!(vm.framebuffers()?.is_empty(), "sleep shows something");
    }
    let client = Client::start(vm, 1, &[SIZE])?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

/// To create them all again takes many times what the ring holds.
fn many_buffers(case: &mut Case) -> Result<()> {
    const COUNT: usize = 500;
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let mark = vm.mark();
    let holder = vm.start_program(&["virtgpu-guest", "hold", &COUNT.to_string()])?;
    vm.wait_line(holder, "holding", mark)?;
    for (seed, sleep) in (2..).zip([Sleep::S3, Sleep::Idle]) {
        vm.say(holder, &format!("fill {seed}"))?;
        let mark = vm.mark();
        sleep.cycle(vm)?;
        vm.wait_console(&format!("resumed, {} resources recovered", COUNT + 3), mark)?;
        client.draw(vm, seed)?;
        vm.say(holder, &format!("check {seed}"))?;
        vm.wait_line(holder, &format!("kept {seed}"), mark)?;
    }
    let mark = vm.mark();
    vm.say(holder, "release")?;
    let errors = vm.wait_line(holder, "released", mark)?;
    ensure!(errors.is_empty(), "giving up the buffers: {errors}");
    vm.hang_up(holder)?;
    vm.wait_end(holder)?;
    client.end(vm)
}

/// Sixteen outputs flip, buffers come and go, and an output changes while the guest goes down, four times: 64 flips are under way
/// when it does, as many as there can be, because DRM has one pending flip for each CRTC.
fn busy(case: &mut Case) -> Result<()> {
    const SIZE: (u16, u16) = (640, 480);
    const CYCLES: u32 = 4;
    const BUFFERS: &str = "500";
    // The console's search for the best of all pairs of outputs and pipes calls itself in two places, so that the stacks from
    // which it allocates double with each output. KASAN remembers them all: 16 outputs are too many for it.
    let heads: u32 = match case.kernel.has("CONFIG_KASAN") {
        true => 8,
        false => 16,
    };
    let other = |cycle| (800, 600 + 8 * cycle as u16);
    let vm = case.boot(&Machine {
        windows: heads,
        ..Machine::with_gpu(&format!("virtio-gpu-pci,max_outputs={heads}"))
    })?;
    for head in 0..heads {
        vm.resize_window(head, SIZE.0, SIZE.1)?;
    }
    let sizes = vec![(SIZE.0.into(), SIZE.1.into()); heads as usize];
    let client = Client::start(vm, 0, &sizes)?;
    let mut churners = Vec::new();
    // A thousand together.
    for _ in 0..2 {
        let mark = vm.mark();
        let churner = vm.start_program(&["virtgpu-guest", "churn", BUFFERS])?;
        vm.wait_line(churner, "churning", mark)?;
        churners.push(churner);
    }
    for cycle in 0..CYCLES {
        let seeds = client.start_flips(vm)?;
        let (width, height) = other(cycle);
        vm.start_to_resize_window(1 + cycle, width, height)?;
        Sleep::S3.cycle(vm)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
    }
    for churner in churners {
        let mark = vm.mark();
        vm.say(churner, "enough")?;
        vm.wait_line(churner, "churned", mark)?;
        vm.wait_end(churner)?;
    }
    client.end(vm)?;
    // Only who is alone with the card is told of new modes.
    let card = vm.card()?;
    for cycle in 0..CYCLES {
        let (output, expected) = (&card.outputs[1 + cycle as usize], other(cycle));
        let preferred = output.modes.iter().find(|mode| mode.preferred);
        let size = preferred.map(|mode| (mode.width, mode.height));
        ensure!(
            size == Some((expected.0.into(), expected.1.into())),
            "{} prefers {size:?} instead of {expected:?}",
            output.name
        );
    }
    Ok(())
}

/// The ring is full, with clients waiting for room in it, when the guest is told to go down.
fn full_ring(case: &mut Case) -> Result<()> {
    const SIZE: (u32, u32) = (1024, 768);
    const RING: usize = 16;
    let machine = Machine::on_reference_host(&["--freezing", "off"]);
    let device = reference_with("vq_size", RING);
    let vm = case.boot(&Machine {
        devices: vec![format!("{device},id={GPU}")],
        ..machine
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for (seed, sleep) in (1..).zip([Sleep::S3, Sleep::Idle]) {
        let mut churners = Vec::new();
        for _ in 0..3 {
            let mark = vm.mark();
            let churner = vm.start_program(&["virtgpu-guest", "churn"])?;
            vm.wait_line(churner, "churning", mark)?;
            churners.push(churner);
        }
        // Buffers come and go faster than the host answers.
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.control("fault RESOURCE_UNREF: answer after 2 s")?;
        host.wait_faults(RING)?;
        host.mark("down")?;
        sleep.cycle(vm)?;
        let host = vm.host()?;
        host.control("clear")?;
        let record = host.record()?;
        let mut after = after_mark(&record, "down")?.iter();
        let next = after.find(|entry| ["command", "interrupt"].contains(&entry.event.as_str()));
        let next = next.context("nothing happened any more")?;
        ensure!(
            next.event == "interrupt",
            "there was room for {} before the host had answered anything: the ring was not full",
            next.command
        );
        for churner in churners {
            let mark = vm.mark();
            vm.say(churner, "enough")?;
            vm.wait_line(churner, "churned", mark)?;
            vm.wait_end(churner)?;
        }
        client.expect(vm, seed - 1)?;
        client.draw(vm, seed)?;
    }
    client.end(vm)
}

/// There is nothing to show a picture on, and nothing to turn off.
fn without_scanouts(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&["--display", "none"]))?;
    for round in 0..2 {
        let mark = vm.mark();
        let churner = vm.start_program(&["virtgpu-guest", "churn"])?;
        vm.wait_line(churner, "churning", mark)?;
        match round {
            0 => Sleep::S3.cycle(vm)?,
            _ => Sleep::Idle.cycle(vm)?,
        }
        ensure!(test(vm, "disk", "core")?, "the guest does not hibernate");
        vm.say(churner, "enough")?;
        vm.wait_line(churner, "churned", mark)?;
        vm.wait_end(churner)?;
        vm.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_gpu/unbind")?;
        vm.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_gpu/bind")?;
    }
    Ok(())
}
