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
    // Who looks after DMA mappings and objects has stopped, for want of memory.
    "DMA-API: debugging out of memory",
    "ODEBUG: Out of memory",
    // An IOMMU that the device ran into.
    "fault reason",
];

/// Returns the lines of the kernel's log that tell of a fault, except those that contain one of `expected`.
pub fn kernel_faults<'a>(log: &'a str, expected: &[&str]) -> Vec<&'a str> {
    let faults = log
        .lines()
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
    fn an_expected_fault_is_none() {
        let log = "[drm] *ERROR* response 0x1203\nBUG: bad\n[drm] fine";
        assert_eq!(kernel_faults(log, &["response 0x1203"]), ["BUG: bad"]);
    }
}
