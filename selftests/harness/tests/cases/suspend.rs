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

/// How often each guest goes down and comes back.
const CYCLES: u8 = 3;

/// What the device offers first, and what the second output is given.
const SIZE: (u32, u32) = (1280, 800);

/// Properties of the device that change what the driver negotiates with it.
const VARIANTS: [(&str, &str); 6] = [
    ("edid_off", "edid=off"),
    ("packed", "packed=on"),
    ("event_idx_off", "event_idx=off"),
    ("indirect_desc_off", "indirect_desc=off"),
    ("iommu_platform", "iommu_platform=on"),
    ("sixteen_outputs", "max_outputs=16"),
];

/// What is on the screen when the guest goes down.
#[derive(Clone, Copy)]
enum Content {
    Still,
    Flips,
    Console,
}

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
            for (content_name, content) in [
                ("still", Content::Still),
                ("flips", Content::Flips),
                ("console", Content::Console),
            ] {
                let machine = machine.clone();
                let name = format!("suspend::{sleep_name}::{machine_name}::{content_name}");
                trials.push(trial(name, move |case| {
                    survives(case, &machine, content, |vm| sleep.cycle(vm))
                }));
            }
        }
    }
    for (name, properties) in VARIANTS {
        trials.push(trial(format!("suspend::variant::{name}"), move |case| {
            let machine = Machine::with_gpu(&format!("virtio-gpu-pci,{properties}"));
            survives(case, &machine, Content::Still, |vm| Sleep::S3.cycle(vm))
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
                    test_devices,
                )
            },
        ));
    }
    trials
}

fn survives(
    case: &mut Case,
    machine: &Machine,
    content: Content,
    go_down_and_come_back: impl Fn(&mut Vm) -> Result<()>,
) -> Result<()> {
    let vm = case.boot(machine)?;
    let heads = machine.windows.max(1);
    for head in 1..heads {
        vm.resize_window(head, SIZE.0 as u16, SIZE.1 as u16)?;
    }
    let sizes = vec![SIZE; heads as usize];
    match content {
        Content::Still => {
            let client = Client::start(vm, 0, &sizes)?;
            for cycle in 1..=CYCLES {
                let before = screen::dump(vm, 0)?;
                ensure!(
                    !screen::is_black(&before),
                    "the screen is black before suspend {cycle}"
                );
                go_down_and_come_back(vm)?;
                screen::expect(
                    vm,
                    0,
                    &format!("the picture before suspend {cycle}"),
                    &before,
                )?;
                client.expect(vm, cycle - 1)?;
                client.draw(vm, cycle)?;
            }
            client.end(vm)
        }
        Content::Flips => {
            let client = Client::start(vm, 0, &sizes)?;
            for cycle in 1..=CYCLES {
                let seeds = client.start_flips(vm)?;
                go_down_and_come_back(vm)?;
                client.expect_flips(vm, seeds)?;
                client.stop_flips(vm)?;
                client.draw(vm, cycle)?;
            }
            client.end(vm)
        }
        Content::Console => {
            let mut console = Console::new(vm, heads)?;
            for cycle in 1..=CYCLES {
                let line = 2 * u32::from(cycle);
                console.write(vm, line, &format!("Before suspend {cycle}."))?;
                go_down_and_come_back(vm)?;
                console.expect(vm)?;
                console.write(vm, line + 1, &format!("After suspend {cycle}."))?;
            }
            Ok(())
        }
    }
}
