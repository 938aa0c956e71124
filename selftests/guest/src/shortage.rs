// SPDX-License-Identifier: GPL-2.0

//! Memory that the kernel does not get, where it can be told to (CONFIG_FAULT_INJECTION).

use std::fs::{
    self,
    File, //
};
use std::io::{
    self,
    Write, //
};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{
    Context,
    Result, //
};
use clap::Subcommand;
use drm::buffer::DrmFourcc;
use drm::control::Device as _;
use rustix::io::write;
use rustix::param::page_size;
use rustix::pipe::{
    fcntl_setpipe_size,
    pipe, //
};

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

/// How many pages a pipe holds, and how many pairs of pipes there are: half of the pages are 32 MiB.
const PIPE_PAGES: usize = 256;
const PIPE_PAIRS: usize = 32;

/// Frees many pages of which no two are neighbours: of two that were taken one after the other, the second. Returns what holds the
/// others; the kernel cannot move them.
fn scatter() -> Result<Vec<(OwnedFd, OwnedFd)>> {
    let page = vec![0; page_size()];
    let mut kept = Vec::new();
    let mut freed = Vec::new();
    for _ in 0..PIPE_PAIRS {
        let pair = [pipe()?, pipe()?];
        for (_, end) in &pair {
            fcntl_setpipe_size(end, PIPE_PAGES * page.len())?;
        }
        for _ in 0..PIPE_PAGES {
            for (_, end) in &pair {
                write(end, &page)?;
            }
        }
        let [first, second] = pair;
        kept.push(first);
        freed.push(second);
    }
    drop(freed);
    Ok(kept)
}

/// Creates a buffer of scattered pages, while the kernel has no two pages side by side for this thread (`fail_page_alloc`, which the
/// caller has set up for tasks that are to fail). Says what came of it as [`during`] does.
pub fn create_scattered(card: &Card, size: (u16, u16)) -> Result<()> {
    const FAIL: &str = "/proc/thread-self/make-it-fail";
    let size = (size.0.into(), size.1.into());
    let pages = scatter()?;
    fs::write(FAIL, "1").context(FAIL)?;
    let outcome = card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32);
    fs::write(FAIL, "0").context(FAIL)?;
    drop(pages);
    match outcome {
        Ok(_) => println!("tried true ok"),
        Err(error) => println!("tried true {error}"),
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
