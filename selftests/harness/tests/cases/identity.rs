// SPDX-License-Identifier: GPL-2.0

//! What user space and scripts know the driver by.

use anyhow::{
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
use virtgpu_lab::kernel::{
    Driver,
    Kernel, //
};
use virtgpu_lab::vm::{
    Machine,
    Output,
    Vm, //
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("identity::names", names),
        trial("identity::kernel_log", kernel_log),
        trial("identity::debugfs", debugfs),
        trial("identity::selftest", selftest),
        trial("identity::reload", reload).with_ignored_flag(is_built_in()),
        trial("identity::beside", beside),
    ]
}

/// What the C driver answers.
const CAPABILITIES: [(&str, u64); 13] = [
    ("DumbBuffer", 1),
    ("VBlankHighCRTC", 1),
    ("DumbPreferredDepth", 0),
    ("DumbPreferShadow", 0),
    ("Prime", 3),
    ("MonotonicTimestamp", 1),
    ("ASyncPageFlip", 0),
    ("CursorWidth", 64),
    ("CursorHeight", 64),
    ("AddFB2Modifiers", 0),
    ("CRTCInVBlankEvent", 1),
    ("SyncObj", 1),
    ("TimelineSyncObj", 1),
];

fn names(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci,max_outputs=3"))?;
    let card = vm.card()?;
    ensure!(
        card.driver == "virtio_gpu",
        "the driver's name is {}",
        card.driver
    );
    ensure!(
        card.version == [0, 1, 0],
        "the version is {:?}",
        card.version
    );
    let capabilities: Vec<_> = card
        .capabilities
        .iter()
        .map(|(name, value)| (name.as_str(), *value))
        .collect();
    ensure!(
        capabilities == CAPABILITIES,
        "the capabilities are {capabilities:?}"
    );
    let names: Vec<_> = card
        .outputs
        .iter()
        .map(|output| output.name.as_str())
        .collect();
    ensure!(
        names == ["Virtual-1", "Virtual-2", "Virtual-3"],
        "the connectors are {names:?}"
    );
    let connected: Vec<_> = card.outputs.iter().map(|output| output.connected).collect();
    ensure!(
        connected == [true, false, false],
        "connected are {connected:?}"
    );

    let bus = vm.run("basename $(readlink /sys/bus/virtio/devices/virtio0/driver)")?;
    ensure!(
        bus.trim() == "virtio_gpu",
        "the name on the virtio bus is {bus}"
    );
    let modetest = vm.run("modetest -M virtio_gpu -c 2>&1 | head -1")?;
    ensure!(
        modetest.contains("`virtio GPU` on driver `virtio_gpu` (version 0.1.0"),
        "modetest says {modetest}"
    );
    Ok(())
}

/// Scripts look for these lines; they are the C driver's.
fn kernel_log(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci,max_outputs=2"))?;
    let log = vm.run("dmesg")?;
    for line in [
        "features: -virgl +edid -resource_blob -host_visible",
        "features: -context_init -blob_alignment",
        "number of scanouts: 2",
        "number of cap sets: 0",
        "Initialized virtio_gpu 0.1.0 for 0000:00:02.0 on minor 0",
    ] {
        ensure!(
            log.lines().any(|entry| entry.ends_with(line)),
            "the kernel's log has no '{line}'"
        );
    }
    Ok(())
}

/// The C driver's files, with its contents.
fn debugfs(case: &mut Case) -> Result<()> {
    const EXPECTED: &str = "virgl            : no
edid             : yes
indirect         : yes
resource uuid    : no
blob resources   : no
context init     : no
cap sets         : 0
scanouts         : 1
";
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let features = vm.run("cat /sys/kernel/debug/dri/0/virtio-gpu-features")?;
    ensure!(features == EXPECTED, "virtio-gpu-features has {features}");
    let fence = vm.run("cat /sys/kernel/debug/dri/0/virtio-gpu-irq-fence")?;
    ensure!(
        fence.starts_with("fence "),
        "virtio-gpu-irq-fence has {fence}"
    );
    let memory = vm.run("cat /sys/kernel/debug/dri/0/virtio-gpu-host-visible-mm")?;
    ensure!(
        memory.trim() == "Host allocations not visible to guest",
        "virtio-gpu-host-visible-mm has {memory}"
    );
    Ok(())
}

/// The checks that can be run by hand in any guest; those about time and framebuffers are cases of their own.
fn selftest(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let output =
        vm.try_run("virtgpu-guest selftest identity dumb modes dirtyfb console suspend_devices")?;
    ensure!(
        output.code == 0,
        "selftest ended with {}:\n{}{}",
        output.code,
        output.out,
        output.err
    );
    let passed = output
        .out
        .lines()
        .filter(|line| line.starts_with("ok ") && !line.contains("# SKIP"));
    ensure!(passed.count() == 6, "a check was skipped:\n{}", output.out);
    Ok(())
}

/// Whether the driver is one that knows nothing of FREEZING, oopses on some hosts that break the rules, and waits for others for ever.
pub fn is_other_driver() -> bool {
    Kernel::from_env().is_ok_and(|kernel| kernel.driver != Driver::Rust)
}

/// Whether the driver cannot be unloaded. Without a kernel to ask, the case runs, and says what is missing.
pub fn is_built_in() -> bool {
    Kernel::from_env().is_ok_and(|kernel| kernel.modules.is_empty())
}

/// The module goes and comes, with the console and with a client in between. The console is on the card when the module goes, or has
/// been taken off it before.
fn reload(case: &mut Case) -> Result<()> {
    let module = case.kernel.driver.module();
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    Console::new(vm, 1)?.write(vm, 2, "Round 0.")?;
    for round in 1..=4 {
        let client = Client::start(vm, round, &[(1280, 800)])?;
        client.draw(vm, round + 100)?;
        client.end(vm)?;
        if round % 2 == 0 {
            vm.run(
                "for console in /sys/class/vtconsole/vtcon[1-9]; do echo 0 > $console/bind; done",
            )?;
        }
        vm.run(&format!("rmmod {module}"))?;
        vm.run("load-driver")?;
        Console::new(vm, 1)?.write(vm, 2, &format!("Round {round}."))?;
    }
    Ok(())
}

/// Has the driver let go of the GPU, and take it again.
pub const UNBIND: &str = "echo virtio0 > /sys/bus/virtio/drivers/virtio_gpu/unbind";
pub const BIND: &str = "echo virtio0 > /sys/bus/virtio/drivers/virtio_gpu/bind";

/// Loads the modules of `kernel`, from where programs are, that are not loaded yet. Returns what became of the last one.
fn load(vm: &mut Vm, kernel: &Kernel) -> Result<Output> {
    let mut output = Output::default();
    for module in &kernel.modules {
        let file = module.file_name().unwrap_or_default().to_string_lossy();
        let name = file.trim_end_matches(".ko").replace('-', "_");
        output = vm.try_run(&format!(
            "grep -q '^{name} ' /proc/modules || insmod /bin/{file}"
        ))?;
    }
    Ok(output)
}

/// Expects that the kernel refuses the driver of `kernel` beside the one that it has.
fn expect_refused(vm: &mut Vm, kernel: &Kernel) -> Result<()> {
    let output = load(vm, kernel)?;
    ensure!(
        output.code != 0 && output.err.contains("Device or resource busy"),
        "beside the other driver, the {} driver was loaded: {}",
        kernel.driver,
        output.err
    );
    Ok(())
}

/// Expects that the driver of `kernel` has the device, and that test picture `seed` can be shown with it.
fn expect_bound(vm: &mut Vm, kernel: &Kernel, seed: u8) -> Result<Client> {
    const BUILT_IN: &str = "built in";
    let module = vm.run(&format!(
        "cd /sys/bus/virtio/devices/virtio0/driver && basename \"$(readlink module || echo {BUILT_IN})\""
    ))?;
    let expected = match kernel.modules.is_empty() {
        true => BUILT_IN.into(),
        false => kernel.driver.module().replace('-', "_"),
    };
    ensure!(
        module.trim() == expected,
        "the device is bound to {module} instead of {expected}"
    );
    Client::start(vm, seed, &[(1280, 800)])
}

/// Unloads the driver of `kernel`, which has the device.
fn unload(vm: &mut Vm, kernel: &Kernel) -> Result<()> {
    vm.run(UNBIND)?;
    vm.run(&format!("rmmod {}", kernel.driver.module()))?;
    Ok(())
}

/// Both drivers are there, as modules, or the Rust driver is built in. They have one name, and the kernel has only one driver of a name:
/// the one that is loaded first has the device, and the other one is refused until that one is gone.
fn beside(case: &mut Case) -> Result<()> {
    let rust = Kernel::with_driver(Driver::Rust)?;
    let c = Kernel::with_driver(Driver::C)?;
    let modules = rust.modules.iter().chain(&c.modules);
    let vm = case.boot_bare(&Machine {
        programs: modules.cloned().collect(),
        // No console: when the C driver is unbound, it leaks what the host has not confirmed to have forgotten yet.
        append: "drm_client_lib.active=".into(),
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    for (round, [first, second]) in (0..).zip([[&rust, &c], [&c, &rust]]) {
        let output = load(vm, first)?;
        ensure!(output.code == 0, "{}", output.err);
        let client = expect_bound(vm, first, 20 * round)?;
        expect_refused(vm, second)?;
        client.draw(vm, 20 * round + 1)?;
        client.end(vm)?;
        vm.run(UNBIND)?;
        // A driver without a device is one.
        expect_refused(vm, second)?;
        vm.run(BIND)?;
        expect_bound(vm, first, 20 * round + 2)?.end(vm)?;
        if first.modules.is_empty() {
            break;
        }

        unload(vm, first)?;
        let output = load(vm, second)?;
        ensure!(output.code == 0, "{}", output.err);
        expect_bound(vm, second, 20 * round + 3)?.end(vm)?;
        unload(vm, second)?;
    }
    Ok(())
}
