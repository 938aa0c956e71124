// SPDX-License-Identifier: GPL-2.0

//! Every allocation fails once: the first one that the kernel makes for something, then the second one, and so on, until there are no
//! more. An error comes back or it works all the same, nothing breaks, nothing leaks, nothing hangs, and the device works afterwards.

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
use virtgpu_lab::kernel::{
    self,
    Kernel, //
};
use virtgpu_lab::vm::{
    GPU,
    Machine,
    Vm,
    reference_with, //
};

use crate::faults::unload;
use crate::freezing::resources;

/// What the device offers first, and what the reference host is told to.
const SIZE: (u32, u32) = (1280, 800);
const HOST_SIZE: (u32, u32) = (640, 480);

/// What a kernel needs that can choose which allocation fails, and only among those that are made by or for a module.
const NEEDED: &str = "CONFIG_FAULT_INJECTION_STACKTRACE_FILTER";

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_gpu";

/// What a device driver calls in the end when it requests an interrupt. Linux does not notice that it fails, but warns of the file that
/// is not there when the interrupt is given up.
const LEFT_OUT: &str = "register_irq_proc";

/// Makes the card's node if it is missing: Linux does not notice that there is no memory for that, either.
const NODE: &str = "[ -e /dev/dri/card0 ] || {
     mkdir -p /dev/dri && IFS=: read major minor < /sys/class/drm/card0/dev && mknod /dev/dri/card0 c $major $minor
 }";

/// What the driver says of a device that it can do nothing more with.
const NOT_BACK: &str = "*ERROR* the device did not come back";

/// No fewer allocations than this are made by any of the things that are tried.
const FEW: u32 = 5;

pub fn trials() -> Vec<Trial> {
    // Without a kernel to ask, the cases run, and say what is missing.
    let cannot =
        Kernel::from_env().is_ok_and(|kernel| !kernel.has(NEEDED) || kernel.modules.is_empty());
    let cases = [
        trial("allocation::probe", probe),
        trial("allocation::modeset", modeset),
        trial("allocation::dumb", dumb),
        trial("allocation::reset", reset),
        trial("allocation::scattered", scattered),
        trial("allocation::sleep::recovered", |case| {
            sleep(case, &Machine::with_gpu("virtio-gpu-pci"), SIZE)
        }),
        trial("allocation::sleep::kept", |case| {
            let host = Machine::on_reference_host(&["--display", "640x480"]);
            sleep(case, &host, HOST_SIZE)
        }),
    ];
    cases
        .into_iter()
        .map(|case| case.with_kind(NEEDED).with_ignored_flag(cannot))
        .collect()
}

/// Which allocations are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Those of the thread that tries something.
    Thread,
    /// Of these, those that are made in the driver, or in what the driver calls, but for [`LEFT_OUT`].
    Driver,
}

/// Has the kernel fail any allocation, whoever can wait for memory, and not say so.
fn prepare(case: &mut Case, whose: Whose) -> Result<()> {
    let module = case.kernel.driver.module().replace('-', "_");
    let vm = case.vm()?;
    vm.run(
        "cd /sys/kernel/debug && for way in failslab fail_page_alloc; do
             echo N > $way/ignore-gfp-wait && echo 0 > $way/verbose || exit
         done && echo 0 > fail_page_alloc/min-order",
    )?;
    if whose == Whose::Driver {
        let (start, end) = function(LEFT_OUT)?;
        vm.run(&format!(
            "cd /sys/module/{module} && start=$(cat sections/.text) &&
             end=$(printf '%#x' $((start + $(cat coresize)))) &&
             for way in failslab fail_page_alloc; do
                 cd /sys/kernel/debug/$way && echo $start > require-start && echo $end > require-end &&
                 echo {start:#x} > reject-start && echo {end:#x} > reject-end || exit
             done"
        ))?;
    }
    Ok(())
}

/// Where a function of the kernel is.
fn function(name: &str) -> Result<(u64, u64)> {
    let symbols = kernel::symbols()?;
    let mut lines = symbols.lines().map(|line| line.split(' '));
    let found = lines.find_map(
        |mut words| match (words.next(), words.next(), words.nth(1)) {
            (Some(start), Some(size), Some(symbol)) if symbol == name => Some((start, size)),
            _ => None,
        },
    );
    let (start, size) = found.with_context(|| format!("the kernel has no {name}"))?;
    let start = u64::from_str_radix(start, 16)?;
    Ok((start, start + u64::from_str_radix(size, 16)?))
}

/// What came of something.
#[derive(Debug)]
struct Tried {
    /// There was the allocation that was to fail.
    failed: bool,
    error: Option<String>,
}

impl Tried {
    fn parse(text: &str) -> Result<Self> {
        let (failed, outcome) = text.split_once(' ').context("two words are needed")?;
        Ok(Self {
            failed: failed.parse()?,
            error: (outcome != "ok").then(|| outcome.to_owned()),
        })
    }

    /// Expects that nothing has gone wrong if no allocation failed.
    fn expect_reason(&self) -> Result<()> {
        ensure!(
            self.failed || self.error.is_none(),
            "without a failure: {:?}",
            self.error
        );
        Ok(())
    }

    /// As [`Tried::expect_reason`], for what the driver logs in `log`: an error, or, if the one who tried it was told of none, `done`.
    fn expect_outcome(&self, log: &str, done: &str) -> Result<()> {
        self.expect_reason()?;
        let logged = log.contains("*ERROR*");
        ensure!(
            self.failed || !logged,
            "without a failure, the driver says:\n{log}"
        );
        ensure!(
            self.error.is_some() || logged || log.contains(done),
            "{self:?}, and the driver does not say '{done}':\n{log}"
        );
        Ok(())
    }
}

/// Does something in the guest, with a program of its own, while allocation `nth` fails, or none for 0.
fn short(vm: &mut Vm, nth: u32, act: &[&str]) -> Result<Tried> {
    let nth = nth.to_string();
    let mut argv = vec!["virtgpu-guest", "short", &nth];
    argv.extend(act);
    let mark = vm.mark();
    let program = vm.start_program(&argv)?;
    let tried = vm.wait_line(program, "tried ", mark)?;
    vm.wait_end(program)?;
    Tried::parse(&tried)
}

/// Has the first, the second, ... allocation of something fail, until there is none. `attempt` returns whether there was.
fn each(mut attempt: impl FnMut(u32) -> Result<bool>) -> Result<()> {
    let mut nth = 1;
    while attempt(nth).with_context(|| format!("allocation {nth}"))? {
        nth += 1;
    }
    ensure!(nth > FEW, "there were only {} allocations", nth - 1);
    Ok(())
}

/// The driver is bound to the device.
fn probe(case: &mut Case) -> Result<()> {
    for text in [
        "*ERROR* no display info",
        // What Linux says of it.
        "*ERROR* Cannot mount pseudo fs",
        "*ERROR* Cannot allocate anonymous inode",
        "*ERROR* Cannot initialize graphics execution manager",
        "*ERROR* failed to register connector device",
    ] {
        case.expect_in_log(text);
    }
    case.boot(&Machine {
        // No console, of whose memory every single page would be one.
        append: "drm_client_lib.active=".into(),
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    prepare(case, Whose::Driver)?;
    let vm = case.vm()?;
    let unbind = format!("echo virtio0 > {DRIVER}/unbind");
    let bind = format!("{DRIVER}/bind");
    vm.run(&unbind)?;
    each(|nth| {
        let tried = short(vm, nth, &["write", &bind, "virtio0"])?;
        let bound = vm.try_run(&format!("test -e {DRIVER}/virtio0"))?.code == 0;
        ensure!(
            bound == tried.error.is_none(),
            "bound: {bound}, and {:?}",
            tried.error
        );
        // One that failed leaves nothing that would be in the way of the next one.
        if bound {
            vm.run(NODE)?;
            let client = Client::start(vm, nth as u8, &[SIZE])?;
            client.draw(vm, !nth as u8)?;
            client.end(vm)?;
            vm.run(&unbind)?;
            vm.run("rm -f /dev/dri/card0")?;
        }
        Ok(tried.failed)
    })?;
    vm.run(&format!("echo virtio0 > {bind}"))?;
    unload(vm)
}

/// An output that was off is turned on.
fn modeset(case: &mut Case) -> Result<()> {
    case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    prepare(case, Whose::Thread)?;
    let vm = case.vm()?;
    let client = Client::start(vm, 0, &[SIZE])?;
    each(|nth| {
        let seed = nth as u8;
        let tried = Tried::parse(&client.set(vm, seed, nth)?)?;
        if tried.error.is_some() {
            let again = Tried::parse(&client.set(vm, seed, 0)?)?;
            ensure!(again.error.is_none(), "and then: {:?}", again.error);
        }
        client.expect(vm, seed)?;
        Ok(tried.failed)
    })?;
    client.end(vm)?;
    unload(vm)
}

/// A buffer of a few pages is created. Whether it was or not, the host has nothing of it when its client has ended.
fn dumb(case: &mut Case) -> Result<()> {
    case.boot(&Machine::on_reference_host(&["--display", "640x480"]))?;
    prepare(case, Whose::Thread)?;
    let vm = case.vm()?;
    // Pages of a buffer are taken from anywhere.
    vm.run("echo N > /sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem")?;
    let client = Client::start(vm, 0, &[HOST_SIZE])?;
    let before = resources(vm.host()?)?;
    each(|nth| {
        let tried = short(vm, nth, &["create", "64x64"])?;
        tried.expect_reason()?;
        // The host has done all that came before what it shows.
        client.draw(vm, nth as u8)?;
        let after = resources(vm.host()?)?;
        ensure!(
            after == before,
            "{tried:?}: the host has resources {after:?} instead of {before:?}"
        );
        let again = short(vm, 0, &["create", "64x64"])?;
        ensure!(again.error.is_none(), "and then: {:?}", again.error);
        Ok(tried.failed)
    })?;
    client.end(vm)?;
    unload(vm)
}

/// The PCI function is reset, while everybody is awake. Between the device and the memory is an IOMMU: there may be no memory to map
/// what a command is about, which is the one thing that a command cannot do without.
fn reset(case: &mut Case) -> Result<()> {
    for text in [NOT_BACK, "*ERROR* reset, ", "*ERROR* no display info"] {
        case.expect_in_log(text);
    }
    let mut machine = Machine::behind_root_port("virtio-gpu-pci,iommu_platform=on");
    machine.devices.insert(0, "intel-iommu".into());
    machine.append = "intel_iommu=on,strict".into();
    case.boot(&machine)?;
    prepare(case, Whose::Driver)?;
    let vm = case.vm()?;
    let device = vm.run(
        "cd -P /sys/class/drm/card0/device && echo flr > reset_method && pwd && dmesg -c > /dev/null",
    )?;
    let file = format!("{}/reset", device.trim());
    let act = ["write", &file, "1"];
    let client = Client::start(vm, 0, &[SIZE])?;
    each(|nth| {
        let seed = nth as u8;
        let tried = short(vm, nth, &act)?;
        let log = vm.run("dmesg -c")?;
        tried.expect_outcome(&log, "resources recovered")?;
        if log.contains(NOT_BACK) {
            // It does the next time.
            client.draw_unseen(vm, seed)?;
            let again = short(vm, 0, &act)?;
            ensure!(again.error.is_none(), "and then: {:?}", again.error);
            client.expect(vm, seed)?;
        } else if !log.contains("*ERROR*") {
            client.expect(vm, seed.wrapping_sub(1))?;
            client.draw(vm, seed)?;
        } else {
            // What there was no memory to show is shown as soon as it is drawn.
            client.draw_and_show_part(vm, seed, [0, 0, SIZE.0, SIZE.1])?;
            client.expect(vm, seed)?;
        }
        Ok(tried.failed)
    })?;
    client.end(vm)?;
    unload(vm)
}

/// The list of a buffer's pages lies in so many pieces of memory that the ring can never hold them: that is an error, at once.
fn scattered(case: &mut Case) -> Result<()> {
    let host =
        Machine::on_reference_host(&["--display", "640x480", "--features", "edid,event-idx"]);
    case.boot(&Machine {
        devices: vec![format!("{},id={GPU}", reference_with("vq_size", 16))],
        // Checks would have objects of a page take two, side by side.
        append: "slab_debug=FO".into(),
        ..host
    })?;
    prepare(case, Whose::Thread)?;
    let vm = case.vm()?;
    let client = Client::start(vm, 0, &[HOST_SIZE])?;
    vm.run(
        "cd /sys/kernel/debug/fail_page_alloc && echo N > ignore-gfp-highmem && echo 1 > min-order &&
         echo Y > task-filter && echo 100 > probability && echo -1 > times",
    )?;
    let create = |vm: &mut Vm, size: &str| -> Result<Option<String>> {
        let mark = vm.mark();
        let program = vm.start_program(&["virtgpu-guest", "scattered", size])?;
        let tried = vm.wait_line(program, "tried ", mark)?;
        vm.wait_end(program)?;
        Ok(Tried::parse(&tried)?.error)
    };
    for seed in 1..=3 {
        let error = create(vm, "2560x2048")?;
        ensure!(
            error.as_deref() == Some("Argument list too long (os error 7)"),
            "a large buffer: {error:?}"
        );
        let error = create(vm, "640x480")?;
        ensure!(error.is_none(), "a small buffer: {error:?}");
        client.draw(vm, seed)?;
    }
    client.end(vm)?;
    unload(vm)
}

/// The devices are suspended, and resumed.
fn sleep(case: &mut Case, machine: &Machine, size: (u32, u32)) -> Result<()> {
    const OFF: &str = "*ERROR* cannot resume the display";
    const NOT_OFF: &str = "*ERROR* cannot suspend the display";
    for text in [
        NOT_BACK,
        OFF,
        NOT_OFF,
        "*ERROR* no display info",
        "*ERROR* the host was not told of the resume",
    ] {
        case.expect_in_log(text);
    }
    case.boot(machine)?;
    prepare(case, Whose::Driver)?;
    let vm = case.vm()?;
    // The thread that asks for it does it all.
    vm.run("echo 0 > /sys/power/pm_async && echo devices > /sys/power/pm_test")?;
    let act = ["write", "/sys/power/state", "mem"];
    let client = Client::start(vm, 0, &[size])?;
    let (mut down, mut back) = (0, 0);
    each(|nth| {
        let seed = nth as u8;
        vm.run("dmesg -c > /dev/null")?;
        let tried = short(vm, nth, &act)?;
        let log = vm.run("dmesg")?;
        tried.expect_outcome(&log, "resumed, ")?;
        ensure!(
            tried.error.is_some() || !log.contains(NOT_OFF),
            "who suspends was not told that the driver could not:\n{log}"
        );
        // Who suspends is told of what fails on the way down, and of nothing that fails on the way back.
        if tried.error.is_some() {
            down += 1;
        } else if log.contains("*ERROR*") {
            back += 1;
        }
        if log.contains(NOT_BACK) {
            // It does the next time.
            client.draw_unseen(vm, seed)?;
            let again = short(vm, 0, &act)?;
            ensure!(again.error.is_none(), "and then: {:?}", again.error);
            client.expect(vm, seed)?;
        } else if log.contains(OFF) {
            // What is off can be turned on.
            let on = Tried::parse(&client.set(vm, seed, 0)?)?;
            ensure!(on.error.is_none(), "and then: {:?}", on.error);
            client.expect(vm, seed)?;
        } else {
            client.expect(vm, seed.wrapping_sub(1))?;
            client.draw(vm, seed)?;
        }
        Ok(tried.failed)
    })?;
    ensure!(
        down > 0 && back > 0,
        "for want of memory, {down} attempts failed going down, and {back} coming back"
    );
    client.end(vm)?;
    unload(vm)
}
