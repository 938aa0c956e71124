// SPDX-License-Identifier: GPL-2.0

//! Suspend, some hundred times in one boot. What a cycle leaves behind, however little it is, adds up.

use std::collections::{
    BTreeMap,
    BTreeSet, //
};
use std::fmt::Write as _;
use std::fs;

use anyhow::{
    Context,
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::logs;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::{
    Machine,
    Vm, //
};

const CYCLES: usize = 500;

/// After so many cycles, what is made once has been made.
const WARM_UP: usize = 50;

/// In one of so many cycles there are flips and new buffers, and the pictures are looked at.
const INTERVAL: usize = 4;

/// By how many objects a slab may grow. Those that a processor has at hand count, all of them or none, and there are 64 of the smallest;
/// what leaks one in each cycle that is looked at leaks 112, and what leaks one for each seed of [`crate::faults`] 90.
const OBJECTS: u64 = 80;

/// By how many KiB the kernel's pages may become more: one in every cycle that is looked at, or for each seed, is more than that.
const MEMORY: u64 = 256;

/// Buffers that somebody has.
const HELD: &str = "20";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("soak::cycles::stock", |case| {
            let machine = Machine {
                arguments: ["-trace", "virtio_set_status"].map(String::from).into(),
                ..Machine::with_gpu("virtio-gpu-pci")
            };
            cycles(case, &machine, (1280, 800), " resources recovered")
        }),
        trial("soak::cycles::reference", |case| {
            let machine = Machine::on_reference_host(&[]);
            cycles(
                case,
                &machine,
                (1024, 768),
                "resumed, the host kept its resources",
            )
        }),
    ]
}

/// What is in use.
pub(crate) struct Usage {
    /// Objects in each of the kernel's slabs.
    slabs: BTreeMap<String, u64>,
    /// Pages of the kernel that are not in slabs, in KiB.
    memory: u64,
    /// Resources of the host, framebuffers, and interrupts.
    ids: [usize; 3],
}

impl Usage {
    pub(crate) fn measure(vm: &mut Vm) -> Result<Self> {
        // Without what a processor has at hand: by one program, because each that starts takes some in hand.
        let slabinfo = vm.run(
            "for slab in /sys/kernel/slab/*/shrink; do echo 1 > $slab; done; \
             while read -r line; do echo \"$line\"; done < /proc/slabinfo",
        )?;
        let mut slabs = BTreeMap::new();
        for line in slabinfo.lines() {
            let mut words = line.split_whitespace();
            if let (Some(name), Some(Ok(active))) = (words.next(), words.next().map(str::parse)) {
                slabs.insert(name.to_owned(), active);
            }
        }
        // Addresses that have been given back are collected some thousand at once.
        let unpurged = vm.run("grep -c unpurged /proc/vmallocinfo || true")?;
        let areas: &mut u64 = slabs
            .get_mut("vmap_area")
            .context("there is no such slab")?;
        *areas -= unpurged.trim().parse::<u64>()?;
        // What is left is pages that somebody in the kernel has taken, and not those that a processor has at hand, which are megabytes.
        let memory = vm.run(
            "awk '/^MemTotal:/ { left = $2 } /^(MemFree|Buffers|Cached|AnonPages|Slab|PageTables|KernelStack):/ { left -= $2 } \
             /^ +count:/ { left -= 4 * $2 } END { print left }' /proc/meminfo /proc/zoneinfo",
        )?;
        let mut count = |command: &str| -> Result<usize> { Ok(vm.run(command)?.trim().parse()?) };
        // Without a driver there are none, and no file.
        let framebuffers =
            count("cat /sys/kernel/debug/dri/0/framebuffer | grep -c '^framebuffer\\[' || true")?;
        let interrupts = count("ls /proc/irq | wc -l")?;
        Ok(Self {
            slabs,
            memory: memory.trim().parse()?,
            ids: [resources(vm)?, framebuffers, interrupts],
        })
    }

    /// Writes what has become more or less.
    fn compare(&self, later: &Self) -> Result<String> {
        let mut text = String::new();
        for (name, later) in &later.slabs {
            let earlier = self.slabs.get(name).copied().unwrap_or(0);
            if *later != earlier {
                writeln!(text, "objects of {name}: {earlier}, {later}")?;
            }
        }
        writeln!(text, "KiB of pages: {}, {}", self.memory, later.memory)?;
        writeln!(text, "ids in use: {:?}, {:?}", self.ids, later.ids)?;
        Ok(text)
    }

    /// Measures again, writes down what has become more or less, and expects that it is not much more.
    pub(crate) fn expect_no_growth(&self, vm: &mut Vm) -> Result<()> {
        let later = Self::measure(vm)?;
        fs::write(vm.dir.join("usage"), self.compare(&later)?)?;
        for (name, later) in &later.slabs {
            let earlier = self.slabs.get(name).copied().unwrap_or(0);
            ensure!(
                *later <= earlier + OBJECTS,
                "there were {earlier} objects of {name}, and are {later}"
            );
        }
        ensure!(
            later.memory <= self.memory + MEMORY,
            "the kernel had {} KiB of pages, and has {}",
            self.memory,
            later.memory
        );
        ensure!(
            self.ids == later.ids,
            "resources, framebuffers and interrupts were {:?}, and are {:?}",
            self.ids,
            later.ids
        );
        Ok(())
    }
}

/// How many resources the host has.
fn resources(vm: &Vm) -> Result<usize> {
    if let Some(host) = &vm.host {
        let state = host.control("state")?;
        return Ok(state["resources"].as_array().context("no list")?.len());
    }
    let log = fs::read_to_string(vm.dir.join("qemu.log"))?;
    let is_reset = |line: &str| line.starts_with("virtio_set_status") && line.ends_with(" val 0");
    let log: Vec<_> = log
        .lines()
        .rev()
        .take_while(|line| !is_reset(line))
        .collect();
    let mut live = BTreeSet::new();
    for line in log.into_iter().rev() {
        match logs::resource_commands(line).first() {
            Some(("res_create_2d", id)) => ensure!(live.insert(*id), "{id} was created twice"),
            Some(("res_unref", id)) => ensure!(live.remove(id), "{id} was not there"),
            _ => {}
        }
    }
    Ok(live.len())
}

fn cycles(case: &mut Case, machine: &Machine, size: (u32, u32), outcome: &str) -> Result<()> {
    let vm = case.boot(machine)?;
    let client = Client::start(vm, 0, &[size])?;
    let mark = vm.mark();
    let holder = vm.start_program(&["virtgpu-guest", "hold", HELD])?;
    vm.wait_line(holder, "holding", mark)?;
    let mut warm = None;
    for cycle in 1..=CYCLES {
        let sleep = match cycle % 2 {
            0 => Sleep::S3,
            _ => Sleep::Idle,
        };
        // One that differs from the one before it, of which there are fewer than 256.
        let seed = (cycle % 200) as u8;
        let act = |vm: &mut Vm| -> Result<()> {
            // Both kinds of sleep have their turn.
            if cycle % INTERVAL > 1 {
                sleep.cycle(vm)?;
                return client.draw_unseen(vm, seed);
            }
            let seeds = client.start_flips(vm)?;
            sleep.cycle(vm)?;
            client.expect_flips(vm, seeds)?;
            client.stop_flips(vm)?;
            let created = vm.run("virtgpu-guest create 1024x768")?;
            ensure!(created.trim() == "created", "a buffer was {created}");
            client.draw(vm, seed)
        };
        act(vm).with_context(|| format!("cycle {cycle}, {sleep:?}"))?;
        if cycle == WARM_UP {
            warm = Some(Usage::measure(vm)?);
        }
    }
    warm.context("it was never warm")?.expect_no_growth(vm)?;
    client.end(vm)?;

    let console = fs::read_to_string(vm.dir.join("console.log"))?;
    let resumed = console.lines().filter(|line| line.contains("resumed, "));
    let (right, wrong): (Vec<_>, Vec<_>) = resumed.partition(|line| line.contains(outcome));
    ensure!(
        right.len() == CYCLES && wrong.is_empty(),
        "of {CYCLES} cycles, {} ended with '{outcome}', and {} otherwise",
        right.len(),
        wrong.len()
    );
    Ok(())
}
