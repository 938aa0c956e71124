// SPDX-License-Identifier: GPL-2.0

//! What the guest programs and the harness on the host have to agree on.

pub mod picture;
pub mod wire;
