// SPDX-License-Identifier: GPL-2.0

//! A program that draws through the console's framebuffer device.

use std::fs::{
    self,
    OpenOptions, //
};
use std::io;

use anyhow::{
    Context,
    Result,
    bail, //
};
use rustix::mm::{
    MapFlags,
    ProtFlags, //
};

/// Where it would be mapped with one entry of a page table if that were allowed.
const HUGE_PAGE: usize = 2 << 20;

/// Maps the framebuffer, and fills lines of it as standard input says.
pub fn paint() -> Result<()> {
    let number = |name: &str| -> Result<usize> {
        let text = fs::read_to_string(format!("/sys/class/graphics/fb0/{name}"))?;
        let last = text.trim().rsplit(',').next().context("nothing in there")?;
        Ok(last.parse()?)
    };
    let (stride, height) = (number("stride")?, number("virtual_size")?);
    let size = stride * height;
    let file = OpenOptions::new().read(true).write(true).open("/dev/fb0")?;

    // SAFETY: The kernel chooses the address, so no memory of ours is replaced.
    let room = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            size + HUGE_PAGE,
            ProtFlags::empty(),
            MapFlags::PRIVATE,
        )?
    };
    let start = room.wrapping_byte_add(room.align_offset(HUGE_PAGE));
    // SAFETY: There is room for `size` bytes from `start` on, which nobody uses.
    let map = unsafe {
        rustix::mm::mmap(
            start,
            size,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
            &file,
            0,
        )?
    };
    // SAFETY: The mapping is `size` bytes long and stays until the program ends. The kernel draws into it too, and does not mind
    // what it finds there; nothing is read here.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), size) };

    println!("mapped");
    for line in io::stdin().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["line", number, byte] => {
                let start = number.parse::<usize>()? * stride;
                let pixels = bytes.get_mut(start..start + stride);
                pixels.context("no such line")?.fill(byte.parse()?);
                println!("filled {number}");
            }
            _ => bail!("'{line}' is no order"),
        }
    }
    Ok(())
}
