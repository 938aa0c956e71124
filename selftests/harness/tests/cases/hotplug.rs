// SPDX-License-Identifier: GPL-2.0

//! Displays that come, go and change while the guest runs.

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
use virtgpu_lab::vm::{
    Machine,
    Vm, //
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("hotplug::second_output", second_output),
        trial("hotplug::resize", resize),
    ]
}

/// Expects an output's state: its preferred mode's size, or none if it is not connected.
fn expect_output(vm: &mut Vm, index: usize, expected: Option<(u32, u32)>) -> Result<()> {
    let card = vm.card()?;
    let output = &card.outputs[index];
    let preferred = output
        .modes
        .iter()
        .find(|mode| mode.preferred && output.connected);
    let size = preferred.map(|mode| (mode.width, mode.height));
    ensure!(
        size == expected && output.connected == expected.is_some(),
        "{} is connected: {}, preferred: {size:?} instead of {expected:?}",
        output.name,
        output.connected
    );
    Ok(())
}

fn second_output(case: &mut Case) -> Result<()> {
    const FIRST: (u32, u32) = (1280, 800);
    let machine = Machine {
        windows: 2,
        ..Machine::with_gpu("virtio-gpu-pci,max_outputs=2")
    };
    let vm = case.boot(&machine)?;
    expect_output(vm, 1, None)?;
    for (width, height) in [(800, 600), (1024, 768)] {
        vm.resize_window(1, width, height)?;
        let second = (width.into(), height.into());
        expect_output(vm, 1, Some(second))?;
        let client = Client::start(vm, 1, &[FIRST, second])?;
        client.draw(vm, 2)?;
        client.end(vm)?;

        vm.resize_window(1, 0, 0)?;
        expect_output(vm, 1, None)?;
        let client = Client::start(vm, 3, &[FIRST])?;
        client.draw(vm, 4)?;
        client.end(vm)?;
    }
    Ok(())
}

fn resize(case: &mut Case) -> Result<()> {
    let machine = Machine {
        windows: 1,
        ..Machine::with_gpu("virtio-gpu-pci")
    };
    let vm = case.boot(&machine)?;
    for (width, height) in [(1024, 768), (1900, 1000), (1280, 800)] {
        vm.resize_window(0, width, height)?;
        let size = (width.into(), height.into());
        expect_output(vm, 0, Some(size))?;
        let client = Client::start(vm, 1, &[size])?;
        client.draw(vm, 2)?;
        client.end(vm)?;
    }
    Ok(())
}
