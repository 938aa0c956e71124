// SPDX-License-Identifier: GPL-2.0

//! The cases, each in a guest of its own. `cargo test --test cases -- --list` names them; a part of a name chooses.

mod allocation;
mod bad_input;
mod cycles;
mod display;
mod faults;
mod freezing;
mod golden;
mod hibernate;
mod hotplug;
mod identity;
mod kunit;
mod reset;
mod suspend;
mod transports;
mod unplug;
mod ways;

use libtest_mimic::Arguments;

/// How many guests run at once by default.
const GUESTS: usize = 2;

fn main() {
    let mut arguments = Arguments::from_args();
    // A guest keeps a processor busy, and a gigabyte of memory. More at once are for who asks for them.
    arguments.test_threads.get_or_insert(GUESTS);
    let mut trials = Vec::new();
    trials.extend(identity::trials());
    trials.extend(kunit::trials());
    trials.extend(display::trials());
    trials.extend(bad_input::trials());
    trials.extend(hotplug::trials());
    trials.extend(suspend::trials());
    trials.extend(reset::trials());
    trials.extend(hibernate::trials());
    trials.extend(ways::trials());
    trials.extend(unplug::trials());
    trials.extend(transports::trials());
    trials.extend(freezing::trials());
    trials.extend(golden::trials());
    trials.extend(cycles::trials());
    trials.extend(faults::trials());
    trials.extend(allocation::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
