// SPDX-License-Identifier: GPL-2.0

//! FREEZING: suspend on the reference host, which keeps everything while the guest sleeps, if it is asked to and keeps its word.
//!
//! The feature was proposed for the C driver in 2023, with these faults. Each of them would be seen here:
//!
//! | fault | seen by |
//! |---|---|
//! | the host is told, and its answer not waited for | [`Cycle::check_going_down`]: the answer stands before the reset, no command is lost; `slow`: a host that takes a second keeps everything |
//! | the queues are deleted on a device that was not reset | [`wait_reset`]: the driver resets it before the guest sleeps |
//! | no byte order, no padding | byte order: not by a guest, all of them are little-endian; it is in the types of `uapi.rs`, and a unit test of `command.rs` has the bytes. Padding: the host finds what is not zero |
//! | a command before DRIVER_OK | the host finds commands that were queued before, `before-driver-ok` |
//! | the display is not suspended | [`Cycle::check_going_down`]: the scanouts are off, and nothing is drawn, before the host is told; `HOST` with flips |
//! | locks and wait queues are made anew at resume, under those who wait | `HOST`: four cycles in one guest, two with flips that wait; [`display_changes`] |
//! | work items are flushed too early or not at all, buffers leak | `mute`: what was not answered is reclaimed, four times; [`display_changes`]: an event that comes during sleep; [`lost`]: unload after all that |
//! | the answer is ignored, a failed restore leaves queues that are gone | `refusing`, `late`, `mute`, `drops_all`, `drops_one`: recovery; [`lost`]: errors, no hang |
//! | hibernation tells the host as well, and brings nothing back | [`hibernation`], [`hibernation_with_second_boot`] |
//! | all is left to the host | `HOST`: where it has not kept its word, everything that was there is created again, with its contents; [`objects`] |
//! | the bit means something else by now | `blob_alignment`, `moved`, `moved_unknown`, `denied` |

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

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
use virtgpu_lab::console::Console;
use virtgpu_lab::host::{
    Entry,
    Host,
    after_mark,
    commands,
    read_record, //
};
use virtgpu_lab::screen;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::{
    Machine,
    Mark,
    REFERENCE,
    Vm, //
};

use crate::identity::{
    is_built_in,
    is_other_driver, //
};
use crate::suspend::{
    CONTENTS,
    Content,
    survives, //
};

const SIZE: (u32, u32) = (1024, 768);

/// The resource by which the driver finds out whether the host has kept the others.
const SENTINEL: u64 = u32::MAX as u64;

/// How the driver and the host come to terms.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Terms {
    /// The host is asked to keep everything, and does.
    Kept,
    /// The host is never asked.
    NotAsked,
    /// The host says no.
    Refused,
    /// The host says nothing in time, and keeps nothing.
    Unanswered,
    /// The host says yes, and keeps nothing or not all.
    Broken,
}

/// Name, options of the host, the kernel's command line, and what comes of it.
const HOSTS: [(&str, &[&str], &str, Terms); 12] = [
    ("bit5", &[], "", Terms::Kept),
    (
        "moved",
        &["--freezing", "12"],
        "virtgpu_rs.freezing_bit=12",
        Terms::Kept,
    ),
    ("moved_unknown", &["--freezing", "12"], "", Terms::NotAsked),
    ("denied", &[], "virtgpu_rs.freezing=0", Terms::NotAsked),
    (
        "blob_alignment",
        &[
            "--freezing",
            "off",
            "--features",
            "edid,blob,indirect,event-idx",
            "--blob-alignment",
            "4096",
        ],
        "",
        Terms::NotAsked,
    ),
    ("none", &["--freezing", "off"], "", Terms::NotAsked),
    ("slow", &["--conduct", "late:1s"], "", Terms::Kept),
    ("refusing", &["--conduct", "refuse"], "", Terms::Refused),
    ("late", &["--conduct", "late:8s"], "", Terms::Unanswered),
    ("mute", &["--conduct", "mute"], "", Terms::Unanswered),
    ("drops_all", &["--conduct", "drop-all"], "", Terms::Broken),
    ("drops_one", &["--conduct", "drop-one"], "", Terms::Broken),
];

pub fn trials() -> Vec<Trial> {
    let other = is_other_driver();
    let mut trials = Vec::new();
    for (name, options, append, terms) in HOSTS {
        trials.push(trial(format!("freezing::host::{name}"), move |case| {
            host(case, options, append, terms)
        }));
    }
    for (host_name, options, terms) in [
        ("bit5", &[][..], Terms::Kept),
        ("none", &["--freezing", "off"], Terms::NotAsked),
    ] {
        for (machine_name, machine, heads, way) in machines(options) {
            for (content_name, content) in CONTENTS {
                // `HOST` has these.
                if machine_name == "pci" && !matches!(content, Content::Console) {
                    continue;
                }
                let machine = machine.clone();
                let name =
                    format!("freezing::machine::{machine_name}::{host_name}::{content_name}");
                trials.push(trial(name, move |case| {
                    on_machine(case, &machine, heads, way, content, terms)
                }));
            }
        }
    }
    trials.extend([
        trial("freezing::hibernation", hibernation),
        trial(
            "freezing::hibernation_with_second_boot",
            hibernation_with_second_boot,
        ),
        trial("freezing::crashed", crashed),
        trial("freezing::display_changes", display_changes),
        trial("freezing::screen_first", screen_first),
        trial("freezing::forgotten::shown", forgotten_shown),
        trial("freezing::forgotten::held", forgotten_held),
        trial("freezing::never_made", never_made),
        trial("freezing::objects", objects),
    ]);
    trials
        .into_iter()
        .map(|trial| trial.with_ignored_flag(other))
        .chain([trial("freezing::lost", lost).with_ignored_flag(other || is_built_in())])
        .collect()
}

/// Writes a command with the one argument that matters.
fn describe(entry: &Entry) -> String {
    let argument = ["resource_id", "freezing", "scanout"]
        .into_iter()
        .find_map(|name| entry.args.get(name));
    match argument {
        None => entry.command.clone(),
        Some(argument) => format!("{} {argument}", entry.command),
    }
}

/// Writes the commands of a resume up to and with the first that shows something of which user space knows: what comes before the
/// displays are read anew is recovery.
fn until_shown<'a>(record: impl Iterator<Item = &'a Entry>) -> Vec<String> {
    let mut lines = Vec::new();
    let mut displays_known = false;
    for entry in record {
        lines.push(describe(entry));
        displays_known |= entry.command == "GET_DISPLAY_INFO";
        if displays_known && entry.command == "RESOURCE_FLUSH" {
            break;
        }
    }
    lines
}

/// What makes a resource anew, in this order.
const ANEW: [&str; 3] = [
    "RESOURCE_CREATE_2D",
    "RESOURCE_ATTACH_BACKING",
    "TRANSFER_TO_HOST_2D",
];

/// Returns the resources that the host has.
pub fn resources(host: &Host) -> Result<BTreeSet<u64>> {
    let state = host.control("state")?;
    let resources = state["resources"].as_array().context("no resources")?;
    Ok(resources
        .iter()
        .filter_map(|resource| resource["id"].as_u64())
        .collect())
}

/// Arguments for QEMU, by which its log has what [`wait_reset`] looks for.
const TRACE_STATUS: [&str; 2] = ["-trace", "virtio_set_status"];

/// Sees to it that the driver has reset the device. QEMU would stop it, too, when the bus takes its access to memory away, but that
/// comes later, and is no reset.
fn wait_reset(vm: &Vm, log_before: usize) -> Result<()> {
    let log = fs::read(vm.dir.join("qemu.log"))?;
    let log = String::from_utf8_lossy(&log[log_before..]).into_owned();
    let first = log
        .lines()
        .find(|line| line.starts_with("virtio_set_status"))
        .context("the device's status was not written")?;
    ensure!(
        first.ends_with(" val 0"),
        "the device was not reset before it was cut off: {first}"
    );
    Ok(())
}

/// What becomes of the device while the guest sleeps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The driver resets it.
    Reset,
    /// It keeps its state, whether the host knows of FREEZING or not.
    NoSoftReset,
}

/// A way down and back, as the host has seen it.
struct Cycle {
    record: Vec<Entry>,
    terms: Terms,
    way: Way,
    outputs: usize,
    /// What the host had before, without the sentinel.
    resources: BTreeSet<u64>,
}

impl Cycle {
    /// Sends the guest to sleep and wakes it up.
    fn run(vm: &mut Vm, sleep: Sleep, terms: Terms, way: Way, outputs: usize) -> Result<Self> {
        let host = vm.host()?;
        host.mark("down")?;
        let cycle = Self {
            record: Vec::new(),
            terms,
            way,
            outputs,
            resources: resources(host)?,
        };
        let log = fs::read(vm.dir.join("qemu.log"))?.len();
        let asleep = sleep.begin(vm)?;
        if way == Way::Reset {
            wait_reset(vm, log)?;
        }
        let mark = vm.mark();
        asleep.wake(vm)?;
        let said = match cycle.is_kept() {
            true => "resumed, the host kept its resources".into(),
            false => format!("resumed, {} resources recovered", cycle.resources.len()),
        };
        vm.wait_console(&said, mark)?;
        if matches!(terms, Terms::Unanswered | Terms::Broken) {
            vm.wait_console("the host did not keep its resources", mark)?;
        }
        Ok(cycle)
    }

    /// Whether the host still has everything afterwards.
    fn is_kept(&self) -> bool {
        self.way == Way::NoSoftReset || self.terms == Terms::Kept
    }

    /// Checks what the host has been sent, when the right picture is back.
    fn check(mut self, vm: &Vm) -> Result<()> {
        let record = vm.host()?.record()?;
        self.record = after_mark(&record, "down")?.to_vec();
        self.check_going_down()?;
        self.check_coming_back(vm.host()?)
    }

    /// The part before the guest slept, and the one after it: from the reset on, or, without one, from the first thing that a guest
    /// does which is back.
    fn parts(&self) -> Result<(&[Entry], &[Entry])> {
        let reset = self.record.iter().position(|entry| entry.event == "reset");
        let back = match self.way {
            Way::Reset => reset.context("there was no reset")?,
            Way::NoSoftReset => {
                ensure!(reset.is_none(), "the device was reset");
                let first = |entry: &Entry| describe(entry) == format!("RESOURCE_UNREF {SENTINEL}");
                self.record
                    .iter()
                    .position(first)
                    .context("the driver did not look whether its resources are there")?
            }
        };
        Ok(self.record.split_at(back))
    }

    fn check_going_down(&self) -> Result<()> {
        let (down, _) = self.parts()?;
        let drawn = down
            .iter()
            .rposition(|entry| entry.command == "RESOURCE_FLUSH");
        let end = &down[drawn.map_or(0, |drawn| drawn + 1)..];
        let mut seen: Vec<_> = commands(end).map(describe).collect();
        seen.dedup();
        let mut expected = vec![
            "SET_SCANOUT 0".to_owned(),
            format!("RESOURCE_CREATE_2D {SENTINEL}"),
        ];
        if self.terms != Terms::NotAsked {
            expected.push("STATUS_FREEZING 1".into());
        }
        ensure!(seen == expected, "going down, the host was sent {seen:?}");
        if self.way == Way::NoSoftReset {
            return Ok(());
        }
        let stop = down
            .iter()
            .find(|entry| entry.event == "stop")
            .context("the device was not stopped")?;
        // A command that is answered late is one of them, but has had its time.
        let lost = stop.more["unanswered"].as_u64();
        let late = commands(end).any(|entry| entry.conduct.is_some());
        ensure!(
            late || lost == Some(0),
            "{lost:?} commands were lost in the reset"
        );
        Ok(())
    }

    fn check_coming_back(&self, host: &Host) -> Result<()> {
        let (_, back) = self.parts()?;
        let mut seen = until_shown(commands(back));
        seen.dedup();
        let mut expected = Vec::new();
        let is_told = matches!(self.terms, Terms::Kept | Terms::Unanswered | Terms::Broken);
        if is_told || self.is_kept() {
            expected.push(format!("RESOURCE_UNREF {SENTINEL}"));
        }
        if is_told {
            expected.push("STATUS_FREEZING 0".into());
        }
        ensure!(
            seen.starts_with(&expected),
            "coming back, the host was sent {seen:#?}, and first of all should have been {expected:?}"
        );
        if self.way == Way::Reset && self.is_kept() {
            ensure!(back[0].more["kept"] == true, "the host has kept nothing");
        }
        if self.is_kept() {
            let shown = seen.last().and_then(|line| line.split(' ').nth(1));
            let shown = shown.context("nothing is shown")?;
            expected.push("GET_DISPLAY_INFO".into());
            expected.extend((0..self.outputs).map(|output| format!("GET_EDID {output}")));
            expected.extend([
                format!("TRANSFER_TO_HOST_2D {shown}"),
                format!("SET_SCANOUT {shown}"),
                format!("RESOURCE_FLUSH {shown}"),
            ]);
            ensure!(
                seen == expected,
                "coming back, the host was sent {seen:#?} instead of {expected:#?}"
            );
        }
        // Later on, too: who had kept everything was not given anything again, and who had not was given everything once.
        let mut created = BTreeSet::new();
        for entry in commands(back).filter(|entry| entry.command == "RESOURCE_CREATE_2D") {
            let resource = entry.args["resource_id"].as_u64().context("no resource")?;
            ensure!(created.insert(resource), "{resource} was created twice");
        }
        let lost = match self.is_kept() {
            true => BTreeSet::new(),
            false => self.resources.clone(),
        };
        ensure!(
            created == lost,
            "{created:?} were created, and the host had lost {lost:?}"
        );
        for resource in lost {
            let of_it = commands(back).filter(|entry| entry.args["resource_id"] == resource);
            let names: Vec<_> = of_it.map(|entry| &entry.command).take(ANEW.len()).collect();
            ensure!(names == ANEW, "{resource} was brought back by {names:?}");
        }
        let after = resources(host)?;
        ensure!(
            after == self.resources,
            "the host has the resources {after:?}, and had {:?}",
            self.resources
        );
        Ok(())
    }
}

fn host(case: &mut Case, options: &[&str], append: &str, terms: Terms) -> Result<()> {
    if matches!(terms, Terms::Unanswered | Terms::Broken) {
        // The sentinel.
        case.expect_refused("RESOURCE_UNREF");
    }
    if terms == Terms::Unanswered {
        case.expect_in_log("*ERROR* no answer to STATUS_FREEZING within");
    }
    let mut machine = Machine::on_reference_host(options);
    machine.append = append.into();
    machine.arguments = TRACE_STATUS.map(String::from).into();
    let vm = case.boot(&machine)?;
    let asked = vm.run("dmesg")?.contains("features: +freezing");
    ensure!(
        asked == (terms != Terms::NotAsked),
        "FREEZING is negotiated: {asked}"
    );
    let features = vm.run("cat /sys/kernel/debug/dri/0/virtio-gpu-features")?;
    let listed = features
        .lines()
        .filter_map(|line| line.split_once(" : "))
        .find(|(name, _)| name.trim_end() == "freezing");
    ensure!(
        listed.map(|(_, value)| value) == asked.then_some("yes"),
        "debugfs has FREEZING as {listed:?}"
    );

    let client = Client::start(vm, 0, &[SIZE])?;
    for (cycle, sleep) in [(1, Sleep::S3), (2, Sleep::Idle)] {
        let still = |vm: &mut Vm| -> Result<()> {
            let before = screen::dump(vm, 0)?;
            ensure!(!screen::is_black(&before), "the screen is black");
            let cycle_seen = Cycle::run(vm, sleep, terms, Way::Reset, 1)?;
            screen::expect(vm, 0, "the picture before suspend", &before)?;
            cycle_seen.check(vm)
        };
        still(vm).with_context(|| format!("{sleep:?}, still"))?;
        client.draw(vm, cycle)?;

        let flips = |vm: &mut Vm| -> Result<()> {
            let seeds = client.start_flips(vm)?;
            let cycle_seen = Cycle::run(vm, sleep, terms, Way::Reset, 1)?;
            client.expect_flips(vm, seeds)?;
            client.stop_flips(vm)?;
            cycle_seen.check(vm)
        };
        flips(vm).with_context(|| format!("{sleep:?}, flips"))?;
        client.draw(vm, cycle + 10)?;
    }
    client.end(vm)?;

    if terms == Terms::NotAsked {
        let record = vm.host()?.record()?;
        let told = commands(&record).find(|entry| entry.command == "STATUS_FREEZING");
        ensure!(told.is_none(), "the host was told: {told:?}");
    }
    Ok(())
}

/// Name, machine, number of outputs, and what becomes of the device.
fn machines(options: &[&str]) -> [(&'static str, Machine, usize, Way); 4] {
    const TWO: [&str; 4] = ["--display", "1024x768", "--display", "1024x768"];
    let behind_root_port = |device: &str| Machine {
        host: Machine::on_reference_host(options).host,
        ..Machine::behind_root_port(device)
    };
    let mut machines = [
        ("pci", Machine::on_reference_host(options), 1, Way::Reset),
        (
            "two_outputs",
            Machine::on_reference_host(&[options, &TWO].concat()),
            2,
            Way::Reset,
        ),
        ("root_port", behind_root_port(REFERENCE), 1, Way::Reset),
        (
            "no_soft_reset",
            behind_root_port(&format!("{REFERENCE},x-pcie-pm-no-soft-reset=on")),
            1,
            Way::NoSoftReset,
        ),
    ];
    for (_, machine, ..) in &mut machines {
        machine.arguments = TRACE_STATUS.map(String::from).into();
    }
    machines
}

/// What is on the screen of another machine survives, without anything that is not needed.
fn on_machine(
    case: &mut Case,
    machine: &Machine,
    outputs: usize,
    way: Way,
    content: Content,
    terms: Terms,
) -> Result<()> {
    let sizes = vec![SIZE; outputs];
    let down_and_up = |vm: &mut Vm, cycle: u8| {
        // In this order: after S3 the power button does not wake Q35 any more.
        let sleep = if cycle == 1 { Sleep::Idle } else { Sleep::S3 };
        Cycle::run(vm, sleep, terms, way, outputs).with_context(|| format!("{sleep:?}"))
    };
    survives(case, machine, content, &sizes, down_and_up, |vm, cycle| {
        cycle.check(vm)
    })
}

/// Returns whether the host was asked to keep everything.
fn was_asked(record: &[Entry]) -> bool {
    commands(record).any(|entry| entry.command == "STATUS_FREEZING" && entry.args["freezing"] != 0)
}

fn machine_with_swap(size: u32) -> Machine {
    Machine {
        swap: Some(size),
        ..Machine::on_reference_host(&[])
    }
}

/// The host is not asked to keep anything by a guest that hibernates, whether that ends well or not; it is by the next suspend.
fn hibernation(case: &mut Case) -> Result<()> {
    const SWAP: u32 = 512;
    let vm = case.boot(&machine_with_swap(SWAP))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let swap = |vm: &mut Vm, size: &str| {
        vm.run(&format!(
            "swapoff -a; mkswap /dev/vda {size} && swapon /dev/vda"
        ))
    };

    swap(vm, "")?;
    let mark = vm.mark();
    vm.run("echo test_resume > /sys/power/disk && echo disk > /sys/power/state")?;
    vm.wait_console("Hibernation image restored successfully", mark)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;

    // Too little, in KiB.
    swap(vm, "2048")?;
    let output = vm.try_run("echo shutdown > /sys/power/disk && echo disk > /sys/power/state")?;
    ensure!(output.code != 0, "the image found room");
    client.expect(vm, 2)?;
    client.draw(vm, 3)?;

    let record = vm.host()?.record()?;
    let resets: Vec<_> = record
        .iter()
        .filter(|entry| entry.event == "reset")
        .collect();
    ensure!(resets.len() > 2, "the device was not reset");
    ensure!(
        !was_asked(&record),
        "the host was asked to keep everything while the guest hibernates"
    );

    Sleep::S3.cycle(vm)?;
    client.expect(vm, 3)?;
    client.draw(vm, 4)?;
    ensure!(
        was_asked(&vm.host()?.record()?),
        "the host is not asked any more"
    );
    client.end(vm)
}

/// The same, and what was hibernated goes on in another process of QEMU, on another host.
fn hibernation_with_second_boot(case: &mut Case) -> Result<()> {
    let vm = case.boot(&machine_with_swap(512))?;
    vm.run("mkswap /dev/vda && swapon /dev/vda")?;
    let client = Client::start(vm, 1, &[SIZE])?;
    client.draw(vm, 2)?;
    let mark = vm.mark();
    let writer = vm.start_program(&[
        "sh",
        "-c",
        "echo shutdown > /sys/power/disk && echo disk > /sys/power/state",
    ])?;
    vm.wait_event("SHUTDOWN", mark)?;
    let before = vm.dir.clone();

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
    for record in [read_record(&before)?, vm.host()?.record()?] {
        ensure!(!was_asked(&record), "the host was asked to keep everything");
    }
    client.end(vm)
}

/// A guest that dies in its sleep leaves a host that keeps things. The next one lets go of them first of all.
fn crashed(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    client.draw(vm, 2)?;
    let kept = resources(vm.host()?)?;
    ensure!(!kept.is_empty(), "the guest has no resources");
    // A machine that is reset in S3 goes on with the kernel that sleeps.
    Sleep::Idle.begin(vm)?;
    vm.host()?.mark("crash")?;

    // The machine was told to end when it is reset.
    vm.monitor("set-action", serde_json::json!({ "reboot": "reset" }))?;
    let mark = vm.mark();
    vm.monitor("system_reset", serde_json::json!({}))?;
    vm.wait_next_kernel(mark)?;
    let client = Client::start(vm, 3, &[SIZE])?;
    client.draw(vm, 4)?;
    client.end(vm)?;

    let record = vm.host()?.record()?;
    let after = after_mark(&record, "crash")?;
    let reset = after.iter().find(|entry| entry.event == "reset");
    let kept_over_crash = &reset.context("there was no reset")?.more;
    ensure!(
        kept_over_crash["kept"] == true,
        "the host had kept nothing: {kept_over_crash}"
    );
    let first = commands(after).next().map(describe);
    ensure!(
        first.as_deref() == Some("STATUS_FREEZING 0"),
        "the first command of the new kernel is {first:?}"
    );
    ensure!(
        after.iter().any(|entry| entry.event == "released"),
        "the host has released nothing"
    );
    Ok(())
}

/// A display that changes while the guest sleeps, or just when it goes to sleep or wakes up, is seen afterwards.
fn display_changes(case: &mut Case) -> Result<()> {
    fn preferred(vm: &mut Vm) -> Result<Option<(u32, u32)>> {
        let card = vm.card()?;
        let modes = &card.outputs[0].modes;
        Ok(modes
            .iter()
            .find(|mode| mode.preferred)
            .map(|mode| (mode.width, mode.height)))
    }

    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let mut size = SIZE;
    for (sleep, width, height) in [(Sleep::S3, 800, 600), (Sleep::Idle, 1280, 800)] {
        let client = Client::start(vm, 1, &[size])?;
        let seeds = client.start_flips(vm)?;
        // Work that is under way when the device goes down.
        for _ in 0..3 {
            vm.host()?.control("config-change")?;
        }
        let asleep = sleep.begin(vm)?;
        vm.host()?.control(&format!("hotplug 0 {width}x{height}"))?;
        asleep.wake(vm)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        // Only who is the card's master has the displays looked at.
        client.end(vm)?;
        let seen = preferred(vm)?;
        size = (width, height);
        ensure!(
            seen == Some(size),
            "the preferred mode is {seen:?} instead of {size:?}"
        );
    }
    Ok(())
}

/// What was on the screen is the first thing that a host which forgot everything is told, in one go, whatever else there is.
fn screen_first(case: &mut Case) -> Result<()> {
    const SCREEN: [&str; 5] = [
        "RESOURCE_CREATE_2D",
        "RESOURCE_ATTACH_BACKING",
        "TRANSFER_TO_HOST_2D",
        "SET_SCANOUT",
        "RESOURCE_FLUSH",
    ];
    let vm = case.boot(&Machine::on_reference_host(&["--freezing", "off"]))?;
    // The console's buffer and the client's first are older.
    let client = Client::start(vm, 1, &[SIZE])?;
    client.draw(vm, 2)?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 2)?;

    let record = vm.host()?.record()?;
    let start = record.iter().rposition(|entry| entry.event == "start");
    let after: Vec<_> = commands(&record[start.context("never started")?..]).collect();
    let (screen, rest) = after
        .split_at_checked(SCREEN.len())
        .context("too few commands")?;
    let names: Vec<_> = screen.iter().map(|entry| &entry.command).collect();
    ensure!(
        names == SCREEN,
        "the first commands after resume are {names:?}"
    );
    let id = &screen[0].args["resource_id"];
    let is_same = |entry: &&&Entry| entry.args["resource_id"] == *id;
    ensure!(
        screen.iter().filter(is_same).count() == SCREEN.len() && *id != 1,
        "they are not for the buffer on the screen"
    );
    // Two buffers more, and one notification for them.
    let others: Vec<_> = rest.iter().take(2 * 3).collect();
    let names: Vec<_> = others.iter().map(|entry| &entry.command).collect();
    ensure!(
        names == [&SCREEN[..3], &SCREEN[..3]].concat(),
        "the next ones are {names:?}"
    );
    // The host may have looked before it was told.
    let kicks = others[5].kick - screen[0].kick;
    ensure!(kicks <= 1, "the host was told {kicks} times in between");
    client.draw(vm, 3)?;
    client.end(vm)
}

/// Puts a guest to sleep whose host forgets one resource, which is not the one by which the driver finds out.
fn forget(vm: &mut Vm, sleep: Sleep, resource: u64) -> Result<()> {
    vm.host()?
        .control(&format!("freezing drop-one:{resource}"))?;
    let mark = vm.mark();
    sleep.cycle(vm)?;
    vm.wait_console("resumed, the host kept its resources", mark)?;
    vm.host()?.control("freezing honest").map(drop)
}

/// Waits until the driver has found that a resource is missing, and has brought back all of them.
fn expect_recovered(vm: &mut Vm, mark: Mark, count: usize) -> Result<()> {
    vm.wait_console("the host did not keep all of its resources", mark)?;
    vm.wait_console(&format!(" {count} resources recovered"), mark)
}

/// The host forgets what is on the screen: it is missing at once, and comes back.
fn forgotten_shown(case: &mut Case) -> Result<()> {
    case.expect_in_log("*ERROR* response 0x1203");
    for command in ["TRANSFER_TO_HOST_2D", "SET_SCANOUT", "RESOURCE_FLUSH"] {
        case.expect_refused(command);
    }
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for (seed, sleep) in (1..).zip([Sleep::S3, Sleep::Idle]) {
        client.draw(vm, seed)?;
        let state = vm.host()?.control("state")?;
        let shown = state["scanouts"][0]["resource"].as_u64();
        let count = resources(vm.host()?)?.len();
        let mark = vm.mark();
        forget(vm, sleep, shown.context("nothing is shown")?)?;
        expect_recovered(vm, mark, count)?;
        client.expect(vm, seed)?;
        // The next time, it keeps everything.
        let mark = vm.mark();
        sleep.cycle(vm)?;
        vm.wait_console("resumed, the host kept its resources", mark)?;
        client.expect(vm, seed)?;
    }
    client.end(vm)
}

/// The host forgets what is not on the screen: nothing is missing until it is used, or given up.
fn forgotten_held(case: &mut Case) -> Result<()> {
    case.expect_in_log("*ERROR* response 0x1203");
    case.expect_refused("RESOURCE_UNREF");
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for (seed, sleep) in (1..).zip([Sleep::S3, Sleep::Idle]) {
        let before = resources(vm.host()?)?;
        let mark = vm.mark();
        let holder = vm.start_program(&["virtgpu-guest", "hold", "1"])?;
        vm.wait_line(holder, "holding", mark)?;
        let with_it = resources(vm.host()?)?;
        let held = with_it.difference(&before).next();
        let mark = vm.mark();
        forget(vm, sleep, *held.context("there is no other buffer")?)?;
        client.expect(vm, seed - 1)?;
        vm.say(holder, "release")?;
        vm.wait_line(holder, "released", mark)?;
        expect_recovered(vm, mark, before.len())?;
        vm.hang_up(holder)?;
        vm.wait_end(holder)?;
        let after = resources(vm.host()?)?;
        ensure!(
            after == before,
            "the host has {after:?}, and had {before:?}"
        );
        client.draw(vm, seed)?;
    }
    client.end(vm)
}

/// A host that had no memory for a buffer does not know it after it has slept either, and has kept its word: it is not reset.
fn never_made(case: &mut Case) -> Result<()> {
    case.expect_in_log("*ERROR* response 0x1201");
    case.expect_in_log("*ERROR* response 0x1203");
    // The buffer that is not there is used all the same.
    case.expect_violations();
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for seed in 1..=2 {
        vm.host()?
            .control("fault 1st RESOURCE_CREATE_2D: error 0x1201")?;
        let mark = vm.mark();
        let holder = vm.start_program(&["virtgpu-guest", "hold", "1"])?;
        vm.wait_line(holder, "holding", mark)?;
        Sleep::S3.cycle(vm)?;
        vm.wait_console("resumed, the host kept its resources", mark)?;
        let mark = vm.mark();
        vm.say(holder, "release")?;
        vm.wait_line(holder, "released", mark)?;
        vm.wait_console("response 0x1203 (command 0x102 ", mark)?;
        vm.hang_up(holder)?;
        vm.wait_end(holder)?;
        client.draw(vm, seed)?;
    }
    let record = vm.host()?.record()?;
    let starts = record.iter().filter(|entry| entry.event == "start");
    let starts = starts.count();
    ensure!(starts == 3, "the device was set up {starts} times");
    client.end(vm)
}

/// A host that has nothing more to say when the guest wakes up: errors for everybody, and nobody hangs. With an honest host, the
/// module can be loaded again.
fn lost(case: &mut Case) -> Result<()> {
    let module = case.kernel.driver.module();
    case.expect_in_log("*ERROR* the device did not come back");
    let vm = case.boot(&Machine::on_reference_host(&["--freezing", "off"]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let asleep = Sleep::S3.begin(vm)?;
    vm.host()?.control("fault any: no answer")?;
    let mark = vm.mark();
    asleep.wake(vm)?;
    vm.wait_console("*ERROR* the device did not come back", mark)?;

    client.end(vm)?;
    let output = vm.try_run("virtgpu-guest client 1 </dev/null")?;
    ensure!(
        output.code != 0,
        "a client works with a device that did not come back"
    );
    vm.host()?.control("clear")?;
    vm.run("for console in /sys/class/vtconsole/vtcon[1-9]; do echo 0 > $console/bind; done")?;
    vm.run(&format!("rmmod {module}"))?;
    vm.run("load-driver")?;
    let client = Client::start(vm, 2, &[SIZE])?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 2)?;
    client.draw(vm, 3)?;
    client.end(vm)
}

/// Checksum of 64 KiB of a byte, as the host calculates it.
fn checksum(byte: u8) -> String {
    let hash = (0..64 << 10).fold(0xcbf2_9ce4_8422_2325u64, |hash, _| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// What a resume costs does not depend on how much the host keeps; by recovery it does, and all contents are there.
fn objects(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    // With text, and without a cursor that draws by itself.
    let console = Console::new(vm, 1)?;
    let mut table = String::from(
        "| objects of 64 KiB | commands to resume, kept | commands to resume, recovered |\n|---|---|---|\n",
    );
    let mut counts = Vec::new();
    let others = resources(vm.host()?)?;
    for number in [1u32, 16, 256, 1024] {
        let mark = vm.mark();
        let holder = vm.start_program(&["virtgpu-guest", "hold", &number.to_string()])?;
        vm.wait_line(holder, "holding ", mark)?;
        let byte = number.trailing_zeros() as u8 + 1;
        vm.say(holder, &format!("fill {byte}"))?;
        vm.wait_line(holder, "filled ", mark)?;
        let mut resume = |conduct: &str| -> Result<usize> {
            vm.host()?.control(&format!("freezing {conduct}"))?;
            vm.host()?.mark(conduct)?;
            console.expect(vm)?;
            Sleep::S3.cycle(vm)?;
            console.expect(vm)?;
            let record = vm.host()?.record()?;
            let after = after_mark(&record, conduct)?;
            let reset = after.iter().position(|entry| entry.event == "reset");
            let reset = reset.context("there was no reset")?;
            Ok(until_shown(commands(&after[reset..])).len())
        };
        let kept = resume("honest")?;
        let recovered = resume("refuse")?;

        let state = vm.host()?.control("state")?;
        let all = state["resources"].as_array().context("no resources")?;
        let held = all.iter().filter(|resource| {
            let id = resource["id"].as_u64();
            id.is_some_and(|id| !others.contains(&id))
        });
        let sums: Vec<_> = held.map(|resource| resource["checksum"].clone()).collect();
        let expected = checksum(byte);
        let right = sums.iter().filter(|sum| **sum == expected).count();
        ensure!(
            right == number as usize && right == sums.len(),
            "of {number} objects, {right} have their contents"
        );
        vm.hang_up(holder)?;
        let output = vm.wait_end(holder)?;
        ensure!(output.code == 0, "{}", output.err);
        writeln!(table, "| {number} | {kept} | {recovered} |")?;
        counts.push((number as usize, kept, recovered));
    }
    fs::write(vm.dir.join("objects.md"), &table)?;
    let (first, kept, recovered) = counts[0];
    for (number, kept_now, recovered_now) in &counts {
        ensure!(*kept_now == kept, "it depends on their number:\n{table}");
        // Created, backed, filled.
        ensure!(
            *recovered_now == recovered + 3 * (number - first),
            "it is not linear:\n{table}"
        );
    }
    Ok(())
}
