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
}

/// Writes to /sys/power/state and, on Q35, mends QEMU's power management block: the bytes 0x40 to 0x47 and 0x60 to 0x6b of the
/// ICH9 bridge are lost in S3, and without them there is no second suspend.
const TO_STATE: &str = r#"
bridge=/sys/bus/pci/devices/0000:00:1f.0/config
copy() { dd if=$1 of=$2 bs=1 skip=$3 seek=$3 count=$4 conv=notrunc 2>/dev/null; }
if [ -e $bridge ]; then copy $bridge /tmp/bridge 64 8; copy $bridge /tmp/bridge 96 12; fi
echo $0 > /sys/power/state
code=$?
if [ -e $bridge ]; then copy /tmp/bridge $bridge 64 8; copy /tmp/bridge $bridge 96 12; fi
exit $code
"#;

impl Sleep {
    /// Sends the guest to sleep, sees from the outside that it sleeps, and wakes it up.
    pub fn cycle(self, vm: &mut Vm) -> Result<()> {
        match self {
            Self::S3 => {
                vm.run("echo deep > /sys/power/mem_sleep")?;
                let mark = vm.mark();
                let writer = vm.start_program(&["sh", "-c", TO_STATE, "mem"])?;
                wait_asleep(vm, writer, mark, |note| event(note, "SUSPEND"))?;
                let status = vm.monitor("query-status", json!({}))?;
                ensure!(
                    status["status"] == "suspended",
                    "QEMU's status is {}",
                    status["status"]
                );
                vm.monitor("system_wakeup", json!({}))?;
                vm.wait_event("WAKEUP", mark)?;
                wait_awake(vm, writer)
            }
            Self::Idle => {
                let mark = vm.mark();
                let writer = vm.start_program(&["sh", "-c", "echo freeze > /sys/power/state"])?;
                wait_asleep(vm, writer, mark, |note| match note {
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
                vm.monitor("system_powerdown", json!({}))?;
                vm.wait_console("PM: suspend exit", mark)?;
                wait_awake(vm, writer)
            }
        }
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

fn wait_awake(vm: &mut Vm, writer: Program) -> Result<()> {
    let output = vm.wait_end(writer)?;
    ensure!(
        output.code == 0,
        "the guest reports a failed suspend: {} {}",
        output.code,
        output.err
    );
    Ok(())
}

/// Suspends and resumes the devices only, without a sleep: what QEMU cannot see, the kernel's log has.
pub fn test_devices(vm: &mut Vm) -> Result<()> {
    let mark = vm.mark();
    vm.run("echo devices > /sys/power/pm_test && echo mem > /sys/power/state && echo none > /sys/power/pm_test")?;
    vm.wait_console("PM: suspend debug", mark)
}
