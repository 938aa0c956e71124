// SPDX-License-Identifier: GPL-2.0

//! The driver, or the device, goes away and comes back.

use std::fs;
use std::path::Path;

use anyhow::{
    Context,
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use serde_json::json;
use virtgpu_guest::wire::Report;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::console::Console;
use virtgpu_lab::debugger::Debugger;
use virtgpu_lab::initramfs;
use virtgpu_lab::removal;
use virtgpu_lab::suspend::{
    self,
    Sleep, //
};
use virtgpu_lab::vm::{
    GPU,
    LIMIT,
    Machine,
    Note,
    Program,
    REFERENCE,
    Vm,
    reference_with, //
};

use crate::identity::{
    BIND,
    UNBIND,
    is_built_in,
    is_other_driver, //
};

/// What QEMU's device offers first, and what the reference host does.
const SIZE: (u32, u32) = (1280, 800);
const HOST_SIZE: (u32, u32) = (1024, 768);

const SIGKILL: i32 = 9;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("unplug::unbind", unbind),
        // The C driver takes other steps.
        trial("unplug::probe_fails", probe_fails).with_ignored_flag(is_other_driver()),
        trial("unplug::unload_in_use", unload_in_use).with_ignored_flag(is_built_in()),
        trial("unplug::disabled", disabled).with_ignored_flag(is_built_in()),
        trial("unplug::device_drawing", device_drawing),
        trial("unplug::device_asleep", device_asleep),
        trial("unplug::unanswered", unanswered),
        trial("unplug::no_answer", no_answer).with_ignored_flag(is_other_driver()),
        trial("unplug::fence", fence).with_ignored_flag(is_built_in() || is_other_driver()),
        trial("unplug::surprise", surprise),
        trial("unplug::surprise_asleep::reset", |case| {
            surprise_asleep(case, REFERENCE)
        }),
        trial("unplug::surprise_asleep::no_soft_reset", |case| {
            let device = format!("{REFERENCE},x-pcie-pm-no-soft-reset=on");
            surprise_asleep(case, &device)
        }),
        trial("unplug::surprise_on_the_way", surprise_on_the_way),
        trial("unplug::surprise_config", surprise_config),
        trial("unplug::unnoticed_config", unnoticed_config),
        trial("unplug::never_reset", never_reset),
        trial("unplug::shutdown_is_quiet", shutdown_is_quiet),
        trial("unplug::kexec", kexec),
    ]
}

/// A client with buffers, framebuffers and mappings, none of which is shown.
struct Holder(Program);

impl Holder {
    const BUFFERS: &str = "20";

    fn start(vm: &mut Vm) -> Result<Self> {
        let mark = vm.mark();
        let program = vm.start_program(&["virtgpu-guest", "hold", Self::BUFFERS])?;
        vm.wait_line(program, "holding", mark)?;
        vm.say(program, "fill 77")?;
        vm.wait_line(program, "filled 77", mark)?;
        Ok(Self(program))
    }

    /// Expects that the mappings can still be used.
    fn check(&self, vm: &mut Vm) -> Result<()> {
        let mark = vm.mark();
        vm.say(self.0, "check 77")?;
        vm.wait_line(self.0, "kept 77", mark)?;
        Ok(())
    }

    /// Gives everything up on a device that is gone.
    fn release(self, vm: &mut Vm) -> Result<()> {
        let mark = vm.mark();
        vm.say(self.0, "release")?;
        let errors = vm.wait_line(self.0, "released", mark)?;
        ensure!(
            errors == "No such device (os error 19)",
            "giving up the buffers of a device that is gone: {errors}"
        );
        vm.hang_up(self.0)?;
        vm.wait_end(self.0)?;
        Ok(())
    }

    fn kill(self, vm: &mut Vm) -> Result<()> {
        vm.signal(self.0, SIGKILL)?;
        vm.wait_end(self.0)?;
        Ok(())
    }
}

fn show_something(vm: &mut Vm, seed: u8, size: (u32, u32)) -> Result<()> {
    let client = Client::start(vm, seed, &[size])?;
    let seeds = client.start_flips(vm)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, seed + 1)?;
    client.end(vm)
}

/// The driver is unbound and bound again: with the console, with a client that draws, and with clients that hold what they had for
/// some time longer. Who is told, and who unbinds it, may be on different processors.
fn unbind(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        cpus: 4,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    for round in 1..=3 {
        let mut console = Console::new(vm, 1)?;
        console.write(vm, round, &format!("Round {round}."))?;
        vm.run(UNBIND)?;
        vm.run(BIND)?;
    }
    let mut console = Console::new(vm, 1)?;
    console.write(vm, 3, "It is back.")?;

    let mut earlier: Option<Holder> = None;
    for round in 0..3 {
        let client = Client::start(vm, 10 * round, &[SIZE])?;
        let (one, other) = (Holder::start(vm)?, Holder::start(vm)?);
        client.start_flips(vm)?;
        vm.run(UNBIND)?;
        client.expect_gone(vm)?;
        one.check(vm)?;
        if let Some(earlier) = earlier.take() {
            earlier.kill(vm)?;
        }
        vm.run(BIND)?;
        show_something(vm, 10 * round + 2, SIZE)?;
        other.check(vm)?;
        one.release(vm)?;
        Sleep::S3.cycle(vm)?;
        show_something(vm, 10 * round + 4, SIZE)?;
        earlier = Some(other);
    }
    earlier.context("there were no rounds")?.release(vm)?;
    let mut console = Console::new(vm, 1)?;
    console.write(vm, 3, "It is back again.")
}

/// A step of the probe fails, each in its turn: `bind` says so, nothing is left of the card, and the next probe works. The card is
/// one of the VGA class, from which a probe first of all removes other drivers.
fn probe_fails(case: &mut Case) -> Result<()> {
    const IO_ERROR: i32 = -5;
    const FIRST: &[usize] = &[0];
    /// Functions of the kernel, in the order in which a probe comes to them, and how many calls succeed before each one that fails. The
    /// kernel looks for queues with an interrupt for each, twice, with one for all, and with the one that is no message, until it finds
    /// them: only the last queue fails in each, or the last interrupt.
    const STEPS: [(&str, &[usize]); 16] = [
        ("rust_helper_aperture_remove_conflicting_pci_devices", FIRST),
        // The DRM device.
        ("__drm_dev_alloc", FIRST),
        ("drmm_mode_config_init", FIRST),
        ("drm_universal_plane_init", FIRST),
        ("drm_crtc_init_with_planes", FIRST),
        ("drm_encoder_init", FIRST),
        ("drm_connector_init", FIRST),
        ("drm_connector_attach_encoder", FIRST),
        ("drm_vblank_init", FIRST),
        ("drm_mode_config_create_initial_state", FIRST),
        ("vp_modern_find_vqs", FIRST),
        ("vp_setup_vq", &[1, 1, 1, 1]),
        ("request_threaded_irq", &[2, 2, 1, 0]),
        // The question for the displays.
        ("virtqueue_add_sgs", FIRST),
        ("drm_dev_register", FIRST),
        // A part of it.
        ("drm_modeset_register_all", FIRST),
    ];
    let vm = case.boot(&Machine {
        debugger: true,
        ..Machine::with_gpu("virtio-vga")
    })?;
    // What there is of cards.
    let cards = |vm: &mut Vm| {
        vm.run("ls /dev/dri /sys/class/drm /sys/kernel/debug/dri 2>/dev/null || true")
    };
    for (seed, (step, fails)) in (0..).zip(STEPS) {
        vm.run(UNBIND)?;
        let none = cards(vm)?;
        ensure!(!none.contains("card"), "without a driver there is {none}");
        let mut debugger = Debugger::halt(vm)?;
        let binder = vm.start_program(&["sh", "-c", BIND])?;
        for calls in fails {
            for _ in 0..*calls {
                debugger.run_until(step)?;
                debugger.step()?;
            }
            debugger.return_from(step, IO_ERROR)?;
        }
        debugger.go()?;
        let output = vm.wait_end(binder)?;
        ensure!(
            output.code != 0 && output.err.contains("Input/output error"),
            "{step}: bind ended with {}: {}",
            output.code,
            output.err
        );
        let left = cards(vm)?;
        ensure!(left == none, "{step}: there is still {left}");
        vm.run(BIND)?;
        // The device has the first number, unless an earlier one was never released.
        vm.run("test -e /dev/dri/card0")?;
        show_something(vm, 2 * seed, SIZE).with_context(|| format!("after {step}"))?;
    }
    Ok(())
}

/// A module that somebody uses stays, whether it has a device or not, and goes with its last user. What keeps it is the owner of the
/// file operations.
fn unload_in_use(case: &mut Case) -> Result<()> {
    let module = case.kernel.driver.module();
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let rmmod = format!("rmmod {module}");
    for round in 0..2 {
        vm.run("for console in /sys/class/vtconsole/vtcon[1-9]; do echo 0 > $console/bind; done")?;
        let client = Client::start(vm, 10 * round, &[SIZE])?;
        let holder = Holder::start(vm)?;
        let seeds = client.start_flips(vm)?;
        let output = vm.try_run(&rmmod)?;
        ensure!(output.code != 0, "a module in use was unloaded");
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        client.draw(vm, 10 * round + 1)?;
        client.end(vm)?;
        vm.run(UNBIND)?;
        holder.check(vm)?;
        let output = vm.try_run(&rmmod)?;
        ensure!(output.code != 0, "a module in use was unloaded");
        if round == 0 {
            holder.release(vm)?;
        } else {
            holder.kill(vm)?;
        }
        vm.run(&rmmod)?;
        vm.run("load-driver")?;
        Console::new(vm, 1)?.write(vm, 2, &format!("Round {round}."))?;
        show_something(vm, 10 * round + 2, SIZE)?;
    }
    Ok(())
}

/// A probe that refuses the device leaves it as it was.
fn disabled(case: &mut Case) -> Result<()> {
    let module = case.kernel.driver.module();
    let vm = case.boot_bare(&Machine::with_gpu("virtio-gpu-pci"))?;
    for round in 0..2 {
        vm.run(&format!(
            "for module in $(cat /lib/modules/order); do
                 case $module in */{module}.ko) insmod $module modeset=0 ;; *) insmod $module 2>/dev/null || true ;; esac
             done"
        ))?;
        vm.run("! [ -e /sys/bus/virtio/devices/virtio0/driver ] && ! [ -e /dev/dri/card0 ]")?;
        vm.run(&format!("rmmod {module}"))?;
        vm.run("load-driver")?;
        show_something(vm, 10 * round, SIZE)?;
        vm.run("for console in /sys/class/vtconsole/vtcon[1-9]; do echo 0 > $console/bind; done")?;
        vm.run(&format!("rmmod {module}"))?;
    }
    vm.run("load-driver")?;
    show_something(vm, 100, SIZE)
}

/// A machine whose GPU, that of the reference host, can be taken out, as that of QEMU cannot.
fn pluggable(device: &str) -> Machine {
    Machine {
        devices: vec![
            "pcie-root-port,id=port0".into(),
            format!("{device},id={GPU},bus=port0"),
        ],
        // The kernel has no ACPI hotplug, and does not ask the firmware for the other one.
        append: "pcie_ports=native".into(),
        arguments: vec![
            "-global".into(),
            "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off".into(),
        ],
        host: Machine::on_reference_host(&[]).host,
        ..Machine::behind_root_port("")
    }
}

/// The device is taken out while a client draws and another one holds buffers, and put back in.
fn device_drawing(case: &mut Case) -> Result<()> {
    let vm = case.boot(&pluggable(REFERENCE))?;
    for round in 0..2 {
        let client = Client::start(vm, 10 * round, &[HOST_SIZE])?;
        let (one, other) = (Holder::start(vm)?, Holder::start(vm)?);
        client.start_flips(vm)?;
        vm.unplug()?;
        client.expect_gone(vm)?;
        one.check(vm)?;
        one.release(vm)?;
        vm.plug("port0")?;
        other.check(vm)?;
        show_something(vm, 10 * round + 2, HOST_SIZE)?;
        other.kill(vm)?;
    }
    Ok(())
}

/// The button of the device's slot is pressed while the guest sleeps, which it hears of when it is awake: the device is there for all of
/// resume, and goes then. One that is gone when the guest wakes up is in [`surprise_asleep`]. Not in RAM: when QEMU wakes a machine from
/// that, its slots forget the request.
fn device_asleep(case: &mut Case) -> Result<()> {
    let vm = case.boot(&pluggable(REFERENCE))?;
    for round in 0..2 {
        let client = Client::start(vm, 10 * round, &[HOST_SIZE])?;
        let holder = Holder::start(vm)?;
        client.start_flips(vm)?;
        let sleeper = Sleep::Idle.begin(vm)?;
        let mark = vm.mark();
        vm.monitor("device_del", json!({ "id": GPU }))?;
        sleeper.wake(vm)?;
        vm.wait_unplugged(mark)?;
        client.expect_gone(vm)?;
        holder.check(vm)?;
        holder.release(vm)?;
        vm.plug("port0")?;
        show_something(vm, 10 * round + 2, HOST_SIZE)?;
    }
    Ok(())
}

/// The host does not answer, and clients wait for room in the ring, when the driver is unbound, and when the device is taken out. They are
/// told. Of the first one can see that they do not wait until they have waited long enough; in the second they may, before the guest
/// has seen the button of the slot for 5 s.
fn unanswered(case: &mut Case) -> Result<()> {
    const RING: usize = 16;
    const TOO_LONG: &str = " was not sent: ";
    case.expect_in_log(TOO_LONG);
    let vm = case.boot(&pluggable(&reference_with("vq_size", RING)))?;
    for round in 0..2 {
        let client = Client::start(vm, 10 * round, &[HOST_SIZE])?;
        let holder = Holder::start(vm)?;
        let mark = vm.mark();
        let churner = vm.start_program(&["virtgpu-guest", "churn"])?;
        vm.wait_line(churner, "churning", mark)?;
        client.start_flips(vm)?;
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.control("fault any: no answer")?;
        // From then on there is no room for anything.
        host.wait_faults(RING)?;
        let mark = vm.mark();
        if round == 0 {
            vm.run(UNBIND)?;
        } else {
            vm.unplug()?;
        }
        client.expect_gone(vm)?;
        let output = vm.wait_end(churner)?;
        ensure!(
            output.code != 0 && (round > 0 || output.err.contains("No such device")),
            "who has buffers come and go ended with {}: {}",
            output.code,
            output.err
        );
        holder.check(vm)?;
        holder.release(vm)?;
        let is_late = |note: &Note| matches!(note, Note::Console(line) if line.contains(TOO_LONG));
        ensure!(
            round > 0 || !vm.since(mark).iter().any(is_late),
            "somebody waited until it was too long"
        );
        if round == 0 {
            let host = vm.host()?;
            host.control("clear")?;
            vm.run(BIND)?;
        } else {
            vm.plug("port0")?;
        }
        show_something(vm, 10 * round + 2, HOST_SIZE)?;
    }
    Ok(())
}

/// There is room in the ring, and the driver waits for an answer that the host does not give, when it is unbound, and when the device is
/// pulled out. It gives up because the device is gone, and not because it has waited for too long, which would be in the log.
fn no_answer(case: &mut Case) -> Result<()> {
    let vm = case.boot(&removable(REFERENCE))?;
    for round in 0..2 {
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.control("fault GET_DISPLAY_INFO: no answer")?;
        host.control("hotplug 0 800x600")?;
        host.wait_faults(1)?;
        vm.wait_for_waiters(1)?;
        if round == 0 {
            vm.run(UNBIND)?;
            let host = vm.host()?;
            host.control("clear")?;
            host.control(&format!("hotplug 0 {}x{}", HOST_SIZE.0, HOST_SIZE.1))?;
            vm.run(BIND)?;
        } else {
            until_pulled(vm, removal::pull)?;
            removal::plug(vm)?;
        }
        show_something(vm, 10 * round, HOST_SIZE)?;
    }
    Ok(())
}

/// A flip waits for room in the ring, of a host that does not answer, when the driver is unbound, and when the device is pulled out. Its
/// fence is signalled by that, and then knows neither the driver, which is unloaded, nor the device: it can be asked, and goes last.
fn fence(case: &mut Case) -> Result<()> {
    const RING: usize = 16;
    const PENDING: &str = "0 virtio_gpu CRTC:";
    const SIGNALLED: &str = "1 detached-driver signaled-timeline";
    let module = case.kernel.driver.module();
    let vm = case.boot(&Machine {
        // No console, which would wait for room, too, and be told that it has waited for too long.
        append: "pcie_ports=native drm_client_lib.active=".into(),
        ..removable(&reference_with("vq_size", RING))
    })?;
    for round in 0..2 {
        let client = Client::start(vm, 10 * round, &[HOST_SIZE])?;
        let mark = vm.mark();
        let churner = vm.start_program(&["virtgpu-guest", "churn"])?;
        vm.wait_line(churner, "churning", mark)?;
        let host = vm.host()?;
        host.control("reset-counters")?;
        host.control("fault any: no answer")?;
        host.wait_faults(RING)?;
        let (fence, info) = client.flip_with_fence(vm, 10 * round + 1)?;
        ensure!(
            info.starts_with(PENDING),
            "the fence of a flip that waits: {info}"
        );
        // The one who has buffers come and go, and the flip.
        vm.wait_for_waiters(2)?;
        let mark = fence.start_to_wait(vm)?;
        match round {
            0 => vm.run(UNBIND).map(drop)?,
            _ => until_pulled(vm, removal::pull)?,
        }
        let info = fence.signalled(vm, mark)?;
        ensure!(
            info == SIGNALLED,
            "the fence of a flip that is over: {info}"
        );
        loses_device(vm, churner)?;
        fence.close_card(vm)?;
        vm.run(&format!("rmmod {module}"))?;
        let info = fence.ask(vm)?;
        ensure!(info == SIGNALLED, "without the driver: {info}");
        fence.end(vm)?;
        if round == 0 {
            vm.host()?.control("clear")?;
            vm.run("load-driver")?;
        } else {
            vm.run("load-driver")?;
            removal::plug(vm)?;
        }
        show_something(vm, 10 * round + 2, HOST_SIZE)?;
    }
    Ok(())
}

/// Waits for the end of who has buffers come and go, which is that there is no device any more.
fn loses_device(vm: &mut Vm, churner: Program) -> Result<()> {
    let output = vm.wait_end(churner)?;
    ensure!(
        output.code != 0 && output.err.contains("No such device"),
        "who has buffers come and go ended with {}: {}",
        output.code,
        output.err
    );
    Ok(())
}

/// A machine whose GPU, that of the reference host, can be pulled out: the guest is not asked, and reads all ones from then on.
fn removable(device: &str) -> Machine {
    let mut machine = pluggable(device);
    machine.devices[0] += &format!(",{}", removal::PORT_PROPERTIES);
    Machine {
        removable: true,
        ..machine
    }
}

/// What the kernel says of a device that it finds gone.
const PULLED: &str = "Card not present";

/// What it says of a device that does not finish a reset.
const STUCK: &str = "device does not reset, taking away its bus mastering";

/// What the driver says of a device that is gone when it wants it back.
const LOST: &str = "*ERROR* the device did not come back";

/// Has the device pulled out by `act`, and waits until the guest has no card any more.
fn until_pulled(vm: &mut Vm, act: impl FnOnce(&mut Vm) -> Result<()>) -> Result<()> {
    let mark = vm.mark();
    vm.until_uevent("/drm/card", "ACTION=remove", act)?;
    vm.wait_console(PULLED, mark)
}

/// The device is pulled out while one client flips, one has buffers come and go, and others hold some. They are told at once.
fn surprise(case: &mut Case) -> Result<()> {
    let vm = case.boot(&removable(REFERENCE))?;
    for round in 0..2 {
        let client = Client::start(vm, 10 * round, &[HOST_SIZE])?;
        let (one, other) = (Holder::start(vm)?, Holder::start(vm)?);
        let mark = vm.mark();
        let churner = vm.start_program(&["virtgpu-guest", "churn"])?;
        vm.wait_line(churner, "churning", mark)?;
        client.start_flips(vm)?;
        until_pulled(vm, removal::pull)?;
        client.expect_gone(vm)?;
        loses_device(vm, churner)?;
        one.check(vm)?;
        one.release(vm)?;
        removal::plug(vm)?;
        other.check(vm)?;
        show_something(vm, 10 * round + 2, HOST_SIZE)?;
        Sleep::Idle.cycle(vm)?;
        show_something(vm, 10 * round + 4, HOST_SIZE)?;
        other.kill(vm)?;
    }
    Ok(())
}

/// The device is pulled out while the guest sleeps: there is none when the guest wakes up. That is sleep to idle: for S3, QEMU resets the
/// bridge as whose memory the device's registers are laid over, and they are back.
fn surprise_asleep(case: &mut Case, device: &str) -> Result<()> {
    case.expect_in_log(LOST);
    let vm = case.boot(&removable(device))?;
    for round in 0..2 {
        let client = Client::start(vm, 10 * round, &[HOST_SIZE])?;
        let holder = Holder::start(vm)?;
        client.start_flips(vm)?;
        until_pulled(vm, |vm| {
            let sleeper = Sleep::Idle.begin(vm)?;
            removal::pull(vm)?;
            sleeper.wake(vm)
        })?;
        client.expect_gone(vm)?;
        holder.check(vm)?;
        holder.release(vm)?;
        removal::plug(vm)?;
        show_something(vm, 10 * round + 2, HOST_SIZE)?;
    }
    Ok(())
}

/// The device is pulled out when the guest comes to a function of its kernel on its way to sleep or back.
fn surprise_on_the_way(case: &mut Case) -> Result<()> {
    const MOMENTS: [&str; 3] = [
        // The driver is about to turn the display off, which it does first.
        "drm_atomic_helper_suspend",
        // It has done what it has to tell the host, and the device is about to be reset.
        "virtio_device_freeze",
        "virtio_device_restore",
    ];
    case.expect_in_log(LOST);
    let vm = case.boot(&Machine {
        debugger: true,
        ..removable(REFERENCE)
    })?;
    for (seed, moment) in (0..).zip(MOMENTS) {
        let client = Client::start(vm, 10 * seed, &[HOST_SIZE])?;
        let holder = Holder::start(vm)?;
        client.start_flips(vm)?;
        let pulled = until_pulled(vm, |vm| {
            let mut debugger = Debugger::halt(vm)?;
            let sleeper = vm.start_program(&["sh", "-c", suspend::DEVICES])?;
            debugger.run_until(moment)?;
            removal::pull(vm)?;
            debugger.go()?;
            vm.wait_end(sleeper).map(drop)
        });
        pulled.with_context(|| format!("at {moment}"))?;
        client.expect_gone(vm)?;
        holder.check(vm)?;
        holder.release(vm)?;
        removal::plug(vm)?;
        show_something(vm, 10 * seed + 2, HOST_SIZE)?;
    }
    Ok(())
}

/// The device has another display to tell of, and is pulled out when the guest hears of that, or looks: all ones are no event, and
/// nobody is told of displays of a device that is gone.
fn surprise_config(case: &mut Case) -> Result<()> {
    const MOMENTS: [&str; 2] = ["virtio_config_changed", "vp_get"];
    let vm = case.boot(&Machine {
        debugger: true,
        ..removable(REFERENCE)
    })?;
    for (seed, moment) in (0..).zip(MOMENTS) {
        let client = Client::start(vm, 10 * seed, &[HOST_SIZE])?;
        client.start_flips(vm)?;
        let mark = vm.mark();
        let listener = vm.start_program(&["virtgpu-guest", "uevents"])?;
        vm.wait_line(listener, "listening", mark)?;
        let pulled = until_pulled(vm, |vm| {
            let mut debugger = Debugger::halt(vm)?;
            vm.host()?.control("hotplug 0 800x600")?;
            debugger.run_until(moment)?;
            removal::pull(vm)?;
            debugger.go()
        });
        pulled.with_context(|| format!("at {moment}"))?;
        client.expect_gone(vm)?;
        let mut told = false;
        vm.wait("the function to be removed", mark, LIMIT, |note| {
            let text = uevent(listener, note)?;
            told |= text.contains("HOTPLUG=1");
            (text.contains("ACTION=remove") && text.contains("SUBSYSTEM=pci")).then_some(())
        })?;
        ensure!(!told, "{moment}: somebody was told of displays");
        vm.signal(listener, SIGKILL)?;
        vm.wait_end(listener)?;
        removal::plug(vm)?;
        show_something(vm, 10 * seed + 2, HOST_SIZE)?;
    }
    Ok(())
}

/// The device has another display to tell of, and is away when the guest looks, which nothing tells the guest's kernel for long enough
/// to wait in vain for an answer. All ones are no event; what it has to tell is heard when it is back.
fn unnoticed_config(case: &mut Case) -> Result<()> {
    const READ: &str = "vp_get";
    let vm = case.boot(&Machine {
        debugger: true,
        ..removable(REFERENCE)
    })?;
    let client = Client::start(vm, 0, &[HOST_SIZE])?;
    for seed in 1..=2 {
        let mark = vm.mark();
        let listener = vm.start_program(&["virtgpu-guest", "uevents"])?;
        vm.wait_line(listener, "listening", mark)?;
        let mut debugger = Debugger::halt(vm)?;
        vm.host()?.control("hotplug 0 800x600")?;
        debugger.run_until(READ)?;
        removal::cover(vm)?;
        // The guest does not look again before it has done what came of the last time, and has told user space before the time after that.
        for _ in 0..2 {
            vm.host()?.control("config-change")?;
            debugger.step()?;
            debugger.run_until(READ)?;
        }
        removal::uncover(vm)?;
        debugger.go()?;

        let mut told = 0;
        vm.wait("news of displays", mark, LIMIT, |note| {
            uevent(listener, note)?.contains("HOTPLUG=1").then_some(())
        })?;
        // What comes before an event of our own is all there was.
        vm.run("echo change > /sys/class/drm/card0/uevent")?;
        vm.wait("an event of our own", mark, LIMIT, |note| {
            let text = uevent(listener, note)?;
            told += u32::from(text.contains("HOTPLUG=1"));
            text.contains("SYNTH_UUID=").then_some(())
        })?;
        ensure!(
            told == 1,
            "user space was told of displays {told} times, not once"
        );
        vm.signal(listener, SIGKILL)?;
        vm.wait_end(listener)?;
        client.draw(vm, seed)?;
    }
    client.end(vm)
}

/// What `listener`, which is `virtgpu-guest uevents`, has said in `note`.
fn uevent(listener: Program, note: &Note) -> Option<&str> {
    match note {
        Note::Agent(Report::Out { id, text }) if listener.is(*id) => Some(text),
        _ => None,
    }
}

/// Expects that the kernel has said something so many times in all.
fn expect_said(vm: &mut Vm, text: &str, times: u32) -> Result<()> {
    let said = vm.run(&format!("dmesg | grep -cF '{text}' || true"))?;
    let said: u32 = said.trim().parse()?;
    ensure!(
        said == times,
        "'{text}' was said {said} times instead of {times}"
    );
    Ok(())
}

/// The GPU's function.
const FUNCTION: &str = "/sys/bus/pci/devices/0000:01:00.0";

/// Has the PCI driver let go of it, and take it again.
const UNBIND_FUNCTION: &str = "echo 0000:01:00.0 > /sys/bus/pci/drivers/virtio-pci/unbind";
const BIND_FUNCTION: &str = "echo 0000:01:00.0 > /sys/bus/pci/drivers/virtio-pci/bind";

/// A device never finishes a reset: when the driver is unbound, when the guest goes to sleep and wakes up, and when the device is
/// probed. All of that ends, and says why; and when the device has come to its senses, all is as before.
fn never_reset(case: &mut Case) -> Result<()> {
    const UNHEARD: &str = "*ERROR* the host does not answer, suspending all the same";
    for text in [LOST, UNHEARD] {
        case.expect_in_log(text);
    }
    let vm = case.boot(&removable(REFERENCE))?;

    let client = Client::start(vm, 0, &[HOST_SIZE])?;
    client.start_flips(vm)?;
    removal::cover(vm)?;
    vm.run(UNBIND)?;
    expect_said(vm, STUCK, 1)?;
    ensure!(!reaches_memory(vm)?, "what it knew is free");
    client.expect_gone(vm)?;
    // It is known by now, and not waited for again.
    let output = vm.try_run(BIND)?;
    ensure!(output.code != 0, "a dead device was bound");
    expect_said(vm, STUCK, 1)?;
    removal::uncover(vm)?;
    vm.run(BIND)?;
    ensure!(reaches_memory(vm)?, "it has been reset");
    show_something(vm, 10, HOST_SIZE)?;

    let client = Client::start(vm, 20, &[HOST_SIZE])?;
    removal::cover(vm)?;
    suspend::test_devices(vm)?;
    // On the way down and on the way back.
    expect_said(vm, STUCK, 3)?;
    expect_said(vm, LOST, 1)?;
    ensure!(!reaches_memory(vm)?, "what it knew is free");
    removal::uncover(vm)?;
    suspend::test_devices(vm)?;
    ensure!(reaches_memory(vm)?, "it has been reset");
    client.expect(vm, 20)?;
    client.draw(vm, 21)?;
    client.end(vm)?;

    vm.run(UNBIND_FUNCTION)?;
    removal::cover(vm)?;
    // Left behind by somebody who had the function before.
    vm.run(&format!(
        "printf '\\006' | dd of={FUNCTION}/config bs=1 seek=4 conv=notrunc"
    ))?;
    ensure!(reaches_memory(vm)?, "nobody takes that away yet");
    let binder = vm.start_program(&["sh", "-c", BIND_FUNCTION])?;
    vm.run("until grep -q virtio-pci-modern /proc/iomem; do :; done")?;
    expect_said(vm, STUCK, 3)?;
    ensure!(!reaches_memory(vm)?, "it has not been reset");
    vm.wait_end(binder)?;
    expect_said(vm, STUCK, 4)?;
    ensure!(!reaches_memory(vm)?, "it has not been reset");
    vm.run("! [ -e /dev/dri/card0 ]")?;
    removal::uncover(vm)?;
    vm.run(UNBIND_FUNCTION)?;
    vm.run(BIND_FUNCTION)?;
    expect_said(vm, STUCK, 4)?;
    show_something(vm, 30, HOST_SIZE)
}

/// Whether the GPU's function is a bus master.
fn reaches_memory(vm: &mut Vm) -> Result<bool> {
    const MASTER: u16 = 1 << 2;
    let command = vm.run(&format!("od -An -tx2 -j4 -N2 {FUNCTION}/config"))?;
    let command = u16::from_str_radix(command.trim(), 16).with_context(|| command.clone())?;
    Ok(command & MASTER != 0)
}

/// Returns what the driver last wrote to the status register of the machine's only virtio device.
fn device_status(vm: &Vm) -> Result<String> {
    let log = fs::read_to_string(vm.dir.join("qemu.log"))?;
    let mut lines = log.lines().rev();
    let last = lines.find_map(|line| {
        line.strip_prefix("virtio_set_status ")?
            .split("val ")
            .nth(1)
    });
    Ok(last.context("the status was never written")?.to_owned())
}

/// A kernel that ends leaves a device that has been reset: whatever comes after it finds it quiet. Not that it was cut off from
/// memory: the driver resets it.
fn shutdown_is_quiet(case: &mut Case) -> Result<()> {
    const IN_USE: &str = "15";
    const RESET: &str = "0";
    let vm = case.boot(&Machine {
        arguments: ["-trace", "virtio_set_status"].map(String::from).into(),
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    client.start_flips(vm)?;
    let status = device_status(vm)?;
    ensure!(status == IN_USE, "the device in use has status {status}");
    let mark = vm.mark();
    vm.start_program(&["halt", "-f"])?;
    vm.wait_console("System halted", mark)?;
    let status = device_status(vm)?;
    ensure!(
        status == RESET,
        "the device of a kernel that has ended has status {status}"
    );
    case.switch_off();
    Ok(())
}

/// A kernel starts another one, while a client flips. The device has been reset by then, and does nothing until that one finds it, and
/// shows its pictures.
fn kexec(case: &mut Case) -> Result<()> {
    const RESET: &str = "val 0";
    const FOUND: &str = "val 1";
    const STATUS: &str = "virtio_set_status";
    const NOTIFICATIONS: [&str; 2] = ["virtio_queue_notify", "virtio_notify"];
    const COMMANDS: &str = "virtio_gpu_cmd";
    let initramfs = initramfs::make(&case.kernel, &[])?;
    let image = case.kernel.image.clone();
    let mut arguments = Vec::new();
    for event in NOTIFICATIONS.into_iter().chain([STATUS]) {
        arguments.extend(["-trace".into(), event.into()]);
    }
    let load = format!(
        "kexec --kexec-file-syscall --load /bin/{} --initrd=/bin/{} --reuse-cmdline",
        file_name(&image)?,
        file_name(&initramfs)?
    );
    let vm = case.boot(&Machine {
        programs: vec!["/usr/sbin/kexec".into(), image, initramfs],
        arguments,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    vm.run(&load)?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let seeds = client.start_flips(vm)?;
    client.expect_flips(vm, seeds)?;
    let before = fs::read(vm.dir.join("qemu.log"))?.len();
    let mark = vm.mark();
    vm.start_program(&["kexec", "--exec"])?;
    vm.wait_next_kernel(mark)?;
    show_something(vm, 10, SIZE)?;

    let log = fs::read(vm.dir.join("qemu.log"))?;
    let log = String::from_utf8_lossy(&log[before..]).into_owned();
    let is_status = |line: &&str| line.starts_with(STATUS);
    let mut lines = log.lines().skip_while(|line| !is_status(line));
    let first = lines.next().context("the status was not written")?;
    ensure!(
        first.ends_with(RESET),
        "the device was not reset before it was cut off: {first}"
    );
    let until_found = lines.take_while(|line| !(is_status(line) && line.ends_with(FOUND)));
    let mut busy = until_found.filter(|line| {
        let mut events = NOTIFICATIONS.into_iter().chain([COMMANDS]);
        events.any(|event| line.starts_with(event))
    });
    let first = busy.next();
    ensure!(
        first.is_none(),
        "the device is busy between the kernels: {first:?}"
    );
    Sleep::S3.cycle(vm)?;
    show_something(vm, 20, SIZE)
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().context("it is no file")?;
    Ok(name.to_string_lossy().into_owned())
}
