// SPDX-License-Identifier: GPL-2.0

//! Clients that have buffers and show none of them.

use std::collections::BTreeSet;
use std::io::{
    self,
    BufRead, //
};
use std::sync::mpsc;
use std::thread;

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};
use drm::buffer::DrmFourcc;
use drm::control::{
    Device as _,
    dumbbuffer::{
        DumbBuffer,
        DumbMapping, //
    },
    framebuffer, //
};

use crate::card::Card;

/// Sizes of the buffers that come and go, in pixels: from one page to a thousand.
const SIZES: [(u32, u32); 4] = [(32, 32), (64, 64), (300, 200), (1024, 1024)];

/// How many buffers there are at once while they come and go.
const AT_ONCE: usize = 16;

/// Creates buffers, draws into them and destroys them, until there were `enough` and a line has come in; then says how many there were.
pub fn churn(card: &Card, enough: usize) -> Result<()> {
    let (sender, line) = mpsc::channel();
    thread::spawn(move || sender.send(io::stdin().lines().next().is_some()));
    let mut count = 0;
    while count < enough || line.try_recv() == Err(mpsc::TryRecvError::Empty) {
        let mut buffers = Vec::new();
        for size in SIZES.into_iter().cycle().take(AT_ONCE) {
            let mut buffer = card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32)?;
            card.draw(&mut buffer, count as u8, [0, 0, size.0, 1])?;
            buffers.push(buffer);
            count += 1;
        }
        for buffer in buffers {
            card.destroy_dumb_buffer(buffer)?;
        }
        if count == AT_ONCE {
            println!("churning");
        }
    }
    println!("churned {count}");
    Ok(())
}

/// A buffer with all that can hang on it.
struct Held {
    buffer: DumbBuffer,
    framebuffer: framebuffer::Handle,
    map: DumbMapping<'static>,
}

impl Held {
    const SIZE: (u32, u32) = (128, 128);

    fn new(card: &Card) -> Result<Self> {
        let buffer = card.create_dumb_buffer(Self::SIZE, DrmFourcc::Xrgb8888, 32)?;
        let framebuffer = card.add_framebuffer(&buffer, 24, 32)?;
        // The mapping borrows what it is made from, not what it maps.
        let map = card.map_dumb_buffer(Box::leak(Box::new(buffer)))?;
        Ok(Self {
            buffer,
            framebuffer,
            map,
        })
    }
}

/// Holds `count` buffers, each with a framebuffer and a mapping, and does what standard input says:
///
/// - `fill BYTE`: fills them all; `filled BYTE`.
/// - `check BYTE`: expects this byte in all of them; `kept BYTE`.
/// - `release`: gives everything up; `released`, and the errors that there were.
pub fn hold(card: &Card, count: usize) -> Result<()> {
    let mut all = (0..count)
        .map(|_| Held::new(card))
        .collect::<Result<Vec<_>>>()?;
    println!("holding {count}");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["fill", byte] => {
                let byte: u8 = byte.parse()?;
                for held in &mut all {
                    held.map.fill(byte);
                }
                println!("filled {byte}");
            }
            ["check", byte] => {
                let byte: u8 = byte.parse()?;
                for (index, held) in all.iter().enumerate() {
                    let wrong = held.map.iter().find(|found| **found != byte);
                    ensure!(wrong.is_none(), "buffer {index} has a {wrong:?}");
                }
                println!("kept {byte}");
            }
            ["release"] => {
                let mut errors = BTreeSet::new();
                let mut note = |result: io::Result<()>| {
                    errors.extend(result.err().map(|error| error.to_string()));
                };
                for held in all.drain(..) {
                    drop(held.map);
                    note(card.destroy_framebuffer(held.framebuffer));
                    note(card.destroy_dumb_buffer(held.buffer));
                }
                println!(
                    "released {}",
                    errors.into_iter().collect::<Vec<_>>().join(", ")
                );
            }
            _ => bail!("'{line}' is no order"),
        }
    }
    Ok(())
}

/// Creates one buffer, and says `created`, or the error that there was.
pub fn create(card: &Card, size: (u16, u16)) -> Result<()> {
    let size = (size.0.into(), size.1.into());
    match card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32) {
        Ok(buffer) => {
            card.destroy_dumb_buffer(buffer).context("destroying it")?;
            println!("created");
        }
        Err(error) => println!("refused: {error}"),
    }
    Ok(())
}
