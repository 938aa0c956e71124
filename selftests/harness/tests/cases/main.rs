// SPDX-License-Identifier: GPL-2.0

//! The cases, each in a guest of its own. `cargo test --test cases -- --list` names them; a part of a name chooses.

mod bad_input;
mod display;
mod hibernate;
mod hotplug;
mod identity;
mod suspend;

use libtest_mimic::Arguments;

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(identity::trials());
    trials.extend(display::trials());
    trials.extend(bad_input::trials());
    trials.extend(hotplug::trials());
    trials.extend(suspend::trials());
    trials.extend(hibernate::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
