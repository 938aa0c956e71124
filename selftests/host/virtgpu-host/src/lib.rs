// SPDX-License-Identifier: GPL-2.0

//! A strict virtio-gpu device for tests, as a vhost-user back-end.
//!
//! [`device`] is the device itself, and can be driven without a virtual machine; [`backend`] puts
//! it behind virtqueues.

#![warn(missing_docs)]

pub mod backend;
pub mod control;
pub mod device;
pub mod display;
pub mod fault;
pub mod options;
pub mod record;
pub mod resource;
mod sys;
pub mod vring;
