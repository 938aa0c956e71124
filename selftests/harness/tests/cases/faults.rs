// SPDX-License-Identifier: GPL-2.0

//! A host that makes mistakes: whatever it answers to whatever command, nothing breaks, nothing hangs, the kernel's log names it, and
//! once the host has come to its senses the driver can be loaded anew and works.

use std::fs;
use std::ops::Range;
use std::time::Instant;

use anyhow::{
    Context,
    Result,
    bail,
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
use virtgpu_lab::logs;
use virtgpu_lab::suspend::test_devices;
use virtgpu_lab::vm::{
    GPU,
    LIMIT,
    Machine,
    Mark,
    Note,
    Vm,
    reference_with, //
};

use crate::cycles::Usage;
use crate::identity::{
    is_built_in,
    is_other_driver, //
};

const SIZE: (u32, u32) = (640, 480);

/// Everything that a rule of the host can do wrong.
const FAULTS: [&str; 13] = [
    "error 0x1200",
    "error 0x1201",
    "error 0x1203",
    "wrong type",
    "used length 3",
    "garbage",
    "wrong fence id",
    "answer after 2 s",
    "no answer",
    "token twice",
    "bad descriptor id",
    "open chain",
    // Cut to 16 bits, it would be one that there is.
    "bad descriptor id 65536",
];

/// How many of a thousand commands go wrong at random: two or three in the life of a driver.
const RATE: u32 = 30;

/// How many seeds of random faults there are in all, in one guest, and on a day like any other.
const MANY: u64 = 2000;
const PER_GUEST: u64 = 100;
const FEW: u64 = 6;

/// After so many seeds in a guest, what is made once has been made.
const WARM_UP: u64 = 10;

/// What the driver may say of a host that makes mistakes.
const TOLERATED: [&str; 10] = [
    "*ERROR* response 0x",
    "*ERROR* no answer to ",
    "*ERROR* fbdev: Failed to setup emulation",
    "*ERROR* the host did not answer",
    "*ERROR* the host does not answer",
    "*ERROR* no display info",
    " commands to recover ",
    "*ERROR* the host was not told of the resume",
    "*ERROR* the device did not come back",
    " was not sent: ",
];

/// What the guest does when the host makes a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The driver is loaded, and the console appears.
    Probe,
    /// A client comes, and shows its first picture.
    Modeset,
    /// A client shows another picture.
    Flip,
    /// A client ends, and the console is back.
    Leave,
    /// The devices are suspended.
    Freeze,
    /// They are resumed, and the host has kept its resources.
    Restore,
    /// They are resumed, and the host knows nothing of FREEZING.
    Recover,
}

const PHASES: [Phase; 7] = [
    Phase::Probe,
    Phase::Modeset,
    Phase::Flip,
    Phase::Leave,
    Phase::Freeze,
    Phase::Restore,
    Phase::Recover,
];

/// How much of the matrix is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// Every fault once, and every command once.
    Some,
    All,
}

pub fn trials() -> Vec<Trial> {
    if is_other_driver() {
        return Vec::new();
    }
    let name = |phase: Phase| format!("faults::{phase:?}").to_lowercase();
    let some =
        PHASES.map(|phase| trial(name(phase), move |case| matrix(case, phase, Extent::Some)));
    let few = trial("faults::random", |case| random(case, 0..FEW));
    let mut trials: Vec<_> = some
        .into_iter()
        .chain([few])
        .map(|case| case.with_ignored_flag(is_built_in()))
        .chain([trial("faults::killed", killed)])
        .collect();
    // `make soak` runs what is ignored.
    if is_built_in() {
        return trials;
    }
    for phase in PHASES {
        trials.push(trial(format!("soak::{}", name(phase)), move |case| {
            matrix(case, phase, Extent::All)
        }));
    }
    for first in (0..MANY).step_by(PER_GUEST as usize) {
        let seeds = first..first + PER_GUEST;
        trials.push(trial(
            format!("soak::faults::random::{first:04}"),
            move |case| random(case, seeds.clone()),
        ));
    }
    trials
}

impl Phase {
    fn machine(self) -> Machine {
        let options: &[&str] = match self {
            Phase::Recover => &["--display", "640x480", "--freezing", "off"],
            _ => &["--display", "640x480"],
        };
        Machine::on_reference_host(options)
    }

    /// What the driver sends. [`Phase::commands`] finds out, and this is what it ought to find.
    fn expected(self) -> &'static [&'static str] {
        match self {
            Phase::Probe => &[
                "STATUS_FREEZING",
                "GET_DISPLAY_INFO",
                "GET_EDID",
                "RESOURCE_CREATE_2D",
                "RESOURCE_ATTACH_BACKING",
                "SET_SCANOUT",
                "TRANSFER_TO_HOST_2D",
                "RESOURCE_FLUSH",
            ],
            Phase::Modeset => &[
                "RESOURCE_CREATE_2D",
                "RESOURCE_ATTACH_BACKING",
                "SET_SCANOUT",
                "TRANSFER_TO_HOST_2D",
                "RESOURCE_FLUSH",
            ],
            Phase::Flip => &["TRANSFER_TO_HOST_2D", "SET_SCANOUT", "RESOURCE_FLUSH"],
            Phase::Leave => &[
                "SET_SCANOUT",
                "TRANSFER_TO_HOST_2D",
                "RESOURCE_FLUSH",
                "RESOURCE_UNREF",
            ],
            Phase::Freeze => &["SET_SCANOUT", "RESOURCE_CREATE_2D", "STATUS_FREEZING"],
            Phase::Restore => &[
                "RESOURCE_UNREF",
                "STATUS_FREEZING",
                "GET_DISPLAY_INFO",
                "GET_EDID",
                "SET_SCANOUT",
                "TRANSFER_TO_HOST_2D",
                "RESOURCE_FLUSH",
            ],
            Phase::Recover => &[
                "RESOURCE_CREATE_2D",
                "RESOURCE_ATTACH_BACKING",
                "TRANSFER_TO_HOST_2D",
                "GET_DISPLAY_INFO",
                "GET_EDID",
                "SET_SCANOUT",
                "RESOURCE_FLUSH",
            ],
        }
    }

    /// Brings the guest to where the phase begins, on a host that behaves, and sees that the driver works.
    fn prepare(self, vm: &mut Vm) -> Result<Option<Client>> {
        let client = Client::start(vm, 1, &[SIZE])?;
        match self {
            Phase::Probe | Phase::Modeset => {
                client.end(vm)?;
                if self == Phase::Probe {
                    unload(vm)?;
                }
                Ok(None)
            }
            _ => Ok(Some(client)),
        }
    }

    /// Does what the phase is about.
    fn act(self, vm: &mut Vm, client: Option<Client>) -> Result<Option<Client>> {
        match (self, client) {
            (Phase::Probe, _) => {
                load(vm)?;
                Ok(None)
            }
            (Phase::Modeset, _) => Client::try_start(vm, 2, &[SIZE]),
            (Phase::Flip, Some(client)) => {
                client.try_draw(vm, 2)?;
                Ok(Some(client))
            }
            (Phase::Leave, Some(client)) => {
                client.leave(vm)?;
                Ok(None)
            }
            (_, client) => {
                test_devices(vm)?;
                Ok(client)
            }
        }
    }

    /// Finds out which commands the phase has, on a host that behaves, and how many of each come before it.
    fn commands(self, vm: &mut Vm) -> Result<Vec<(String, usize)>> {
        let client = self.prepare(vm)?;
        vm.host()?.mark("phase")?;
        let client = self.act(vm, client)?;
        let mut expected = self.expected().to_vec();
        expected.sort_unstable();
        let end = Instant::now() + LIMIT;
        loop {
            let commands = self.recorded(&vm.host()?.record()?)?;
            let mut found: Vec<_> = commands.iter().map(|(name, _)| name.as_str()).collect();
            found.sort_unstable();
            // What nobody waits for may reach the host a little later.
            if found == expected {
                if let Some(client) = client {
                    client.end(vm)?;
                }
                return Ok(commands);
            }
            ensure!(Instant::now() < end, "the driver sent {found:?}");
        }
    }

    /// Finds the phase's commands in a record.
    fn recorded(self, record: &[Entry]) -> Result<Vec<(String, usize)>> {
        let record = after_mark(record, "phase")?;
        let down = record.iter().position(|entry| entry.event == "stop");
        let (before, during): (&[Entry], &[Entry]) = match (self, down) {
            (Phase::Freeze, Some(down)) => (&[], &record[..down]),
            (Phase::Restore | Phase::Recover, Some(down)) => record.split_at(down),
            (Phase::Freeze | Phase::Restore | Phase::Recover, None) => {
                bail!("the device was not reset")
            }
            _ => (&[], record),
        };
        let mut names: Vec<(String, usize)> = Vec::new();
        for command in commands(during) {
            if !names.iter().any(|(name, _)| *name == command.command) {
                let same = |other: &&Entry| other.command == command.command;
                let before = commands(before).filter(same).count();
                names.push((command.command.clone(), before));
            }
        }
        Ok(names)
    }
}

fn load(vm: &mut Vm) -> Result<()> {
    vm.run("load-driver").map(drop)
}

/// Loads the driver on a host that behaves. The device has the first number, unless an earlier one was never released.
fn load_again(vm: &mut Vm) -> Result<()> {
    vm.run("load-driver && test -e /dev/dri/card0").map(drop)
}

/// Unloads the driver. At the end of a case, whatever it has left is a leak.
pub fn unload(vm: &mut Vm) -> Result<()> {
    vm.run(
        "for console in /sys/class/vtconsole/vtcon[1-9]; do [ ! -e $console ] || echo 0 > $console/bind; done; \
         rmmod $(basename $(readlink /sys/bus/virtio/drivers/virtio_gpu/module))",
    )
    .map(drop)
}

fn matrix(case: &mut Case, phase: Phase, extent: Extent) -> Result<()> {
    for text in TOLERATED {
        case.expect_in_log(text);
    }
    let vm = case.boot(&phase.machine())?;
    vm.run("printf '\\033[?25l' > /dev/tty1")?;
    let commands = phase.commands(vm)?;
    let mut complaints = Vec::new();
    let mut rows = 0;
    for (row, (command, before)) in commands.iter().enumerate() {
        for (column, fault) in FAULTS.iter().enumerate() {
            if extent == Extent::Some && column % commands.len() != row {
                continue;
            }
            rows += 1;
            let found = cell(vm, phase, command, before + 1, fault)
                .with_context(|| format!("{command}, {fault}"))?;
            complaints.extend(
                found
                    .into_iter()
                    .map(|text| format!("{command}, {fault}: {text}")),
            );
        }
    }
    // The last row's driver works as well.
    if let Some(client) = phase.prepare(vm)? {
        client.end(vm)?;
    }
    if phase == Phase::Probe {
        load(vm)?;
    }
    unload(vm)?;
    ensure!(
        complaints.is_empty(),
        "{} of {rows} rows have complaints:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
    Ok(())
}

/// The life of a driver on a host that makes mistakes at random, once for each of `seeds`.
fn random(case: &mut Case, seeds: Range<u64>) -> Result<()> {
    for text in TOLERATED {
        case.expect_in_log(text);
    }
    let vm = case.boot(&Phase::Restore.machine())?;
    let mut warm = None;
    let mut struck = Vec::new();
    for (done, seed) in (0..).zip(seeds) {
        let mark = vm.mark();
        vm.run(&format!("echo 'fault: seed {seed}' > /dev/kmsg"))?;
        unload(vm)?;
        if done == WARM_UP {
            warm = Some(Usage::measure(vm)?);
        }
        vm.host()?.misbehave(&format!("random {seed}:{RATE}"))?;
        live(vm, seed).with_context(|| format!("seed {seed}"))?;
        struck.push(vm.host()?.faults()?);
        vm.host()?.behave()?;
        unload(vm)?;
        let log = log(vm, mark)?;
        if let Some(first) = logs::kernel_faults(&log, &TOLERATED).first() {
            bail!("seed {seed}: {first}");
        }
        load_again(vm)?;
        let client = Client::start(vm, 1, &[SIZE]).with_context(|| format!("after seed {seed}"))?;
        // One that is none. Not while the host makes mistakes: QEMU crashes if it meets the reset that they may lead to.
        vm.host()?.control("config-change")?;
        client.draw(vm, 2)?;
        client.end(vm)?;
    }
    unload(vm)?;
    let (mistakes, seeds) = (struck.iter().sum::<usize>(), struck.len());
    fs::write(vm.dir.join("mistakes"), format!("{mistakes}: {struck:?}\n"))?;
    ensure!(
        mistakes >= seeds,
        "with {seeds} seeds, the host made {mistakes} mistakes: {struck:?}"
    );
    warm.map_or(Ok(()), |warm| warm.expect_no_growth(vm))
}

/// All that a driver sees: it is loaded, clients come and go, the guest sleeps, the device is unbound and bound.
fn live(vm: &mut Vm, seed: u64) -> Result<()> {
    load(vm)?;
    let client = Client::try_start(vm, 1, &[SIZE])?;
    if let Some(client) = &client {
        client.try_draw(vm, 2)?;
    }
    // There is nothing to see for any of these.
    vm.host()?.control("interrupts 16")?;
    // Half of them sleep with a client, the others without.
    if let Some(client) = client {
        if seed.is_multiple_of(2) {
            test_devices(vm)?;
            client.try_draw(vm, 3)?;
        }
        client.leave(vm)?;
    }
    test_devices(vm)?;
    vm.run(
        "cd /sys/bus/virtio/drivers/virtio_gpu; [ ! -e virtio0 ] || echo virtio0 > unbind; echo virtio0 > bind || true",
    )?;
    if let Some(client) = Client::try_start(vm, 4, &[SIZE])? {
        client.leave(vm)?;
    }
    Ok(())
}

/// Returns the kernel's log since `mark`, up to now.
fn log(vm: &mut Vm, mark: Mark) -> Result<String> {
    const END: &str = "fault: end";
    let now = vm.mark();
    vm.run(&format!("echo '{END}' > /dev/kmsg"))?;
    vm.wait_console(END, now)?;
    let lines = vm.since(mark).iter().filter_map(|note| match note {
        Note::Console(line) => Some(line.as_str()),
        _ => None,
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// One fault, and what is left of it. Returns what is wrong with that.
fn cell(
    vm: &mut Vm,
    phase: Phase,
    command: &str,
    ordinal: usize,
    fault: &str,
) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    let client = phase.prepare(vm)?;
    let mark = vm.mark();
    vm.run(&format!("echo 'fault: {command}, {fault}' > /dev/kmsg"))?;
    vm.host()?
        .misbehave(&format!("fault {ordinal}th {command}: {fault}"))?;
    let client = phase.act(vm, client)?;
    vm.host()?.wait_faults(1)?;
    vm.host()?.behave()?;
    if let Some(client) = client {
        // A client that is still there goes on, whether anything had to be recovered or not.
        if client.try_draw(vm, 3)? && !is_lost(phase, command, fault) {
            client.expect(vm, 3)?;
        }
        client.leave(vm)?;
    }
    unload(vm)?;
    let log = log(vm, mark)?;
    let (named, is_harmless) = names(phase, command, fault);
    let tolerated: &[&str] = if is_harmless { &[] } else { &TOLERATED };
    for line in logs::kernel_faults(&log, tolerated) {
        complaints.push(line.to_owned());
    }
    if is_harmless && log.contains("the device does not work") {
        complaints.push(String::from("the device was reset"));
    }
    if !named.is_empty() && !named.iter().any(|text| log.contains(text.as_str())) {
        complaints.push(format!("the kernel's log has none of {named:?}"));
    }
    load_again(vm)?;
    Ok(complaints)
}

/// Whether the device is given up: it did not answer while everything was created anew.
fn is_lost(phase: Phase, command: &str, fault: &str) -> bool {
    phase == Phase::Recover && fault == "no answer" && !command.starts_with("GET_")
}

/// How the kernel's log names a fault, one of these, and whether there must be no error at all.
fn names(phase: Phase, command: &str, fault: &str) -> (Vec<String>, bool) {
    let has_data = command.starts_with("GET_");
    let waits = has_data
        || command == "STATUS_FREEZING"
        || matches!(
            (phase, command),
            (Phase::Freeze, "RESOURCE_CREATE_2D") | (Phase::Restore, "RESOURCE_UNREF")
        );
    let text: &[&str] = match fault {
        "wrong fence id" | "answer after 2 s" | "open chain" => return (Vec::new(), true),
        // There is nothing but a header.
        "garbage" if !has_data => return (Vec::new(), true),
        // Sizes that make no sense are nobody's but the display's.
        "garbage" if command == "GET_DISPLAY_INFO" => &[],
        "token twice" => &["is not a head"],
        "bad descriptor id" => &["out of range"],
        "bad descriptor id 65536" => &["id 65536 out of range"],
        // Whoever waits for this waits for everything else as well.
        "no answer" if phase == Phase::Freeze && command != "STATUS_FREEZING" => {
            &["the host does not answer"]
        }
        "no answer" if waits => return (vec![format!("no answer to {command} within")], false),
        "no answer" if is_lost(phase, command, fault) => &["the device did not come back"],
        // Nobody waits for it.
        "no answer" => return (Vec::new(), true),
        _ if !waits => return (vec![format!(" {command}), 1 so far")], false),
        _ => match (phase, command) {
            (Phase::Probe, "STATUS_FREEZING") => {
                &["the host offers freezing, but does not know it"]
            }
            (Phase::Freeze, "STATUS_FREEZING") => &["the host did not promise"],
            (_, "STATUS_FREEZING") => &["the host was not told of the resume"],
            (_, "GET_DISPLAY_INFO") => &["no display info"],
            (_, "GET_EDID") => &["no usable EDID"],
            (Phase::Freeze, _) => &[" resources recovered"],
            _ => &["the host did not keep its resources"],
        },
    };
    (text.iter().map(|text| text.to_string()).collect(), false)
}

/// The host does not answer, and two clients wait for room in the ring. The second one is killed, and ends while the first one, whose
/// time would be over first, still waits; then that one is killed, too.
fn killed(case: &mut Case) -> Result<()> {
    const SIGKILL: i32 = 9;
    const RING: usize = 16;
    let vm = case.boot(&Machine {
        devices: vec![format!("{},id={GPU}", reference_with("vq_size", RING))],
        // No console, which would wait for room, too.
        append: "drm_client_lib.active=".into(),
        ..Machine::on_reference_host(&["--display", "640x480"])
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for round in 1..=2 {
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.hold("any")?;
        let first = vm.start_program(&["virtgpu-guest", "churn"])?;
        vm.wait_for_waiters(1)?;
        let second = vm.start_program(&["virtgpu-guest", "create", "64x64"])?;
        vm.wait_for_waiters(2)?;
        for (program, name) in [(second, "second"), (first, "first")] {
            ensure!(
                vm.ended(first).is_none(),
                "the first one did not wait until it was killed"
            );
            vm.signal(program, SIGKILL)?;
            let output = vm.wait_end(program)?;
            ensure!(
                output.code == 128 + SIGKILL,
                "the {name} one ended with {}: {}",
                output.code,
                output.err
            );
        }
        let answered = vm.host()?.answer_now()?;
        ensure!(
            answered == RING,
            "the host had {answered} of {RING} commands"
        );
        client.draw(vm, round)?;
    }
    client.end(vm)
}
