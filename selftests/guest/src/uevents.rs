// SPDX-License-Identifier: GPL-2.0

//! The kernel's uevents, for whoever waits for a hotplug.

use anyhow::Result;
use rustix::net::{
    AddressFamily,
    RecvFlags,
    SocketType,
    bind,
    netlink::{
        self,
        SocketAddrNetlink, //
    },
    recv,
    socket, //
};

/// Group of the kernel's own messages.
const KERNEL: u32 = 1;

/// Prints `listening`, and then every uevent on a line of its own, for ever.
pub fn print() -> Result<()> {
    let socket = socket(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
    println!("listening");
    let mut message = [0; 8192];
    loop {
        let (length, _) = recv(&socket, &mut message[..], RecvFlags::empty())?;
        let text = String::from_utf8_lossy(&message[..length]).into_owned();
        println!("uevent {}", text.trim_end_matches('\0').replace('\0', " "));
    }
}
