// SPDX-License-Identifier: GPL-2.0

//! Guest side of the virtio-gpu selftests.

mod agent;
mod alarm;
mod buffers;
mod card;
mod checks;
mod client;
mod fbdev;
mod fence;
mod ktap;
mod shortage;
mod uevents;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{
    Context,
    Result,
    bail, //
};
use clap::{
    Parser,
    Subcommand, //
};

use crate::card::Card;

/// Clients and checks for a guest with a virtio GPU.
///
/// `virtgpu-guest selftest` runs by hand, as root, in any guest whose GPU is driven by virtio_gpu (the Rust driver or the C
/// driver), on the text console, with no compositor running. Only the host sees whether a picture is really on the screen; the
/// harness next door adds that part.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Check the driver from within the guest, and print the results as KTAP.
    ///
    /// identity: name, version, connectors, debugfs. dumb: a dumb buffer keeps its contents. addfb_bad: framebuffers that reach
    /// out of their buffer are refused. modes: every mode can be set. flip_rate: flips come at the mode's rate. dirtyfb: parts of
    /// a framebuffer can be updated. console: text reaches the framebuffer. suspend_devices: the devices are suspended and
    /// resumed (pm_test), and flips go on without a complaint in the kernel's log.
    Selftest {
        /// Checks to run; all, if none is named.
        names: Vec<String>,
    },
    /// Draw test pictures on every connected output, as standard input says.
    ///
    /// `draw SEED` draws a picture off screen and flips to it. `flip` flips between the last two pictures until the next line.
    /// `part SEED X Y WIDTH HEIGHT` draws on screen, and declares only that part dirty. `set SEED NTH` sets the mode anew to show
    /// a picture, while the kernel runs short of memory as for `short`. `fence SEED` draws off screen and flips to it, and keeps
    /// the fence of that; then there are `wait` for the fence, `close` for the card, and `ask`. Each is answered with a line.
    Client {
        /// The first picture.
        #[arg(default_value_t = 1)]
        seed: u8,
        /// Size of the mode, such as 1024x768; the preferred mode, if not given.
        #[arg(long, value_parser = parse_size)]
        mode: Option<(u16, u16)>,
    },
    /// Create and destroy buffers until a line comes in, and print how many there were.
    Churn {
        /// At least so many.
        #[arg(default_value_t = 0)]
        enough: usize,
    },
    /// Hold buffers with framebuffers and mappings, as standard input says.
    ///
    /// `fill BYTE` fills them, `check BYTE` expects that they have kept it, `release` gives them up. Each is answered with a line.
    Hold {
        /// How many.
        count: usize,
    },
    /// Draw through a mapping of /dev/fb0, as standard input says.
    ///
    /// `line NUMBER BYTE` fills a line of it, and is answered with a line.
    Paint,
    /// Create a buffer of this size, such as 1024x768, and destroy it; print what became of it.
    Create {
        #[arg(value_parser = parse_size)]
        size: (u16, u16),
    },
    /// Do something while one of the kernel's allocations for it fails, where the kernel can do that (CONFIG_FAULT_INJECTION).
    ///
    /// Prints `tried`, whether there was that allocation, and `ok` or the error.
    Short {
        /// Which one, counted from 1; none for 0.
        nth: u32,
        #[command(subcommand)]
        act: shortage::Act,
    },
    /// Create a buffer of this size, of scattered pages, while the kernel has no two pages side by side for that.
    Scattered {
        #[arg(value_parser = parse_size)]
        size: (u16, u16),
    },
    /// Keep alarms of which one is about to go off, until the end of standard input or for two minutes: the kernel refuses to suspend.
    Alarm,
    /// Print the driver's name and version, the connectors and their modes, as JSON.
    Info,
    /// Print size and fingerprint of every framebuffer that is being scanned out, as JSON.
    Framebuffers,
    /// Print the kernel's uevents.
    Uevents,
    /// Run programs for a harness at the other end of a serial line.
    Agent {
        /// The line, such as /dev/ttyS1.
        line: PathBuf,
    },
}

/// Reads a size such as 1024x768.
fn parse_size(text: &str) -> Result<(u16, u16)> {
    let (width, height) = text.split_once('x').context("a size looks like 1024x768")?;
    Ok((width.parse()?, height.parse()?))
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        What::Selftest { names } => return selftest(&names),
        What::Client { seed, mode } => client::serve(Card::open()?, seed, mode)?,
        What::Churn { enough } => buffers::churn(&Card::open()?, enough)?,
        What::Hold { count } => buffers::hold(&Card::open()?, count)?,
        What::Paint => fbdev::paint()?,
        What::Create { size } => buffers::create(&Card::open()?, size)?,
        What::Short { nth, act } => act.run(nth)?,
        What::Scattered { size } => shortage::create_scattered(&Card::open()?, size)?,
        What::Alarm => alarm::hold()?,
        What::Info => println!("{}", serde_json::to_string(&Card::open()?.info()?)?),
        What::Framebuffers => println!("{}", serde_json::to_string(&Card::open()?.shown()?)?),
        What::Uevents => uevents::print()?,
        What::Agent { line } => agent::serve(&line)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn selftest(names: &[String]) -> Result<ExitCode> {
    let known = |name: &String| checks::ALL.iter().any(|check| check.name == name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        let all: Vec<_> = checks::ALL.iter().map(|check| check.name).collect();
        bail!("there is no check '{unknown}', only {}", all.join(", "));
    }
    let chosen =
        |check: &&ktap::Check| names.is_empty() || names.iter().any(|name| name == check.name);
    let checks: Vec<_> = checks::ALL.iter().filter(chosen).collect();
    Ok(ktap::run(&checks))
}
