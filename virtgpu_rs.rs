// SPDX-License-Identifier: GPL-2.0

//! Rust reference driver for the virtio GPU.
//!
//! Takes the place of the C driver, `virtio-gpu`: user space finds the same device under the same
//! name. See `Documentation/gpu/virtgpu-rs.rst` for how it is built.

mod command;
mod debugfs;
mod display;
mod driver;
mod features;
mod file;
mod object;
mod pm;
mod queue;
mod uapi;

use kernel::{
    driver::Registration,
    prelude::*,
    virtio, //
};

/// The module: as long as it lives, the driver is registered with the virtio bus.
#[pin_data]
struct VirtgpuRs {
    #[pin]
    _driver: Registration<virtio::Adapter<driver::VirtioDriver>>,
}

impl kernel::InPlaceModule for VirtgpuRs {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // The name that sysfs and scripts know.
            _driver <- Registration::new(c"virtio_gpu", module),
        })
    }
}

module! {
    type: VirtgpuRs,
    name: "virtgpu_rs",
    authors: ["The virtgpu_rs developers"],
    description: "Rust reference driver for the virtio GPU",
    license: "GPL",
    params: {
        modeset: i32 {
            default: -1,
            description: "Disable/Enable modesetting",
        },
        freezing: i32 {
            default: -1,
            description: "The host keeps resources over suspend: -1 find out, 0 no, 1 yes",
        },
        freezing_bit: u32 {
            default: 5,
            description: "The feature bit by which the host says so: 5, or 6 to 23",
        },
    },
}
