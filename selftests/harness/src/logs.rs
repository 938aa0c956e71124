// SPDX-License-Identifier: GPL-2.0

//! What must not stand in a log.

/// Parts of lines in the kernel's log that tell of a fault.
const KERNEL_FAULTS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Oops",
    "panic",
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
pub fn refused_commands(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| !line.contains(" pid ") && line.contains("error 0x"))
        .collect()
}
