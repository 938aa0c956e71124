// SPDX-License-Identifier: GPL-2.0

//! What must be refused: by the driver from user space, and from the host.

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
use virtgpu_lab::logs;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::{
    Machine,
    Vm,
    reference_with, //
};

use crate::identity::{
    is_built_in,
    is_other_driver, //
};
use crate::reset::COMMON_CONFIG;

/// What the host may hear of a buffer that is never shown.
const EXPECTED: [&str; 4] = [
    "res_create_2d",
    "res_back_attach",
    "res_back_detach",
    "res_unref",
];

pub fn trials() -> Vec<Trial> {
    // All of them load the driver again.
    let cannot = is_other_driver() || is_built_in();
    let mut trials = vec![trial("bad_input::framebuffer", framebuffer)];
    for (name, options, lies) in [
        ("sizes", &[][..], &SIZES[..]),
        ("sizes_without_edid", WITHOUT_EDID, &SIZES_WITHOUT_EDID),
        ("edid", &[], &EDIDS),
        ("answers", &[], &ANSWERS),
        ("silence", &[], &SILENCE),
    ] {
        trials.push(
            trial(format!("bad_input::host::{name}"), move |case| {
                host_lies(case, options, lies)
            })
            .with_ignored_flag(cannot),
        );
    }
    trials.push(trial("bad_input::host::admin_queue", admin_queue).with_ignored_flag(cannot));
    for size in [0, 8, 12] {
        trials.push(
            trial(format!("bad_input::host::config_{size}"), move |case| {
                short_config(case, size)
            })
            .with_ignored_flag(cannot),
        );
    }
    trials
}

/// What a host says that is not so: what it is told to say, what the kernel's log has of it, once, and what comes of it.
type Lie = (&'static str, &'static str, Display);

/// What there is to draw on.
#[derive(Clone, Copy)]
enum Display {
    None,
    /// A display that has [`SIZE`] among its modes.
    Able,
    /// One that prefers it.
    Usual,
}

/// What the display is when the host tells the truth, and when it says nothing sensible.
const SIZE: (u32, u32) = (1024, 768);

const SIZES: [Lie; 5] = [
    // The host does not care.
    ("hotplug 0 0x0", "Initialized virtio_gpu", Display::Usual),
    ("hotplug 0 4294967295x4294967295", "clamped", Display::Usual),
    (
        "fault GET_DISPLAY_INFO: garbage from 32",
        "clamped",
        Display::Usual,
    ),
    (
        "claim-scanouts 1000",
        "the host offers 1000 scanouts, 16 are used",
        Display::Usual,
    ),
    ("claim-scanouts 0", "KMS disabled", Display::None),
];

/// Options of a host that has nothing but sizes to say of its displays.
const WITHOUT_EDID: &[&str] = &["--features", "indirect,event-idx"];

/// Sizes of which a mode is calculated.
const SIZES_WITHOUT_EDID: [Lie; 7] = [
    ("hotplug 0 0x0", "Initialized virtio_gpu", Display::Usual),
    ("hotplug 0 1x1", "Initialized virtio_gpu", Display::Able),
    ("hotplug 0 1024x0", "Initialized virtio_gpu", Display::Usual),
    // Divisors of 0, if they are taken as they are.
    ("hotplug 0 1024x16116664", "clamped", Display::Able),
    ("hotplug 0 1024x4294967293", "clamped", Display::Able),
    ("hotplug 0 4294967295x1", "clamped", Display::Able),
    ("hotplug 0 4294967295x4294967295", "clamped", Display::Able),
];

const EDIDS: [Lie; 4] = [
    // The length is wrong as well.
    ("fault GET_EDID: garbage", "no usable EDID", Display::Usual),
    (
        "fault GET_EDID: garbage from 32",
        "no usable EDID",
        Display::Usual,
    ),
    (
        "fault GET_EDID: used length 60",
        "no usable EDID",
        Display::Usual,
    ),
    (
        "fault GET_EDID: used length 1000",
        "no usable EDID",
        Display::Usual,
    ),
];

const ANSWERS: [Lie; 9] = [
    (
        "fault GET_DISPLAY_INFO: used length 3",
        NO_DISPLAY_INFO,
        Display::None,
    ),
    (
        "fault GET_DISPLAY_INFO: used length 100",
        NO_DISPLAY_INFO,
        Display::None,
    ),
    (
        "fault GET_DISPLAY_INFO: wrong type",
        NO_DISPLAY_INFO,
        Display::None,
    ),
    (
        "fault GET_DISPLAY_INFO: error 0x1200",
        NO_DISPLAY_INFO,
        Display::None,
    ),
    (
        "fault GET_EDID: wrong type",
        "no usable EDID",
        Display::Usual,
    ),
    (
        "fault GET_EDID: error 0x1204",
        "no usable EDID",
        Display::Usual,
    ),
    (
        "fault STATUS_FREEZING: used length 3",
        NO_FREEZING,
        Display::Usual,
    ),
    (
        "fault STATUS_FREEZING: wrong type",
        NO_FREEZING,
        Display::Usual,
    ),
    (
        "fault STATUS_FREEZING: error 0x1200",
        NO_FREEZING,
        Display::Usual,
    ),
];

const SILENCE: [Lie; 4] = [
    (
        "fault GET_DISPLAY_INFO: no answer",
        NO_DISPLAY_INFO,
        Display::None,
    ),
    (
        "fault GET_EDID: no answer",
        "*ERROR* no answer to GET_EDID",
        Display::Usual,
    ),
    (
        "fault STATUS_FREEZING: no answer",
        NO_FREEZING,
        Display::Usual,
    ),
    ("fault any: no answer", NO_DISPLAY_INFO, Display::None),
];

const NO_DISPLAY_INFO: &str = "*ERROR* no display info";
const NO_FREEZING: &str = "the host offers freezing, but does not know it";

fn unload(vm: &mut Vm, module: &str) -> Result<()> {
    vm.run(&format!(
        "for console in /sys/class/vtconsole/vtcon*; do \
         grep -q 'frame buffer' $console/name && echo 0 > $console/bind; done; rmmod {module}"
    ))?;
    Ok(())
}

/// Loads the driver, and returns what the kernel's log has of it.
fn load(vm: &mut Vm) -> Result<String> {
    vm.run("dmesg -c > /dev/null; load-driver")?;
    vm.run("dmesg")
}

/// Whatever the host says, probe fails with an error that says why, or makes something sensible of it and says so, once. Then the
/// module is unloaded, and with a host that tells the truth again it works.
fn host_lies(case: &mut Case, options: &[&str], lies: &[Lie]) -> Result<()> {
    let module = case.kernel.driver.module();
    for (lie, log, _) in lies {
        case.expect_in_log(log);
        if lie.ends_with(": no answer") {
            case.expect_in_log("*ERROR* no answer to");
        }
        if lie.starts_with("claim-scanouts") {
            // Of a scanout that does not exist.
            case.expect_refused("GET_EDID");
        }
    }
    let vm = case.boot_bare(&Machine::on_reference_host(options))?;
    for (lie, log, display) in lies {
        tell(vm, lie)?;
        let seen = check_lie(vm, log, *display).and_then(|()| unload(vm, module));
        seen.with_context(|| lie.to_string())?;

        for line in ["clear", "claim-scanouts off", "hotplug 0 1024x768"] {
            tell(vm, line)?;
        }
        let log = load(vm)?;
        ensure!(
            log.contains("features: +freezing"),
            "after '{lie}', an honest host is not believed: {log}"
        );
        draw(vm, Display::Usual).with_context(|| format!("on an honest host after '{lie}'"))?;
        unload(vm, module)?;
    }
    Ok(())
}

fn tell(vm: &Vm, line: &str) -> Result<()> {
    vm.host()?.control(line).map(drop)
}

/// Draws on a display, which is there if there is to be one, and not if not.
fn draw(vm: &mut Vm, display: Display) -> Result<()> {
    let client = match display {
        Display::None => {
            let output = vm.try_run("virtgpu-guest info")?;
            ensure!(output.code != 0, "there is a display: {}", output.out);
            return Ok(());
        }
        Display::Able => Client::start_in_mode(vm, 1, SIZE)?,
        Display::Usual => Client::start(vm, 1, &[SIZE])?,
    };
    client.draw(vm, 2)?;
    client.end(vm)
}

fn check_lie(vm: &mut Vm, expected: &str, display: Display) -> Result<()> {
    let log = load(vm)?;
    let times = log.lines().filter(|line| line.contains(expected)).count();
    ensure!(
        times == 1,
        "'{expected}' is {times} times in the log: {log}"
    );
    draw(vm, display)
}

/// A device whose configuration space is not there, or too short, is none of ours.
fn short_config(case: &mut Case, size: u32) -> Result<()> {
    const MISSING: &str = "*ERROR* the device's config space is missing or too short";
    let module = case.kernel.driver.module();
    case.expect_in_log(MISSING);
    let mut machine = Machine::on_reference_host(&[]);
    let device = reference_with("config_size", size);
    machine.devices = vec![format!("{device},id=gpu0")];
    let vm = case.boot_bare(&machine)?;
    for _ in 0..2 {
        check_lie(vm, MISSING, Display::None)?;
        unload(vm, module)?;
    }
    Ok(())
}

/// A device that offers a queue for its administration, and has none.
fn admin_queue(case: &mut Case) -> Result<()> {
    /// Number of the feature bit VIRTIO_F_ADMIN_VQ.
    const ADMIN_VQ: usize = 41;
    /// Reads the second byte of `device_feature` after `device_feature_select` was set to 1: features from 40 on.
    const OFFERED: &str = r#"
put $((at + 8)) '\0\0\0\0'
put $((at + 12)) '\004\0\0\0'
put $((at + 16)) '\001'
put $((at + 8)) '\004\0\0\0'
byte $((at + 16)) > /dev/null
byte $((at + 17))
"#;
    let module = case.kernel.driver.module();
    let vm = case.boot(&Machine::on_reference_host(&["--claim-feature", "41"]))?;
    let offered: u8 = vm
        .run(&format!("{COMMON_CONFIG}{OFFERED}"))?
        .trim()
        .parse()?;
    ensure!(
        offered & 1 << (ADMIN_VQ % 8) != 0,
        "of the features from 40 on, the device offers {offered:#x}"
    );
    let features = vm.run("cat /sys/bus/virtio/devices/virtio0/features")?;
    ensure!(
        features.as_bytes().get(ADMIN_VQ) == Some(&b'0'),
        "the driver has accepted {features}"
    );
    let client = Client::start(vm, 0, &[SIZE])?;
    Sleep::S3.cycle(vm)?;
    client.draw(vm, 1)?;
    client.end(vm)?;
    unload(vm, module)
}

/// A framebuffer that reaches beyond its buffer is refused, and the host does not hear of it.
fn framebuffer(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let output = vm.try_run("virtgpu-guest selftest addfb_bad")?;
    ensure!(output.code == 0, "{}{}", output.out, output.err);

    // The console has the first resource and goes on showing it; the next one is the check's buffer.
    let log = fs::read_to_string(vm.dir.join("qemu.log"))?;
    let commands = logs::resource_commands(&log);
    let created = commands.iter().filter(|(name, _)| *name == "res_create_2d");
    let resources: Vec<_> = created.map(|(_, resource)| *resource).collect();
    ensure!(
        resources.len() == 2,
        "the host was asked for the resources {resources:?}"
    );
    let buffer = commands
        .iter()
        .filter(|(_, resource)| *resource == resources[1]);
    let others: Vec<_> = buffer
        .filter(|(name, _)| !EXPECTED.contains(name))
        .collect();
    ensure!(
        others.is_empty(),
        "the host was sent {others:?} for the buffer"
    );
    Ok(())
}
