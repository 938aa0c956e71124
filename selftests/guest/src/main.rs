// SPDX-License-Identifier: GPL-2.0

//! Guest side of the virtio-gpu selftests.

mod agent;
mod card;

use std::path::PathBuf;

use anyhow::Result;
use clap::{
    Parser,
    Subcommand, //
};

use crate::card::Card;

/// Clients and checks for a guest with a virtio GPU.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Run programs for a harness at the other end of a serial line.
    Agent {
        /// The line, such as /dev/ttyS1.
        line: PathBuf,
    },
    /// Print the driver's name and version, the connectors and their modes, as JSON.
    Info,
    /// Print size and fingerprint of every framebuffer that is being scanned out, as JSON.
    Framebuffers,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        What::Agent { line } => agent::serve(&line)?,
        What::Info => println!("{}", serde_json::to_string(&Card::open()?.info()?)?),
        What::Framebuffers => println!("{}", serde_json::to_string(&Card::open()?.shown()?)?),
    }
    Ok(())
}
