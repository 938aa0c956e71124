// SPDX-License-Identifier: GPL-2.0

//! Ways to go down and come back.

use anyhow::{
    Result,
    anyhow,
    ensure, //
};
use serde_json::json;
use virtgpu_guest::wire::Report;

use crate::vm::{
    LIMIT,
    Mark,
    Note,
    Program,
    Vm,
    event, //
};

/// A sleep that the guest's memory survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sleep {
    /// Suspend to RAM: the platform cuts the devices' power.
    S3,
    /// Suspend to idle: only the drivers are told.
    Idle,
    /// Suspend to RAM, with an image on the disk for the case that the power fails.
    Hybrid,
}

/// Writes its arguments to /sys/power/state, one after the other, and, on Q35, mends QEMU's power management block: the bytes 0x40
/// to 0x47 and 0x60 to 0x6b of the ICH9 bridge are lost in S3, and without them there is no second suspend.
const TO_STATE: &str = r#"
bridge=/sys/bus/pci/devices/0000:00:1f.0/config
copy() { dd if=$1 of=$2 bs=1 skip=$3 seek=$3 count=$4 conv=notrunc 2>/dev/null; }
for state; do
    if [ -e $bridge ]; then copy $bridge /tmp/bridge 64 8; copy $bridge /tmp/bridge 96 12; fi
    echo $state > /sys/power/state
    code=$?
    if [ -e $bridge ]; then copy /tmp/bridge $bridge 64 8; copy /tmp/bridge $bridge 96 12; fi
    [ $code = 0 ] || exit $code
done
"#;

/// What the kernel says when it begins to freeze user space, and when it tells the GPU's driver to suspend.
pub const FREEZER: &str = "Freezing user space processes";
pub const DRIVER: &str = "virtio0: PM: calling ";

/// A guest on its way to sleep, or asleep.
pub struct Sleeper {
    sleep: Sleep,
    writer: Program,
    mark: Mark,
}

impl Sleep {
    /// Sends the guest to sleep, sees from the outside that it sleeps, and wakes it up.
    pub fn cycle(self, vm: &mut Vm) -> Result<()> {
        self.cycles(vm, 1)
    }

    /// As [`Sleep::cycle`], and calls `before` just before the guest is told to sleep, and `act` as soon as the kernel says `moment`
    /// ([`FREEZER`] or [`DRIVER`]). It goes on meanwhile.
    pub fn cycle_with(
        self,
        vm: &mut Vm,
        moment: &str,
        before: impl FnOnce(&mut Vm) -> Result<()>,
        act: impl FnOnce(&mut Vm) -> Result<()>,
    ) -> Result<()> {
        // Has the kernel say whose turn it is.
        vm.run("echo 1 > /sys/power/pm_print_times")?;
        let state = self.prepare(vm)?;
        before(vm)?;
        let mut sleeper = self.enter(vm, state, 1)?;
        vm.wait_console(moment, sleeper.mark)?;
        act(vm)?;
        sleeper.wait_asleep(vm)?;
        sleeper.rouse(vm)?;
        sleeper.wait_awake(vm)
    }

    /// As [`Sleep::cycle`], several times, and the guest does nothing in between.
    pub fn cycles(self, vm: &mut Vm, count: usize) -> Result<()> {
        let mut sleeper = self.start(vm, count)?;
        for _ in 0..count {
            sleeper.wait_asleep(vm)?;
            sleeper.rouse(vm)?;
        }
        sleeper.wait_awake(vm)
    }

    /// Sends the guest to sleep, and sees from the outside that it sleeps.
    pub fn begin(self, vm: &mut Vm) -> Result<Sleeper> {
        let sleeper = self.start(vm, 1)?;
        sleeper.wait_asleep(vm)?;
        Ok(sleeper)
    }

    fn start(self, vm: &mut Vm, count: usize) -> Result<Sleeper> {
        let state = self.prepare(vm)?;
        self.enter(vm, state, count)
    }

    /// Chooses the kind of sleep, and returns what is to be written to /sys/power/state.
    fn prepare(self, vm: &mut Vm) -> Result<&'static str> {
        let (prepare, state) = match self {
            Self::S3 => ("echo deep > /sys/power/mem_sleep", "mem"),
            Self::Idle => ("true", "freeze"),
            Self::Hybrid => (
                "echo deep > /sys/power/mem_sleep && echo suspend > /sys/power/disk",
                "disk",
            ),
        };
        vm.run(prepare)?;
        Ok(state)
    }

    fn enter(self, vm: &mut Vm, state: &str, count: usize) -> Result<Sleeper> {
        let mark = vm.mark();
        let mut argv = vec!["sh", "-c", TO_STATE, "sh"];
        argv.extend(vec![state; count]);
        Ok(Sleeper {
            sleep: self,
            writer: vm.start_program(&argv)?,
            mark,
        })
    }
}

impl Sleeper {
    fn wait_asleep(&self, vm: &mut Vm) -> Result<()> {
        if self.sleep == Sleep::Idle {
            wait_asleep(vm, self.writer, self.mark, |note| match note {
                Note::Console(line) if line.contains("PM: suspend-to-idle") => Some(()),
                _ => None,
            })?;
            // The message comes just before the processor halts, and nothing but the button makes it run again.
            let end = std::time::Instant::now() + LIMIT;
            while !vm.human_monitor("info registers")?.contains("HLT=1") {
                ensure!(
                    std::time::Instant::now() < end,
                    "the guest's processor never halted"
                );
            }
            return Ok(());
        }
        wait_asleep(vm, self.writer, self.mark, |note| event(note, "SUSPEND"))?;
        let status = vm.monitor("query-status", json!({}))?;
        ensure!(
            status["status"] == "suspended",
            "QEMU's status is {}",
            status["status"]
        );
        Ok(())
    }

    fn rouse(&mut self, vm: &mut Vm) -> Result<()> {
        self.mark = vm.mark();
        if self.sleep == Sleep::Idle {
            vm.monitor("system_powerdown", json!({}))?;
            return vm.wait_console("PM: suspend exit", self.mark);
        }
        vm.monitor("system_wakeup", json!({}))?;
        vm.wait_event("WAKEUP", self.mark)
    }

    fn wait_awake(self, vm: &mut Vm) -> Result<()> {
        let output = vm.wait_end(self.writer)?;
        ensure!(
            output.code == 0,
            "the guest reports a failed suspend: {} {}",
            output.code,
            output.err
        );
        Ok(())
    }

    /// Wakes the guest up.
    pub fn wake(mut self, vm: &mut Vm) -> Result<()> {
        self.rouse(vm)?;
        self.wait_awake(vm)
    }

    /// The program in the guest that ends when the guest is awake.
    pub fn writer(&self) -> Program {
        self.writer
    }
}

fn wait_asleep(
    vm: &mut Vm,
    writer: Program,
    mark: Mark,
    asleep: impl Fn(&Note) -> Option<()>,
) -> Result<()> {
    vm.wait("the guest to sleep", mark, LIMIT, |note| match note {
        Note::Agent(Report::Ended { id, code }) if writer.is(*id) => Some(Err(anyhow!(
            "the guest did not sleep: writing to /sys/power/state ended with {code}"
        ))),
        note => asleep(note).map(Ok),
    })?
}

/// Goes a part of the way to sleep and back (pm_test): what QEMU cannot see, the kernel's log has. Returns whether the kernel did.
pub fn test(vm: &mut Vm, state: &str, level: &str) -> Result<bool> {
    let mark = vm.mark();
    let output = vm.try_run(&format!(
        "echo {level} > /sys/power/pm_test && {{ echo {state} > /sys/power/state; code=$?; echo none > /sys/power/pm_test; exit $code; }}"
    ))?;
    if output.code == 0 {
        vm.wait_console("debug: Waiting for", mark)?;
    }
    Ok(output.code == 0)
}

/// Suspends and resumes the devices, for a shell.
pub const DEVICES: &str = "echo devices > /sys/power/pm_test && echo mem > /sys/power/state";

/// Suspends and resumes the devices only, without a sleep.
pub fn test_devices(vm: &mut Vm) -> Result<()> {
    ensure!(
        test(vm, "mem", "devices")?,
        "the guest reports a failed suspend"
    );
    Ok(())
}
