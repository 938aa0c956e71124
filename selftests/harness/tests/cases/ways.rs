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
use virtgpu_lab::host::{
    Entry,
    after_mark,
    commands, //
};
use virtgpu_lab::suspend::{
    DRIVER,
    FREEZER,
    Sleep,
    test, //
};
use virtgpu_lab::vm::{
    GPU,
    Machine,
    Vm,
    reference_with, //
};

use crate::freezing::resources;
use crate::identity::is_other_driver;

/// What the device offers first.
const SIZE: (u32, u32) = (1280, 800);

/// What the driver says when it is back.
const KEPT: &str = "resumed, the host kept its resources";
const RECOVERED: &str = "resources recovered";

/// Marks in the host's record: it begins to keep back answers, and the guest goes down.
const HOLDS: &str = "the host holds";
const DOWN: &str = "down";

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("ways::back_to_back", back_to_back),
        trial("ways::aborted", |case| {
            let machine = Machine::with_gpu("virtio-gpu-pci");
            let outcomes = [KEPT, RECOVERED];
            aborted(case, &machine, SIZE, outcomes, |_, _| Ok(()))
        }),
        trial("ways::aborted_kept", aborted_kept).with_ignored_flag(is_other_driver()),
        trial("ways::before_any_modeset", before_any_modeset),
        trial("ways::many_buffers", many_buffers),
        trial("ways::busy", busy),
        trial("ways::in_flight::kept", |case| in_flight(case, &[], KEPT))
            .with_ignored_flag(is_other_driver()),
        trial("ways::in_flight::recovered", |case| {
            in_flight(case, &["--freezing", "off"], RECOVERED)
        })
        .with_ignored_flag(is_other_driver()),
        trial("ways::waiting_clients", waiting_clients).with_ignored_flag(is_other_driver()),
        trial("ways::full_ring", full_ring).with_ignored_flag(is_other_driver()),
        trial("ways::without_scanouts", without_scanouts),
    ];
    for state in ["mem", "freeze", "disk"] {
        for level in ["freezer", "devices", "platform", "processors", "core"] {
            trials.push(trial(
                format!("ways::pm_test::{state}::{level}"),
                move |case| pm_test(case, state, level),
            ));
        }
    }
    trials
}

/// A part of the way to sleep and back, with a client that flips.
fn pm_test(case: &mut Case, state: &str, level: &str) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    vm.run("echo deep > /sys/power/mem_sleep")?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let before = vm.creations()?;
    let seeds = client.start_flips(vm)?;
    let tested = test(vm, state, level)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 1)?;

    // There is no processor to halt in suspend to idle.
    let supported = state != "freeze" || !["processors", "core"].contains(&level);
    ensure!(tested == supported, "the guest did it: {tested}");
    let lost = vm.creations()? - before;
    let expected = usize::from(supported && level != "freezer");
    ensure!(
        lost == expected,
        "the host lost its resources {lost} times instead of {expected}"
    );
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

/// Another driver refuses to suspend when ours has suspended already, and what ours did is undone, while a client flips.
///
/// It is the kernel's alarm timer, for an alarm that is about to go off. Devices are suspended in the order in which they came, the
/// last one first, so ours is made to come last: first only as a virtio device, whose transport is not touched then, and then as a
/// PCI function, which is reset. `outcomes` is what the driver says of each; then `check` is called, and told whether it was reset.
fn aborted(
    case: &mut Case,
    machine: &Machine,
    size: (u32, u32),
    outcomes: [&str; 2],
    check: impl Fn(&Vm, bool) -> Result<()>,
) -> Result<()> {
    const PCI: &str = "/sys/bus/pci";
    let vm = case.boot(machine)?;
    // One after the other.
    vm.run("echo 0 > /sys/power/pm_async && echo deep > /sys/power/mem_sleep")?;
    let function = vm.run("basename $(dirname $(readlink -f /sys/bus/virtio/devices/virtio0))")?;
    let function = function.trim();
    for (seed, anew, outcome, reset) in [
        (
            10,
            format!(
                "echo {function} > {PCI}/drivers/virtio-pci/unbind && echo {function} > {PCI}/drivers/virtio-pci/bind"
            ),
            outcomes[0],
            false,
        ),
        (
            20,
            format!("echo 1 > {PCI}/devices/{function}/remove && echo 1 > {PCI}/rescan"),
            outcomes[1],
            true,
        ),
    ] {
        vm.run(&anew)?;
        let client = Client::start(vm, seed, &[size])?;
        for round in 1..=2 {
            let mark = vm.mark();
            let alarm = vm.start_program(&["virtgpu-guest", "alarm"])?;
            vm.wait_line(alarm, "armed", mark)?;
            let seeds = client.start_flips(vm)?;
            if let Some(host) = &vm.host {
                host.mark(DOWN)?;
            }
            let mark = vm.mark();
            let output = vm.try_run("echo mem > /sys/power/state")?;
            ensure!(output.code != 0, "the guest slept, whatever the alarm");
            vm.wait_console("alarmtimer", mark)?;
            vm.wait_console(outcome, mark)?;
            check(vm, reset)?;
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

/// The same on a host that has been asked to keep everything, and was told in vain.
fn aborted_kept(case: &mut Case) -> Result<()> {
    let machine = Machine::on_reference_host(&[]);
    aborted(case, &machine, (1024, 768), [KEPT, KEPT], |vm, reset| {
        let record = vm.host()?.record()?;
        let after = after_mark(&record, DOWN)?;
        let told: Vec<_> = commands(after)
            .filter(|entry| entry.command == "STATUS_FREEZING")
            .map(|entry| &entry.args["freezing"])
            .collect();
        ensure!(told == [1, 0], "FREEZING was said to be {told:?}");
        let kept: Vec<_> = after
            .iter()
            .filter(|entry| entry.event == "reset")
            .map(|entry| &entry.more["kept"])
            .collect();
        let expected = if reset { &[true][..] } else { &[] };
        ensure!(
            kept == expected,
            "the device was reset, and the host kept its resources: {kept:?}"
        );
        Ok(())
    })
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

/// Sixteen outputs flip, a thousand buffers and more come and go, and an output changes while the guest goes down, four times: up to
/// 16 flips each time, as many as there can be, because DRM has one pending flip for each CRTC. How much of it is under way when it is
/// the driver's turn is a matter of luck here, where the host answers at once, and of [`in_flight`].
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
        cpus: 4,
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

/// Sends the guest to sleep and wakes it up, and has the host give the answers that it has kept back since [`HOLDS`] when the kernel
/// says `moment`, see [`Sleep::cycle_with`]. Returns the record.
///
/// `before` is called just before: nobody in the guest waits longer for an answer, or for room in the ring, than 5 s.
fn down_unanswered(
    vm: &mut Vm,
    sleep: Sleep,
    moment: &str,
    before: impl FnOnce(&mut Vm) -> Result<()>,
) -> Result<Vec<Entry>> {
    let mut answered = 0;
    sleep.cycle_with(vm, moment, before, |vm| {
        let host = vm.host()?;
        host.mark(DOWN)?;
        answered = host.answer_now()?;
        Ok(())
    })?;
    let record = vm.host()?.record()?;
    let count = kept_back(after_mark(&record, HOLDS)?).count();
    ensure!(
        answered == count,
        "{answered} of {count} commands were unanswered at '{moment}'"
    );
    Ok(record)
}

/// Returns the commands in a part of the record whose answers the host has kept back.
fn kept_back(record: &[Entry]) -> impl Iterator<Item = &Entry> {
    commands(record).filter(|entry| entry.fault.is_some())
}

/// Returns what is between the last marks [`HOLDS`] and [`DOWN`].
fn going_down(record: &[Entry]) -> Result<&[Entry]> {
    let after = after_mark(record, HOLDS)?;
    let rest = after_mark(record, DOWN)?.len();
    Ok(&after[..after.len().saturating_sub(rest)])
}

/// Expects that the host had given no answer that the `ring` had room for until [`DOWN`], so that nothing came in before it gave one.
/// Returns what happened then.
fn expect_full_ring(record: &[Entry], ring: usize) -> Result<&[Entry]> {
    let count = kept_back(going_down(record)?).count();
    ensure!(
        count == ring,
        "{count} of {ring} places in the ring were taken"
    );
    let after = after_mark(record, DOWN)?;
    let mut next = after
        .iter()
        .filter(|entry| ["command", "interrupt"].contains(&entry.event.as_str()));
    let first = next.next().context("nothing happened any more")?;
    ensure!(
        first.event == "interrupt",
        "there was room for {} before the host had answered anything",
        first.command
    );
    Ok(after)
}

/// Sixteen outputs flip, and the host has not answered 64 flips and 500 buffers that came, and has not said what an output has changed
/// to, when the driver is told to suspend. As many buffers went: they fill the rest of the ring, and where there was no room for one, the
/// driver still has to tell the host. Afterwards the host has none of them.
fn in_flight(case: &mut Case, host: &[&str], outcome: &str) -> Result<()> {
    const HEADS: usize = 16;
    const SIZE: (u32, u32) = (320, 240);
    const RING: usize = 1024;
    const FLIPS: usize = 4 * HEADS;
    const BUFFERS: usize = 500;
    /// How many of those that go do so when somebody waits for an answer already, whose time is short.
    const LATE: usize = 100;
    /// How often the host is asked what has changed, and which output it is.
    const CHANGES: usize = 1;
    const CHANGED: usize = 1;
    let other = |cycle: u8| (400, 300 + 20 * u32::from(cycle));
    let mut options = ["--display", "320x240"].repeat(HEADS);
    options.extend(host);
    let machine = Machine::on_reference_host(&options);
    let vm = case.boot(&Machine {
        devices: vec![format!("{},id={GPU}", reference_with("vq_size", RING))],
        // No console, whose search for modes takes long with so many outputs.
        append: "drm_client_lib.active=".into(),
        ..machine
    })?;
    let client = Client::start(vm, 0, &[SIZE; HEADS])?;
    for (cycle, sleep) in (0..).zip([Sleep::S3, Sleep::Idle]) {
        let before = resources(vm.host()?)?;
        let hold = |vm: &mut Vm, count: usize| {
            let mark = vm.mark();
            let holder = vm.start_program(&["virtgpu-guest", "hold", &count.to_string()])?;
            vm.wait_line(holder, "holding", mark)?;
            anyhow::Ok(holder)
        };
        let release = |vm: &mut Vm, holder| {
            let mark = vm.mark();
            vm.say(holder, "release")?;
            vm.wait_line(holder, "released", mark)
        };
        let going = hold(vm, BUFFERS - LATE)?;
        let late = hold(vm, LATE)?;

        let host = vm.host()?;
        host.control("reset-counters")?;
        host.mark(HOLDS)?;
        host.hold("RESOURCE_CREATE_2D")?;
        host.hold("RESOURCE_UNREF")?;
        host.hold("GET_DISPLAY_INFO")?;
        // As many and no more, which would leave no room for the others.
        for flip in 1..=FLIPS {
            host.hold(&format!("{flip}th TRANSFER_TO_HOST_2D"))?;
        }
        let coming = hold(vm, BUFFERS)?;
        release(vm, going)?;
        let seeds = client.start_flips(vm)?;
        vm.host()?.wait_faults(2 * BUFFERS - LATE + FLIPS)?;
        let mark = vm.mark();
        let record = down_unanswered(vm, sleep, DRIVER, |vm| {
            let host = vm.host()?;
            let (width, height) = other(cycle);
            host.control(&format!("hotplug {CHANGED} {width}x{height}"))?;
            host.wait_command("GET_DISPLAY_INFO", HOLDS)?;
            release(vm, late)?;
            // What waits at the driver takes every place that becomes free.
            vm.host()?.wait_faults(RING)
        })?;
        vm.wait_console(outcome, mark)?;

        expect_full_ring(&record, RING)?;
        let going_down = going_down(&record)?;
        for (name, expected) in [
            ("RESOURCE_CREATE_2D", BUFFERS),
            ("TRANSFER_TO_HOST_2D", FLIPS),
            ("GET_DISPLAY_INFO", CHANGES),
            // The other buffers wait.
            ("RESOURCE_UNREF", RING - BUFFERS - FLIPS - CHANGES),
        ] {
            let count = kept_back(going_down)
                .filter(|entry| entry.command == name)
                .count();
            ensure!(
                count == expected,
                "{count} of {name} were unanswered when the driver was told to suspend, and not {expected}"
            );
        }
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        for holder in [going, late, coming] {
            vm.hang_up(holder)?;
            vm.wait_end(holder)?;
        }
        // The host has done all that came before what it shows.
        client.draw(vm, cycle + 1)?;
        let after = resources(vm.host()?)?;
        ensure!(
            after == before,
            "the host has the resources {after:?} instead of {before:?}"
        );
    }
    client.end(vm)?;
    let card = vm.card()?;
    let preferred = card.outputs[CHANGED]
        .modes
        .iter()
        .find(|mode| mode.preferred);
    let size = preferred.map(|mode| (mode.width, mode.height));
    ensure!(
        size == Some(other(1)),
        "{} prefers {size:?}",
        card.outputs[CHANGED].name
    );
    Ok(())
}

/// The ring is full, with clients waiting for room in it, when the guest is told to go down. They cannot be frozen before they have it.
fn waiting_clients(case: &mut Case) -> Result<()> {
    const SIZE: (u32, u32) = (1024, 768);
    const RING: usize = 16;
    const CHURNERS: usize = 3;
    let machine = Machine::on_reference_host(&["--freezing", "off"]);
    let device = reference_with("vq_size", RING);
    let vm = case.boot(&Machine {
        devices: vec![format!("{device},id={GPU}")],
        // No console, which would wait for room, too.
        append: "drm_client_lib.active=".into(),
        ..machine
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for (seed, sleep) in (1..).zip([Sleep::S3, Sleep::Idle]) {
        let mut churners = Vec::new();
        for _ in 0..CHURNERS {
            let mark = vm.mark();
            let churner = vm.start_program(&["virtgpu-guest", "churn"])?;
            vm.wait_line(churner, "churning", mark)?;
            churners.push(churner);
        }
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.mark(HOLDS)?;
        let record = down_unanswered(vm, sleep, FREEZER, |vm| {
            let host = vm.host()?;
            host.hold("RESOURCE_UNREF")?;
            host.wait_faults(RING)?;
            vm.wait_for_waiters(CHURNERS)
        })?;
        expect_full_ring(&record, RING)?;
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

/// The ring is full of commands that nobody waits for, and a flip waits for room in it, when the driver is told to suspend.
fn full_ring(case: &mut Case) -> Result<()> {
    const SIZE: (u32, u32) = (1024, 768);
    const RING: usize = 16;
    let machine = Machine::on_reference_host(&["--freezing", "off"]);
    let vm = case.boot(&Machine {
        devices: vec![format!("{},id={GPU}", reference_with("vq_size", RING))],
        ..machine
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for (seed, sleep) in (1..).zip([Sleep::S3, Sleep::Idle]) {
        let mark = vm.mark();
        let holder = vm.start_program(&["virtgpu-guest", "hold", &RING.to_string()])?;
        vm.wait_line(holder, "holding", mark)?;
        let seeds = client.start_flips(vm)?;
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.mark(HOLDS)?;
        host.hold("RESOURCE_UNREF")?;
        let record = down_unanswered(vm, sleep, DRIVER, |vm| {
            vm.say(holder, "release")?;
            vm.host()?.wait_faults(RING)?;
            // The function in which a commit waits for room is the driver's.
            vm.run("until grep -q virtgpu_rs /proc/[0-9]*/wchan 2>/dev/null; do :; done")?;
            Ok(())
        })?;

        let after = expect_full_ring(&record, RING)?;
        let off = commands(after)
            .position(|entry| entry.command == "SET_SCANOUT" && entry.args["resource_id"] == 0);
        // There may have been room for a part of it.
        let flip = commands(after).position(|entry| {
            ["TRANSFER_TO_HOST_2D", "RESOURCE_FLUSH"].contains(&entry.command.as_str())
        });
        let waited = matches!((flip, off), (Some(flip), Some(off)) if flip < off);
        ensure!(
            waited,
            "no flip has waited for room: command {flip:?} was one, and {off:?} turned the display off"
        );
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        vm.hang_up(holder)?;
        vm.wait_end(holder)?;
        client.draw(vm, seed)?;
    }
    client.end(vm)
}

/// There is nothing to show a picture on, and nothing to turn off.
fn without_scanouts(case: &mut Case) -> Result<()> {
    const ROUNDS: usize = 2;
    let vm = case.boot(&Machine::on_reference_host(&["--display", "none"]))?;
    for round in 0..ROUNDS {
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
    let log = vm.run("dmesg")?;
    let disabled = log.lines().filter(|line| line.ends_with("KMS disabled"));
    let count = disabled.count();
    ensure!(
        count == 1 + ROUNDS,
        "{count} of {} times the driver found no scanouts",
        1 + ROUNDS
    );
    Ok(())
}
