// SPDX-License-Identifier: GPL-2.0

//! The control channel: what the harness orders, and what the agent in the guest reports. One JSON value a line.

use serde::{
    Deserialize,
    Serialize, //
};

/// From the host to the agent. `id` is chosen by the host and names the program from its start on.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Starts a program, which is looked up in `PATH`.
    Start { id: u32, argv: Vec<String> },
    /// Gives the program a line on its standard input.
    Say { id: u32, text: String },
    /// Closes the program's standard input.
    HangUp { id: u32 },
    /// Sends the program a signal.
    Signal { id: u32, signal: i32 },
}

/// From the agent to the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// The agent listens.
    Ready,
    /// The program wrote a line to its standard output.
    Out { id: u32, text: String },
    /// The program wrote a line to its standard error.
    Err { id: u32, text: String },
    /// The program ended, and everything that it wrote has been reported. A signal's number is counted from 128.
    Ended { id: u32, code: i32 },
}

/// An output of the display as `virtgpu-guest info` prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Output {
    pub connector: u32,
    pub name: String,
    pub connected: bool,
    pub modes: Vec<Mode>,
}

/// A display mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mode {
    pub width: u32,
    pub height: u32,
    /// In Hz, rounded.
    pub refresh: u32,
    pub preferred: bool,
}

/// The card as `virtgpu-guest info` prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CardInfo {
    pub driver: String,
    pub version: [i32; 3],
    /// `DRM_CAP_...`, as far as the `drm` crate has names for them.
    pub capabilities: Vec<(String, u64)>,
    pub outputs: Vec<Output>,
}

/// A framebuffer that is being scanned out, as `virtgpu-guest framebuffers` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    pub connector: u32,
    pub width: u32,
    pub height: u32,
    /// [`crate::picture::fingerprint`] of the guest's own copy.
    pub fingerprint: u64,
}
