// SPDX-License-Identifier: GPL-2.0

//! Other ways to reach the device, and other machines around it.

use std::fs;

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
use virtgpu_lab::suspend::{
    Sleep,
    test, //
};
use virtgpu_lab::vm::{
    GPU,
    Machine,
    Vm,
    reference_with, //
};

use crate::identity::is_other_driver;

const SIZE: (u32, u32) = (1280, 800);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("transports::mmio", mmio),
        trial("transports::four_cpus", four_cpus),
        trial("transports::large_backing", large_backing),
        trial("transports::short_ring", short_ring),
        trial("transports::slow_host", slow_host).with_ignored_flag(is_other_driver()),
        trial("transports::iommu", iommu),
        trial("transports::bounce_buffers", bounce_buffers),
    ]
}

/// Flips, while the guest goes down and comes back.
fn survives(vm: &mut Vm, down_and_up: impl Fn(&mut Vm) -> Result<()>) -> Result<()> {
    let client = Client::start(vm, 0, &[SIZE])?;
    for cycle in 1..=3 {
        let before = vm.creations()?;
        let seeds = client.start_flips(vm)?;
        down_and_up(vm)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
        client.draw(vm, cycle)?;
        let lost = vm.creations()? - before;
        ensure!(lost == 1, "the host lost its resources {lost} times");
    }
    client.end(vm)
}

/// A machine without PCI and ACPI. It cannot sleep, but the kernel can go most of the way.
fn mmio(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        machine: "microvm,acpi=off",
        arguments: ["-global", "virtio-mmio.force-legacy=false"]
            .map(String::from)
            .into(),
        ..Machine::with_gpu("virtio-gpu-device")
    })?;
    for (state, level) in [("freeze", "devices"), ("disk", "core")] {
        survives(vm, |vm| {
            ensure!(
                test(vm, state, level)?,
                "the guest does not go down to {level} for {state}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// Commands, answers and the reset may be on four processors.
fn four_cpus(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        cpus: 4,
        ..Machine::with_gpu("virtio-gpu-pci")
    })?;
    survives(vm, |vm| {
        Sleep::S3.cycle(vm)?;
        let count = vm.run("nproc")?;
        ensure!(count.trim() == "4", "{count} processors are back");
        Ok(())
    })
}

/// Without indirect descriptors, the list of a large buffer's pages takes up to 62 entries of the ring's 64, while others use it. That one
/// which can never fit is refused is in `allocation::scattered`, where the kernel can be told to give no memory but in single pages.
fn large_backing(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci,indirect_desc=off"))?;
    // 15,360 pages; QEMU takes 16,384 pieces of memory for a buffer at the most.
    backings(vm, SIZE, "3840x4096")
}

/// The same in a ring of 16 entries, in which there is always room for the list of a buffer of moderate size, and suspend.
fn short_ring(case: &mut Case) -> Result<()> {
    let machine = Machine::on_reference_host(&["--features", "edid,event-idx"]);
    let device = format!("{},id={GPU}", reference_with("vq_size", 16));
    let vm = case.boot(&Machine {
        devices: vec![device],
        ..machine
    })?;
    backings(vm, (1024, 768), "1600x1200")?;
    let client = Client::start(vm, 10, &[(1024, 768)])?;
    let seeds = client.start_flips(vm)?;
    Sleep::S3.cycle(vm)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.draw(vm, 11)?;
    client.end(vm)
}

/// Buffers have gone that a slow host can be told of only when there is room in the ring, which takes it longer than the driver waits for
/// room. What is drawn meanwhile has its share.
fn slow_host(case: &mut Case) -> Result<()> {
    const SIZE: (u32, u32) = (1024, 768);
    const RING: usize = 16;
    const BUFFERS: usize = 10 * RING;
    let device = format!("{},id={GPU}", reference_with("vq_size", RING));
    let vm = case.boot(&Machine {
        devices: vec![device],
        ..Machine::on_reference_host(&[])
    })?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let mark = vm.mark();
    let holder = vm.start_program(&["virtgpu-guest", "hold", &BUFFERS.to_string()])?;
    vm.wait_line(holder, "holding", mark)?;
    let host = vm.host()?;
    host.control("reset-counters")?;
    // Ten seconds: as many at a time as the ring holds. The driver waits five for room.
    host.control("fault RESOURCE_UNREF: answer after 1 s")?;
    vm.say(holder, "release")?;
    vm.wait_line(holder, "released", mark)?;
    vm.host()?.wait_faults(1)?;
    client.draw(vm, 1)?;
    let told = vm.host()?.faults()?;
    ensure!(
        told < BUFFERS,
        "the host was told of all buffers before anything was drawn"
    );
    vm.host()?.wait_faults(BUFFERS)?;
    client.draw(vm, 2)?;
    vm.hang_up(holder)?;
    vm.wait_end(holder)?;
    client.end(vm)
}

/// Numbers of feature bits, by their names in `linux/virtio_config.h` and `linux/virtio_ring.h`.
pub mod feature {
    pub const INDIRECT_DESC: usize = 28;
    pub const EVENT_IDX: usize = 29;
    pub const ACCESS_PLATFORM: usize = 33;
    pub const PACKED: usize = 34;
}

/// Sees to it that driver and device have agreed on a feature, or have not.
pub fn expect_feature(vm: &mut Vm, bit: usize, expected: bool) -> Result<()> {
    let features = vm.run("cat /sys/bus/virtio/devices/virtio0/features")?;
    let found = features.as_bytes().get(bit);
    let digit = if expected { &b'1' } else { &b'0' };
    ensure!(
        found == Some(digit),
        "feature {bit} is to be {expected} in {features}"
    );
    Ok(())
}

/// The device cannot reach what is drawn, only a copy, which is as old as the last time that it was synced.
fn bounce_buffers(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        append: "swiotlb=force".into(),
        ..Machine::with_gpu("virtio-gpu-pci,iommu_platform=on")
    })?;
    expect_feature(vm, feature::ACCESS_PLATFORM, true)?;
    let used = |vm: &mut Vm| -> Result<u64> {
        let used = vm.run("cat /sys/kernel/debug/swiotlb/io_tlb_used")?;
        Ok(used.trim().parse()?)
    };
    /// Of bounce buffers, in bytes.
    const SLOT: u64 = 2048;
    /// What the console's commands may have taken before, and given back since.
    const COMMANDS: u64 = 1 << 20;
    let before = used(vm)?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let copied = SLOT * used(vm)?.saturating_sub(before);
    let picture = u64::from(SIZE.0 * SIZE.1 * 4);
    ensure!(
        copied + COMMANDS >= 2 * picture,
        "there is a copy of {copied} bytes of the client's pictures"
    );
    client.end(vm)?;
    survives(vm, |vm| Sleep::S3.cycle(vm))
}

/// Between the device and the memory is an IOMMU: addresses that were not mapped for the device, as those that the processor uses,
/// are no good, before and after sleep. The kernel's log tells of each that the device tries.
fn iommu(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine {
        machine: "q35,hpet=off",
        devices: vec![
            "intel-iommu".into(),
            format!("virtio-gpu-pci,iommu_platform=on,id={GPU}"),
        ],
        append: "intel_iommu=on".into(),
        arguments: ["-trace", "vtd_iotlb_page_update"].map(String::from).into(),
        ..Machine::with_gpu("")
    })?;
    expect_feature(vm, feature::ACCESS_PLATFORM, true)?;
    let group = vm.run("cat /sys/bus/virtio/devices/virtio0/../iommu_group/type")?;
    ensure!(
        group.starts_with("DMA"),
        "the group of the GPU is of type {group}"
    );
    // In this order: after S3 the power button does not wake this machine any more.
    for sleep in [Sleep::Idle, Sleep::S3] {
        survives(vm, |vm| sleep.cycle(vm))?;
    }
    let log = fs::read(vm.dir.join("qemu.log"))?;
    let log = String::from_utf8_lossy(&log);
    let looked_up = log.lines().filter_map(looked_up_page);
    let (same, others): (Vec<_>, Vec<_>) = looked_up.partition(|(from, to)| from == to);
    ensure!(
        same.is_empty() && !others.is_empty(),
        "the IOMMU gave other addresses to {} pages, and to {} their own",
        others.len(),
        same.len()
    );
    Ok(())
}

/// Returns the device's and the memory's page in a line of QEMU's log that tells of an address which the IOMMU looked up.
fn looked_up_page(line: &str) -> Option<(u64, u64)> {
    fn page(text: &str, name: &str) -> Option<u64> {
        /// Of an entry in a table of pages.
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let (_, rest) = text.split_once(name)?;
        let digits = rest.trim_start_matches("0x").split(' ').next()?;
        Some(u64::from_str_radix(digits, 16).ok()? & ADDRESS)
    }
    let arguments = line.strip_prefix("vtd_iotlb_page_update")?;
    Some((page(arguments, " iova ")?, page(arguments, " slpte ")?))
}

/// Creates a large buffer while a client draws; however scattered its pages are, their list fits into the ring.
fn backings(vm: &mut Vm, screen: (u32, u32), size: &str) -> Result<()> {
    let client = Client::start(vm, 1, &[screen])?;
    for round in 2..=3 {
        let outcome = vm.run(&format!("virtgpu-guest create {size}"))?;
        ensure!(outcome.trim() == "created", "a large buffer was {outcome}");
        client.draw(vm, round)?;
    }
    client.end(vm)
}
