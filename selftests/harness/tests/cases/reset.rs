// SPDX-License-Identifier: GPL-2.0

//! A device that is reset while everybody is awake comes back, with its picture.

use anyhow::{
    Context,
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use virtgpu_guest::wire::Report;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::debugger::Debugger;
use virtgpu_lab::screen;
use virtgpu_lab::suspend::{
    self,
    Sleep, //
};
use virtgpu_lab::vm::{
    GPU,
    LIMIT,
    Machine,
    Mark,
    Note,
    Program,
    REFERENCE,
    Vm,
    reference_with, //
};

use crate::identity::is_other_driver;

/// How often each guest's GPU is reset.
const TIMES: u8 = 3;

const SIZE: (u32, u32) = (1280, 800);
const REFERENCE_SIZE: (u32, u32) = (1024, 768);

pub fn trials() -> Vec<Trial> {
    let hostile = hostile_trials().into_iter();
    let hostile = hostile.map(|trial| trial.with_ignored_flag(is_other_driver()));
    other_trials().into_iter().chain(hostile).collect()
}

/// On hosts that break the rules.
fn hostile_trials() -> Vec<Trial> {
    vec![
        trial("reset::broken_queue::still", |case| {
            broken_queue(case, false)
        }),
        trial("reset::broken_queue::flips", |case| {
            broken_queue(case, true)
        }),
        trial("reset::broken_queue::always", always_broken),
        trial("reset::broken_queue::slowly", slowly),
        trial("reset::broken_queue::hotplug", broken_by_hotplug),
        trial("reset::broken_queue::notify", not_notified),
        trial("reset::broken_queue::suspend", |case| {
            broken_on_the_way(case, &Machine::on_reference_host(&["--freezing", "off"]))
        }),
        trial("reset::broken_queue::no_soft_reset", |case| {
            broken_on_the_way(
                case,
                &Machine {
                    host: Some(vec!["--freezing".into(), "off".into()]),
                    ..Machine::behind_root_port(&format!("{REFERENCE},x-pcie-pm-no-soft-reset=on"))
                },
            )
        }),
        trial("reset::mute::event_idx", |case| {
            mute(case, "edid,indirect,event-idx")
        }),
        trial("reset::mute::no_event_idx", |case| {
            mute(case, "edid,indirect")
        }),
    ]
}

fn other_trials() -> Vec<Trial> {
    vec![
        trial("reset::function::still", |case| {
            let vm = case.boot(&Machine::behind_root_port("virtio-gpu-pci"))?;
            let client = Client::start(vm, 0, &[SIZE])?;
            for time in 1..=TIMES {
                let before = screen::dump(vm, 0)?;
                ensure!(!screen::is_black(&before), "the screen is black before");
                reset(vm)?;
                screen::expect(vm, 0, "the picture before the reset", &before)?;
                client.expect(vm, time - 1)?;
                client.draw(vm, time)?;
            }
            client.end(vm)
        }),
        trial("reset::needs_reset", needs_reset),
        trial("reset::not_shown", not_shown),
        trial("reset::function::enabled_twice", enabled_twice),
        trial("reset::failed::enable", |case| {
            failed(case, "pci_enable_device")
        }),
        trial("reset::failed::virtio", |case| {
            failed(case, "virtio_device_reset_done")
        }),
        trial("reset::failed::restore", failed_restore),
        trial("reset::failed::memory", failed_memory),
        trial("reset::wedged::suspend", |case| {
            wedged(case, |vm| Sleep::S3.cycle(vm))
        }),
        trial("reset::wedged::function", |case| wedged(case, reset)),
        trial("reset::wedged::rebind", wedged_rebind),
        trial("reset::function::flips", |case| {
            let vm = case.boot(&Machine::behind_root_port("virtio-gpu-pci"))?;
            let client = Client::start(vm, 0, &[SIZE])?;
            for time in 1..=TIMES {
                let seeds = client.start_flips(vm)?;
                reset(vm)?;
                client.expect_flips(vm, seeds)?;
                client.stop_flips(vm)?;
                client.draw(vm, time)?;
            }
            client.end(vm)
        }),
    ]
}

/// A host that does not answer any more: the ring fills up, and who waits for room gives up after a while. A reset helps.
///
/// It is told of each command once at the most: with an event index the device says so, without, the driver has to know.
fn mute(case: &mut Case, features: &str) -> Result<()> {
    const RING: usize = 16;
    const TOO_LONG: &str = " was not sent: ";
    case.expect_in_log(TOO_LONG);
    case.expect_in_log("*ERROR* the host did not answer");
    let device = reference_with("vq_size", RING);
    let vm = case.boot(&Machine {
        host: Machine::on_reference_host(&["--features", features]).host,
        ..Machine::behind_root_port(&device)
    })?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE])?;
    let seeds = client.start_flips(vm)?;
    let mark = vm.mark();
    control(vm, "reset-counters")?;
    control(vm, "fault any: no answer")?;
    vm.host()?.wait_faults(RING)?;
    vm.wait_console(TOO_LONG, mark)?;
    let counters = vm.host()?.control("counters")?;
    let counters = counters.as_object().context("no counters")?;
    let count = |of: &dyn Fn(&str) -> bool| -> u64 {
        let counts = counters.iter().filter(|(name, _)| of(name));
        counts.filter_map(|(_, count)| count.as_u64()).sum()
    };
    let kicks = count(&|name| name.starts_with("kicks_"));
    // Commands have names in capitals. One may have come just before the counters were reset, and its notification after.
    let commands = count(&|name| name.starts_with(|letter: char| letter.is_ascii_uppercase()));
    ensure!(
        commands >= RING as u64 && kicks <= commands + 1,
        "the host was told of {commands} commands {kicks} times"
    );
    control(vm, "clear")?;
    reset(vm)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 1)?;
    client.end(vm)
}

/// A host that gives back a buffer which it did not have is reset, and everything goes on.
fn broken_queue(case: &mut Case, flips: bool) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE])?;
    let mark = vm.mark();
    let seeds = match flips {
        true => Some(client.start_flips(vm)?),
        false => None,
    };
    control(vm, "fault 1st RESOURCE_FLUSH: bad descriptor id")?;
    match seeds {
        Some(seeds) => {
            vm.wait_console("resources recovered", mark)?;
            client.expect_flips(vm, seeds)?;
            client.stop_flips(vm)?;
        }
        None => {
            client.draw(vm, 1)?;
            vm.wait_console("resources recovered", mark)?;
            client.expect(vm, 1)?;
        }
    }
    client.draw(vm, 2)?;
    client.end(vm)
}

/// A host that breaks its queue when it is asked for a new display is reset, while the console already wants to be seen there.
fn broken_by_hotplug(case: &mut Case) -> Result<()> {
    let options = ["--display", "1024x768", "--display", "off"];
    let vm = case.boot(&Machine::on_reference_host(&options))?;
    let mark = vm.mark();
    control(vm, "fault 1st GET_EDID: bad descriptor id")?;
    control(vm, "hotplug 1 1024x768")?;
    vm.wait_console("resources recovered", mark)?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE, REFERENCE_SIZE])?;
    client.draw(vm, 1)?;
    client.end(vm)
}

/// A transport that cannot notify the device breaks the queue, and nobody is interrupted for that. The device is reset all the same.
fn not_notified(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        debugger: true,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let mark = vm.mark();
    let seeds = client.start_flips(vm)?;
    let mut debugger = Debugger::halt(vm)?;
    debugger.return_from("vp_notify", 0)?;
    debugger.go()?;
    vm.wait_console("resources recovered", mark)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

/// Recovery takes longer than the host may take for an answer, and what is drawn meanwhile appears.
fn slowly(case: &mut Case) -> Result<()> {
    const BUFFERS: usize = 88;
    const RING: usize = 16;
    let device = reference_with("vq_size", RING);
    let vm = case.boot(&Machine {
        devices: vec![format!("{device},id={GPU}")],
        ..Machine::on_reference_host(&[])
    })?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE])?;
    let mark = vm.mark();
    let holder = vm.start_program(&["virtgpu-guest", "hold", &BUFFERS.to_string()])?;
    vm.wait_line(holder, "holding", mark)?;
    // Six seconds: as many at a time as the ring holds. The driver gives a host five for an answer.
    control(vm, "reset-counters")?;
    control(vm, "fault RESOURCE_ATTACH_BACKING: answer after 1 s")?;
    control(vm, "fault 1st RESOURCE_FLUSH: bad descriptor id")?;
    client.draw_unseen(vm, 1)?;
    vm.wait_console("the device does not work", mark)?;
    client.draw(vm, 2)?;
    vm.wait_console("resources recovered", mark)?;
    let faults = vm.host()?.faults()?;
    ensure!(faults > BUFFERS, "the host was slow {faults} times only");
    vm.hang_up(holder)?;
    vm.wait_end(holder)?;
    client.end(vm)
}

/// The queue breaks while the guest goes down, and while it comes back, which nobody waits for.
fn broken_on_the_way(case: &mut Case, machine: &Machine) -> Result<()> {
    let vm = case.boot(machine)?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE])?;
    for (seed, fault) in (0..).zip([
        // When the display is turned off.
        "1st SET_SCANOUT",
        // When its resources are there again.
        "1st GET_DISPLAY_INFO",
        "1st GET_EDID",
    ]) {
        control(vm, "reset-counters")?;
        control(vm, &format!("fault {fault}: bad descriptor id"))?;
        Sleep::S3.cycle(vm)?;
        vm.host()?.wait_faults(1)?;
        client.expect(vm, seed)?;
        client.draw(vm, seed + 1)?;
    }
    client.end(vm)
}

/// Gets at the common configuration of QEMU's device, which is in BAR 4, through the capability that gives access to BARs, at `at`: at
/// 8 it has the place, at 12 the length, and at 16 what is there.
pub const COMMON_CONFIG: &str = r#"
config=/sys/class/drm/card0/device/config
byte() { od -A n -t u1 -j $1 -N 1 $config | tr -d ' '; }
put() { printf "$2" | dd of=$config bs=1 seek=$1 conv=notrunc 2>/dev/null; }
at=$(byte 52)
until [ $(byte $at) = 9 ] && [ $(byte $((at + 3))) = 5 ]; do
	at=$(byte $((at + 1)))
	[ $at != 0 ] || exit 1
done
put $((at + 4)) '\004'
"#;

/// Has QEMU's device find a fault in the driver, upon which it asks to be reset: 2 is no value for `queue_enable`.
const PROVOKE: &str = r#"
put $((at + 8)) '\034\0\0\0'
put $((at + 12)) '\002\0\0\0'
put $((at + 16)) '\002'
"#;

/// A device that asks to be reset is, and everything goes on. Who flips, and who resets it, may be on different processors.
fn needs_reset(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        cpus: 4,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for time in 1..=TIMES {
        let seeds = client.start_flips(vm)?;
        let mark = vm.mark();
        vm.run(&format!("{COMMON_CONFIG}{PROVOKE}"))?;
        vm.wait_console("the device does not work", mark)?;
        vm.wait_console("resources recovered", mark)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        client.draw(vm, time)?;
    }
    client.end(vm)
}

/// Suspends a guest whose host falls silent while it is recovered, and is given up.
fn wedge(case: &mut Case) -> Result<(&mut Vm, Client)> {
    case.expect_in_log("*ERROR* the device did not come back");
    let vm = case.boot(&Machine {
        host: Some(vec!["--freezing".into(), "off".into()]),
        ..Machine::behind_root_port(REFERENCE)
    })?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE])?;
    let mark = vm.mark();
    let listener = vm.start_program(&["virtgpu-guest", "uevents"])?;
    vm.wait_line(listener, "listening", mark)?;
    control(vm, "fault RESOURCE_ATTACH_BACKING: no answer")?;
    Sleep::S3.cycle(vm)?;
    expect_wedged(vm, listener, mark)?;
    // What is drawn now does not reach the screen, but whoever draws is not kept waiting.
    client.draw_unseen(vm, 1)?;
    control(vm, "clear")?;
    Ok((vm, client))
}

/// A wedged device comes back when something resets it, with the last picture.
fn wedged(case: &mut Case, way_back: impl Fn(&mut Vm) -> Result<()>) -> Result<()> {
    let (vm, client) = wedge(case)?;
    way_back(vm)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

fn wedged_rebind(case: &mut Case) -> Result<()> {
    let (vm, client) = wedge(case)?;
    client.end(vm)?;
    vm.run(
        "cd /sys/bus/virtio/drivers/virtio_gpu && device=$(echo virtio*) && \
         echo $device > unbind && echo $device > bind",
    )?;
    let client = Client::start(vm, 2, &[REFERENCE_SIZE])?;
    client.draw(vm, 3)?;
    client.end(vm)
}

/// An administrator has enabled the function, too, so that it is not disabled by its driver.
fn enabled_twice(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::behind_root_port("virtio-gpu-pci"))?;
    vm.run(
        "cd /sys/class/drm/card0/device && function=$(basename $(readlink -f .)) && cd /sys/bus/pci && \
         echo $function > drivers/virtio-pci/unbind && echo 1 > devices/$function/enable && \
         echo $function > drivers/virtio-pci/bind",
    )?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for time in 1..=TIMES {
        reset(vm)?;
        client.expect(vm, time - 1)?;
        client.draw(vm, time)?;
    }
    client.end(vm)
}

/// What recovery has to say of the screen cannot be mapped for the device. All of the picture is shown when a little of it is drawn.
fn not_shown(case: &mut Case) -> Result<()> {
    const ENOMEM: i32 = 12;
    case.expect_in_log("*ERROR* reset, 1 commands to recover ");
    let vm = case.boot(&Machine {
        debugger: true,
        ..Machine::behind_root_port("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for seed in 1..=TIMES {
        let mut debugger = Debugger::halt(vm)?;
        let mark = vm.mark();
        let writer = vm.start_program(&["sh", "-c", RESET])?;
        debugger.return_from("virtqueue_add_sgs", -ENOMEM)?;
        debugger.go()?;
        vm.wait_end(writer)?;
        vm.wait_console("reset, 1 commands to recover ", mark)?;
        client.draw_and_show_part(vm, seed, [0, 0, 16, 8])?;
        client.expect(vm, seed)?;
    }
    client.end(vm)
}

/// The function is reset, and something fails before the driver is told: `function` of the kernel. The next reset brings it back.
fn failed(case: &mut Case, function: &str) -> Result<()> {
    case.expect_in_log("*ERROR* the device did not come back");
    let vm = case.boot(&Machine {
        debugger: true,
        ..Machine::behind_root_port("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let mark = vm.mark();
    let listener = vm.start_program(&["virtgpu-guest", "uevents"])?;
    vm.wait_line(listener, "listening", mark)?;
    let mut debugger = Debugger::halt(vm)?;
    let mark = vm.mark();
    let writer = vm.start_program(&["sh", "-c", RESET])?;
    debugger.return_from(function, -5)?;
    debugger.go()?;
    vm.wait_end(writer)?;
    vm.wait_console("Reset done failure: -5", mark)?;
    expect_wedged(vm, listener, mark)?;
    client.draw_unseen(vm, 1)?;
    reset(vm)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

/// The virtio core fails to restore the device, and the driver, whose turn comes later, does it by itself. It hears of all that the
/// device has to say then.
fn failed_restore(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        debugger: true,
        windows: 1,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for time in 1..=TIMES {
        let mut debugger = Debugger::halt(vm)?;
        let mark = vm.mark();
        let writer = vm.start_program(&["sh", "-c", suspend::DEVICES])?;
        debugger.return_from("virtio_device_restore", -5)?;
        debugger.go()?;
        vm.wait_end(writer)?;
        vm.wait_console("pci_pm_resume returns -5", mark)?;
        vm.wait_console("resources recovered", mark)?;
        client.expect(vm, time - 1)?;
        client.draw(vm, time)?;
        vm.resize_window(0, 800 + 8 * u16::from(time), 600)?;
    }
    client.end(vm)
}

/// There is no memory for anything but the first command when the resources are recovered, and some when they are shown.
fn failed_memory(case: &mut Case) -> Result<()> {
    const NO_MEMORY: i32 = -12;
    /// Two of the client's and one of the console's.
    const RESOURCES: usize = 3;
    case.expect_in_log("*ERROR* resumed, 4 commands to recover");
    let vm = case.boot(&Machine {
        debugger: true,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    for time in 1..=TIMES {
        let mut debugger = Debugger::halt(vm)?;
        let mark = vm.mark();
        let writer = vm.start_program(&["sh", "-c", suspend::DEVICES])?;
        // What is on the screen is created, but not given its backing. Then it is the turn of each resource.
        debugger.run_until("virtio_device_restore")?;
        debugger.run_until("virtqueue_add_sgs")?;
        debugger.step()?;
        for _ in 0..1 + RESOURCES {
            debugger.return_from("virtqueue_add_sgs", NO_MEMORY)?;
        }
        debugger.go()?;
        vm.wait_end(writer)?;
        vm.wait_console("4 commands to recover 3 resources", mark)?;
        client.expect(vm, time - 1)?;
        client.draw(vm, time)?;
    }
    client.end(vm)
}

fn expect_wedged(vm: &mut Vm, listener: Program, mark: Mark) -> Result<()> {
    vm.wait_console("the device did not come back", mark)?;
    vm.wait(
        "the event of a wedged device",
        mark,
        LIMIT,
        |note| match note {
            Note::Agent(Report::Out { id, text }) if listener.is(*id) => {
                text.contains("WEDGED=rebind,bus-reset").then_some(())
            }
            _ => None,
        },
    )
}

/// A host that breaks its queue again and again is given up, and taken up again when somebody has it reset.
fn always_broken(case: &mut Case) -> Result<()> {
    case.expect_in_log("*ERROR* the device did not come back");
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 0, &[REFERENCE_SIZE])?;
    let mark = vm.mark();
    let listener = vm.start_program(&["virtgpu-guest", "uevents"])?;
    vm.wait_line(listener, "listening", mark)?;
    control(vm, "fault TRANSFER_TO_HOST_2D: bad descriptor id")?;
    // What is drawn now does not reach the screen, but whoever draws is not kept waiting.
    client.draw_unseen(vm, 1)?;
    expect_wedged(vm, listener, mark)?;
    client.draw_unseen(vm, 2)?;
    control(vm, "clear")?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 2)?;
    client.draw(vm, 3)?;
    client.end(vm)
}

fn control(vm: &Vm, line: &str) -> Result<()> {
    vm.host()?.control(line).map(drop)
}

const RESET: &str = "cd /sys/class/drm/card0/device && echo flr > reset_method && echo 1 > reset";

/// Resets the GPU's PCI function as an administrator would.
fn reset(vm: &mut Vm) -> Result<()> {
    let mark = vm.mark();
    vm.run(RESET)?;
    vm.wait_console("resources recovered", mark)
}
