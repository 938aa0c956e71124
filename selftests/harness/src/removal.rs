// SPDX-License-Identifier: GPL-2.0

//! A device that vanishes: its guest is not asked, and what is read from it is all ones.
//!
//! QEMU takes the GPU away at once when its slot is switched off, which a guest does after the driver has let go of it; here it is done
//! from outside, over QEMU's test protocol. QEMU reads zeros where nothing is, but nobody answers on a real bus, and that is all ones: a
//! piece of read-only memory, which the guest does not see, is laid over the registers. By itself that makes a device which is there,
//! hears nothing, and never finishes a reset.

use std::io::{
    BufRead,
    BufReader,
    Write, //
};
use std::os::unix::net::UnixStream;

use anyhow::{
    Context,
    Result,
    ensure, //
};
use serde_json::{
    Value,
    json, //
};

use crate::vm::{
    GPU,
    LIMIT,
    Vm, //
};

/// Where the machine must have the GPU.
pub const PORT: &str = "port0";

/// What has to be said of that port: nothing but its indicator then says that its power is off.
pub const PORT_PROPERTIES: &str = "power_controller_present=off";

/// The memory that is laid over the registers, the least that a bridge passes on, in bytes.
pub(crate) const ONES_SIZE: u64 = 1 << 20;

/// Where it is among PCI functions: no guest looks for a second one where there is no first.
pub(crate) const ONES_PLACE: (u64, u64) = (0x1e, 1);

/// Where Q35 has the configuration space of its PCI functions, of which each has 4 KiB.
const CONFIG: u64 = 0xb000_0000;

const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const BAR0: u64 = 0x10;
const BAR2: u64 = 0x18;
const BAR_ADDRESS: u64 = !0xf;
const CAPABILITIES: u64 = 0x34;

/// The capability of a PCI Express function, and what is in it of a slot.
const EXPRESS: u16 = 0x10;
const SLOT_CONTROL: u64 = 0x18;
const PRESENCE_INTERRUPT: u16 = 1 << 3;
const INDICATOR_OFF: u16 = 3 << 8;
const POWER_OFF: u16 = 1 << 10;

/// What is on the machine's bus, as QEMU's test protocol shows it.
struct Bus(BufReader<UnixStream>);

impl Bus {
    fn open(vm: &Vm) -> Result<Self> {
        let path = vm.bus()?;
        let stream = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn ask(&mut self, text: &str) -> Result<String> {
        writeln!(self.0.get_mut(), "{text}")?;
        let mut answer = String::new();
        self.0
            .read_line(&mut answer)
            .with_context(|| format!("waiting for the answer to {text}"))?;
        let value = answer.strip_prefix("OK");
        Ok(value
            .with_context(|| format!("QEMU says '{answer}' to {text}"))?
            .trim()
            .to_owned())
    }

    fn read(&mut self, size: char, address: u64) -> Result<u64> {
        let answer = self.ask(&format!("read{size} {address:#x}"))?;
        let digits = answer.strip_prefix("0x");
        let digits = digits.with_context(|| format!("'{answer}' is no number"))?;
        Ok(u64::from_str_radix(digits, 16)?)
    }

    fn read16(&mut self, address: u64) -> Result<u16> {
        Ok(self.read('w', address)?.try_into()?)
    }

    fn write16(&mut self, address: u64, value: u16) -> Result<()> {
        self.ask(&format!("writew {address:#x} {value:#x}"))
            .map(drop)
    }

    fn write32(&mut self, address: u64, value: u32) -> Result<()> {
        self.ask(&format!("writel {address:#x} {value:#x}"))
            .map(drop)
    }
}

/// Address of a PCI function's configuration space.
fn config(bus: u64, (slot, function): (u64, u64)) -> u64 {
    CONFIG + (bus << 20) + (slot << 15) + (function << 12)
}

/// Finds the PCI function with a name.
fn find(vm: &mut Vm, id: &str) -> Result<Value> {
    fn among<'a>(functions: &'a Value, id: &str) -> Option<&'a Value> {
        let functions = functions.as_array()?;
        let by_name = functions.iter().find(|one| one["qdev_id"] == id);
        by_name.or_else(|| {
            let mut bridges = functions.iter();
            bridges.find_map(|one| among(&one["pci_bridge"]["devices"], id))
        })
    }
    let buses = vm.monitor("query-pci", json!({}))?;
    let mut buses = buses.as_array().into_iter().flatten();
    buses
        .find_map(|bus| among(&bus["devices"], id))
        .cloned()
        .with_context(|| format!("the machine has no {id}"))
}

/// Address of the configuration space of what [`find`] has found.
fn place(function: &Value) -> Result<u64> {
    let number = |name: &str| function[name].as_u64().context("it has a place");
    Ok(config(
        number("bus")?,
        (number("slot")?, number("function")?),
    ))
}

/// Has every register of the GPU read as all ones, and hear nothing. The rest of it is there.
pub fn cover(vm: &mut Vm) -> Result<()> {
    let gpu = find(vm, GPU)?;
    // Which BAR that is depends on the device, and where it is QEMU does not say of one that sleeps.
    let mut regions = gpu["regions"].as_array().into_iter().flatten();
    let registers = regions.find(|region| region["mem_type_64"] == true);
    let registers = registers.and_then(|region| region["bar"].as_u64());
    let registers = registers.context("the GPU has no registers")?;
    let mut bus = Bus::open(vm)?;
    let registers = place(&gpu)? + BAR0 + 4 * registers;
    let low = bus.read('l', registers)? & BAR_ADDRESS;
    let address = bus.read('l', registers + 4)? << 32 | low;
    let ones = config(0, ONES_PLACE);
    let from = address & !(ONES_SIZE - 1);
    bus.write32(ones + BAR2, from as u32)?;
    bus.write32(ones + BAR2 + 4, (from >> 32) as u32)?;
    bus.write16(ones + COMMAND, COMMAND_MEMORY)?;
    let value = bus.read16(address)?;
    ensure!(value == u16::MAX, "the GPU still reads as {value:#x}");
    Ok(())
}

/// Lets the GPU's registers be seen again, if there is one.
pub fn uncover(vm: &Vm) -> Result<()> {
    Bus::open(vm)?.write16(config(0, ONES_PLACE) + COMMAND, 0)
}

/// Pulls the GPU out. When this returns, it is gone.
pub fn pull(vm: &mut Vm) -> Result<()> {
    cover(vm)?;
    let mark = vm.mark();
    let port = find(vm, PORT)?;
    let port = place(&port)?;
    let mut bus = Bus::open(vm)?;
    let mut at = bus.read16(port + CAPABILITIES)? & 0xff;
    let express = loop {
        ensure!(at != 0, "the port is none of PCI Express");
        let header = bus.read16(port + u64::from(at))?;
        if header & 0xff == EXPRESS {
            break port + u64::from(at);
        }
        at = header >> 8;
    };
    let control = bus.read16(express + SLOT_CONTROL)?;
    bus.write16(
        express + SLOT_CONTROL,
        control | POWER_OFF | INDICATOR_OFF | PRESENCE_INTERRUPT,
    )?;
    vm.wait_unplugged(mark)
}

/// Puts a GPU in again, that of a reference host, and waits until the guest has a card.
pub fn plug(vm: &mut Vm) -> Result<()> {
    uncover(vm)?;
    vm.plug(PORT)
}
