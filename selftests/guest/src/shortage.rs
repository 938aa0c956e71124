// SPDX-License-Identifier: GPL-2.0

//! Memory that the kernel does not get, where it can be told to (CONFIG_FAULT_INJECTION).

use std::fs::File;
use std::io::{
    self,
    Write, //
};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{
    Context,
    Result, //
};
use clap::Subcommand;
use drm::buffer::DrmFourcc;
use drm::control::Device as _;

use crate::card::Card;

/// Where a thread says which of its next allocations in the kernel is to fail, and reads how far it is from that one; 0 when that
/// has failed.
const COUNTDOWN: &str = "/proc/thread-self/fail-nth";

/// Has the kernel do something for this thread, in which its allocation `nth`, counted from 1, fails; none for 0.
///
/// Prints `tried`, whether it came to that allocation, and what came of it all: `ok`, or the error.
pub fn during<T>(nth: u32, act: impl FnOnce() -> io::Result<T>) -> Result<()> {
    let mut left = [0; 16];
    let countdown = File::options().read(true).write(true).open(COUNTDOWN);
    let countdown = countdown.context(COUNTDOWN)?;
    countdown.write_at(nth.to_string().as_bytes(), 0)?;
    let outcome = act();
    let length = countdown.read_at(&mut left, 0)?;
    countdown.write_at(b"0", 0)?;
    let failed = nth != 0 && left[..length].trim_ascii() == b"0";
    match outcome {
        Ok(_) => println!("tried {failed} ok"),
        Err(error) => println!("tried {failed} {error}"),
    }
    Ok(())
}

/// What can be done while memory is short.
#[derive(Subcommand)]
pub enum Act {
    /// Create a buffer of this size, such as 64x64.
    Create {
        #[arg(value_parser = crate::parse_size)]
        size: (u16, u16),
    },
    /// Write a text to a file of the kernel's.
    Write { path: PathBuf, text: String },
}

impl Act {
    /// Does it, while allocation `nth` fails; see [`during`].
    pub fn run(self, nth: u32) -> Result<()> {
        match self {
            Self::Create { size } => {
                let card = Card::open()?;
                let size = (size.0.into(), size.1.into());
                during(nth, || {
                    card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32)
                })?;
            }
            Self::Write { path, text } => {
                let file = File::options().write(true).open(&path);
                let mut file = file.with_context(|| path.display().to_string())?;
                during(nth, || file.write_all(text.as_bytes()))?;
            }
        }
        Ok(())
    }
}
