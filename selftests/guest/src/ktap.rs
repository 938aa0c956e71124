// SPDX-License-Identifier: GPL-2.0

//! Results in the Kernel Test Anything Protocol, version 1.

use std::process::ExitCode;

use anyhow::Result;

/// What came of a check that did not fail.
pub enum Outcome {
    /// It passed; what was measured, for the reader.
    Passed(String),
    /// It cannot run here, for this reason.
    Skipped(String),
}

/// A named check.
pub struct Check {
    pub name: &'static str,
    pub run: fn() -> Result<Outcome>,
}

/// Runs the checks, prints their results, and returns kselftest's exit code: 0 if all passed, 1 if one failed, 4 if all were
/// skipped.
pub fn run(checks: &[&Check]) -> ExitCode {
    println!("KTAP version 1\n1..{}", checks.len());
    let (mut failed, mut skipped) = (0, 0);
    for (number, check) in (1..).zip(checks) {
        match (check.run)() {
            Ok(Outcome::Passed(remark)) => {
                if !remark.is_empty() {
                    println!("# {remark}");
                }
                println!("ok {number} {}", check.name);
            }
            Ok(Outcome::Skipped(reason)) => {
                skipped += 1;
                println!("ok {number} {} # SKIP {reason}", check.name);
            }
            Err(error) => {
                failed += 1;
                for line in format!("{error:#}").lines() {
                    println!("# {line}");
                }
                println!("not ok {number} {}", check.name);
            }
        }
    }
    let passed = checks.len() - failed - skipped;
    println!("# Totals: pass:{passed} fail:{failed} xfail:0 xpass:0 skip:{skipped} error:0");
    match (passed, failed) {
        (_, 1..) => ExitCode::from(1),
        (0, _) => ExitCode::from(4),
        _ => ExitCode::SUCCESS,
    }
}
