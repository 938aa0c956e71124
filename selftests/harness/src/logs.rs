// SPDX-License-Identifier: GPL-2.0

//! What must not stand in a log.

/// Parts of lines in the kernel's log that tell of a fault.
const KERNEL_FAULTS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Oops",
    "Kernel panic",
    "Call Trace",
    "cut here",
    "*ERROR*",
    "UBSAN",
    "KASAN",
    "INFO: task",
    "possible recursive locking",
    "response 0x1",
    "general protection",
    "Slab cache still has objects",
    "flip_done timed out",
    "unreferenced object",
    "new suspected memory leaks",
    // An IOMMU that the device ran into.
    "fault reason",
];

/// Begins and ends what lockdep has to say of two locks.
const LOCKDEP: [&str; 2] = [
    "WARNING: possible circular locking dependency detected",
    "</TASK>",
];

/// A lock of Linux's driver for PCI hotplug, which lockdep reports whatever device is taken away.
const HOTPLUG_LOCK: &str = "(&ctrl->reset_lock)";

/// Returns the lines of the kernel's log that tell of a fault, except those that contain one of `expected`, and those of a lockdep
/// report about [`HOTPLUG_LOCK`].
pub fn kernel_faults<'a>(log: &'a str, expected: &[&str]) -> Vec<&'a str> {
    let mut lines = Vec::new();
    let mut rest = log.lines();
    while let Some(line) = rest.next() {
        let from = lines.len();
        lines.push(line);
        if line.contains(LOCKDEP[0]) {
            let end = rest.by_ref().take_while(|line| !line.contains(LOCKDEP[1]));
            lines.extend(end);
            // Who wants which lock is said in the fifth line of the report.
            if lines[from..]
                .iter()
                .take(5)
                .any(|line| line.contains(HOTPLUG_LOCK))
            {
                lines.truncate(from);
            }
        }
    }
    let faults = lines
        .into_iter()
        .filter(|line| KERNEL_FAULTS.iter().any(|fault| line.contains(fault)));
    faults
        .filter(|line| !expected.iter().any(|part| line.contains(part)))
        .collect()
}

/// Returns the lines of QEMU's log that tell of a command that the host refused.
///
/// A complaint about the guest begins with a function's name and a colon, a trace event with its name and a space.
pub fn refused_commands(log: &str) -> Vec<&str> {
    let is_complaint = |line: &&str| {
        let word = line.split(' ').next().unwrap_or_default();
        word.starts_with("virtio") && word.ends_with(':')
    };
    log.lines().filter(is_complaint).collect()
}

/// Returns the commands in QEMU's log that concern a resource, in their order: the command's name, and the resource's id.
pub fn resource_commands(log: &str) -> Vec<(&str, &str)> {
    fn command(line: &str) -> Option<(&str, &str)> {
        let (name, arguments) = line.strip_prefix("virtio_gpu_cmd_")?.split_once(' ')?;
        let (_, resource) = arguments.split_once("res ")?;
        Some((name, resource.split(',').next()?))
    }
    log.lines().filter_map(command).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_command_is_seen() {
        let log = "virtio_gpu_cmd_res_flush res 0x2, w 1, h 1, x 0, y 0\n\
                   virtio_gpu_resource_flush: invalid resource specified 2\n";
        assert_eq!(
            refused_commands(log),
            ["virtio_gpu_resource_flush: invalid resource specified 2"]
        );
        assert_eq!(resource_commands(log), [("res_flush", "0x2")]);
    }

    #[test]
    fn a_lock_of_pci_hotplug_is_none_of_ours() {
        let report = |lock: &str| {
            format!(
                "WARNING: possible circular locking dependency detected\n7.3.4 #4 Not tainted\n---\n\
                 irq/24-pciehp/32 is trying to acquire lock:\nffff888005d8fad8 ({lock}){{.+.+}}, at: f+0x15b\n\
                 Call Trace:\n </TASK>\nBUG: bad\n"
            )
        };
        assert_eq!(
            kernel_faults(&report("&ctrl->reset_lock"), &[]),
            ["BUG: bad"]
        );
        assert_eq!(kernel_faults(&report("&other->lock"), &[]).len(), 3);
    }

    #[test]
    fn an_expected_fault_is_none() {
        let log = "[drm] *ERROR* response 0x1203\nBUG: bad\n[drm] fine";
        assert_eq!(kernel_faults(log, &["response 0x1203"]), ["BUG: bad"]);
    }
}
