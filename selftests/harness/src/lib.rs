// SPDX-License-Identifier: GPL-2.0

//! Boots guests in QEMU, gives them orders, and looks at their screens from the outside.

mod accelerator;
mod cargo;
pub mod case;
pub mod client;
pub mod console;
pub mod debugger;
pub mod host;
pub mod initramfs;
pub mod kernel;
pub mod logs;
pub mod removal;
pub mod screen;
pub mod suspend;
pub mod trace;
pub mod vm;
mod vnc;
