// SPDX-License-Identifier: GPL-2.0

//! The picture survives suspend, and goes on being drawn to.

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
use virtgpu_lab::screen;
use virtgpu_lab::suspend::{
    Sleep,
    test_devices, //
};
use virtgpu_lab::vm::{
    Machine,
    Vm, //
};

use crate::transports::{
    expect_feature,
    feature, //
};

/// How often each guest goes down and comes back.
const CYCLES: u8 = 3;

/// What the device offers first, and what the second output is given.
const SIZE: (u32, u32) = (1280, 800);

/// What shows that driver and device have come to terms.
#[derive(Clone, Copy)]
enum Terms {
    /// A feature bit, and whether it was negotiated.
    Feature(usize, bool),
    /// A line of the driver's virtio-gpu-features in debugfs.
    Line(&'static str),
}

impl Terms {
    fn expect(self, vm: &mut Vm) -> Result<()> {
        match self {
            Self::Feature(bit, expected) => expect_feature(vm, bit, expected),
            Self::Line(line) => {
                let features = vm.run("cat /sys/kernel/debug/dri/0/virtio-gpu-features")?;
                ensure!(
                    features.lines().any(|one| one == line),
                    "there is no '{line}' in {features}"
                );
                Ok(())
            }
        }
    }
}

/// Properties of the device that change what the driver negotiates with it.
const VARIANTS: [(&str, &str, Terms); 6] = [
    ("edid_off", "edid=off", Terms::Line("edid             : no")),
    ("packed", "packed=on", Terms::Feature(feature::PACKED, true)),
    (
        "event_idx_off",
        "event_idx=off",
        Terms::Feature(feature::EVENT_IDX, false),
    ),
    (
        "indirect_desc_off",
        "indirect_desc=off",
        Terms::Feature(feature::INDIRECT_DESC, false),
    ),
    (
        "iommu_platform",
        "iommu_platform=on",
        Terms::Feature(feature::ACCESS_PLATFORM, true),
    ),
    (
        "sixteen_outputs",
        "max_outputs=16",
        Terms::Line("scanouts         : 16"),
    ),
];

/// What is on the screen when the guest goes down.
#[derive(Clone, Copy)]
pub enum Content {
    Still,
    Flips,
    Console,
}

/// All of them, with their names.
pub const CONTENTS: [(&str, Content); 3] = [
    ("still", Content::Still),
    ("flips", Content::Flips),
    ("console", Content::Console),
];

fn machines() -> [(&'static str, Machine); 5] {
    [
        ("pci", Machine::with_gpu("virtio-gpu-pci")),
        ("vga", Machine::with_gpu("virtio-vga")),
        (
            "two_outputs",
            Machine {
                windows: 2,
                ..Machine::with_gpu("virtio-gpu-pci,max_outputs=2")
            },
        ),
        ("root_port", Machine::behind_root_port("virtio-gpu-pci")),
        (
            "no_soft_reset",
            Machine::behind_root_port("virtio-gpu-pci,x-pcie-pm-no-soft-reset=on"),
        ),
    ]
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (sleep_name, sleep) in [("s3", Sleep::S3), ("s2idle", Sleep::Idle)] {
        for (machine_name, machine) in machines() {
            for (content_name, content) in CONTENTS {
                let machine = machine.clone();
                let name = format!("suspend::{sleep_name}::{machine_name}::{content_name}");
                trials.push(trial(name, move |case| {
                    let sizes = vec![SIZE; machine.windows.max(1) as usize];
                    survives(
                        case,
                        &machine,
                        content,
                        &sizes,
                        |vm, _| sleep.cycle(vm),
                        PICTURE,
                    )
                }));
            }
        }
    }
    for (name, properties, terms) in VARIANTS {
        trials.push(trial(format!("suspend::variant::{name}"), move |case| {
            let machine = Machine::with_gpu(&format!("virtio-gpu-pci,{properties}"));
            let down_and_up = |vm: &mut Vm, _| {
                terms.expect(vm)?;
                Sleep::S3.cycle(vm)?;
                // They were negotiated anew.
                terms.expect(vm)
            };
            survives(
                case,
                &machine,
                Content::Flips,
                &[SIZE],
                down_and_up,
                PICTURE,
            )
        }));
    }
    for (content_name, content) in [("still", Content::Still), ("console", Content::Console)] {
        trials.push(trial(
            format!("suspend::pm_test_devices::{content_name}"),
            move |case| {
                survives(
                    case,
                    &Machine::with_gpu("virtio-gpu-pci"),
                    content,
                    &[SIZE],
                    |vm, _| test_devices(vm),
                    PICTURE,
                )
            },
        ));
    }
    trials
}

/// Nothing matters but the picture.
const PICTURE: fn(&Vm, ()) -> Result<()> = |_, ()| Ok(());

/// Has the guest go down and come back by `down_and_up`, which is told how often it has been called, and expects that what is on its
/// outputs, of `sizes`, is back and can be drawn to. `check` is called when it is back.
pub fn survives<T>(
    case: &mut Case,
    machine: &Machine,
    content: Content,
    sizes: &[(u32, u32)],
    down_and_up: impl Fn(&mut Vm, u8) -> Result<T>,
    check: impl Fn(&Vm, T) -> Result<()>,
) -> Result<()> {
    let vm = case.boot(machine)?;
    for head in 1..machine.windows {
        let (width, height) = sizes[head as usize];
        vm.resize_window(head, width as u16, height as u16)?;
    }
    match content {
        Content::Still => {
            let client = Client::start(vm, 0, sizes)?;
            for cycle in 1..=CYCLES {
                let before = screen::dump(vm, 0)?;
                ensure!(
                    !screen::is_black(&before),
                    "the screen is black before suspend {cycle}"
                );
                let seen = down_and_up(vm, cycle)?;
                screen::expect(
                    vm,
                    0,
                    &format!("the picture before suspend {cycle}"),
                    &before,
                )?;
                client.expect(vm, cycle - 1)?;
                check(vm, seen)?;
                client.draw(vm, cycle)?;
            }
            client.end(vm)
        }
        Content::Flips => {
            let client = Client::start(vm, 0, sizes)?;
            for cycle in 1..=CYCLES {
                let seeds = client.start_flips(vm)?;
                let seen = down_and_up(vm, cycle)?;
                client.expect_flips(vm, seeds)?;
                client.stop_flips(vm)?;
                check(vm, seen)?;
                client.draw(vm, cycle)?;
            }
            client.end(vm)
        }
        Content::Console => {
            let mut console = Console::new(vm, sizes.len() as u32)?;
            for cycle in 1..=CYCLES {
                let line = 2 * u32::from(cycle);
                console.write(vm, line, &format!("Before suspend {cycle}."))?;
                let seen = down_and_up(vm, cycle)?;
                console.expect(vm)?;
                check(vm, seen)?;
                console.write(vm, line + 1, &format!("After suspend {cycle}."))?;
            }
            Ok(())
        }
    }
}
