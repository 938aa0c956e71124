// SPDX-License-Identifier: GPL-2.0

//! A client that draws test pictures on every connected output, as it is told on its standard input.

use std::io;
use std::sync::mpsc::{
    self,
    Receiver, //
};
use std::thread;
use std::time::Duration;

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};
use drm::buffer::DrmFourcc;
use drm::control::{
    ClipRect,
    Device as _,
    Event,
    Mode,
    PageFlipFlags,
    connector,
    crtc,
    dumbbuffer::DumbBuffer,
    framebuffer, //
};
use rustix::event::{
    PollFd,
    PollFlags,
    Timespec,
    poll, //
};

use crate::card::{
    Card,
    restarted, //
};
use crate::fence::Fence;
use crate::shortage;

/// How long the event of a page flip may take, on the guest's clock.
const FLIP_LIMIT: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// A framebuffer with a test picture.
struct Frame {
    buffer: DumbBuffer,
    framebuffer: framebuffer::Handle,
    size: (u32, u32),
    seed: u8,
}

impl Frame {
    fn new(card: &Card, (width, height): (u32, u32), seed: u8) -> Result<Self> {
        let mut buffer = card.create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 32)?;
        card.draw(&mut buffer, seed, [0, 0, width, height])?;
        let framebuffer = card.add_framebuffer(&buffer, 24, 32)?;
        Ok(Self {
            buffer,
            framebuffer,
            size: (width, height),
            seed,
        })
    }

    fn redraw(&mut self, card: &Card, seed: u8) -> Result<()> {
        card.draw(&mut self.buffer, seed, [0, 0, self.size.0, self.size.1])?;
        self.seed = seed;
        Ok(())
    }

    fn destroy(self, card: &Card) -> Result<()> {
        card.destroy_framebuffer(self.framebuffer)?;
        card.destroy_dumb_buffer(self.buffer)?;
        Ok(())
    }
}

/// An output with two frames, of which `frames[0]` is on screen.
struct Head {
    connector: connector::Handle,
    crtc: crtc::Handle,
    mode: Mode,
    frames: [Frame; 2],
}

/// A client of the card.
pub struct Client {
    card: Card,
    heads: Vec<Head>,
}

/// The first output shows the picture that is asked for, the next ones others.
fn seed_of_head(seed: u8, head: usize) -> u8 {
    seed.wrapping_add(16 * head as u8)
}

impl Client {
    /// Shows test picture `seed` on every connected output, in the mode `size` or the preferred one.
    pub fn new(card: Card, seed: u8, size: Option<(u16, u16)>) -> Result<Self> {
        let mut heads = Vec::new();
        for (index, (connector, crtc)) in card.connected()?.into_iter().enumerate() {
            let modes = connector.modes();
            let mode =
                match size {
                    None => modes
                        .first()
                        .with_context(|| format!("{connector} has no modes"))?,
                    Some((width, height)) => modes
                        .iter()
                        .find(|mode| mode.size() == (width, height))
                        .with_context(|| format!("{connector} has no mode {width}x{height}"))?,
                };
            let size = (mode.size().0.into(), mode.size().1.into());
            let frame = |seed| Frame::new(&card, size, seed_of_head(seed, index));
            let frames = [frame(seed)?, frame(!seed)?];
            heads.push(Head {
                connector: connector.handle(),
                crtc,
                mode: *mode,
                frames,
            });
        }
        ensure!(!heads.is_empty(), "no connector is connected");
        let client = Self { card, heads };
        for head in &client.heads {
            let framebuffer = Some(head.frames[0].framebuffer);
            let connectors = [head.connector];
            let (card, crtc, mode) = (&client.card, head.crtc, Some(head.mode));
            restarted(|| card.set_crtc(crtc, framebuffer, (0, 0), &connectors, mode))?;
        }
        Ok(client)
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The mode of the first output.
    pub fn mode(&self) -> Mode {
        self.heads[0].mode
    }

    /// Flips every output to its other frame, and returns the time of the first output's event.
    pub fn flip(&mut self) -> Result<Duration> {
        for head in &mut self.heads {
            head.frames.swap(0, 1);
            let framebuffer = head.frames[0].framebuffer;
            let (card, crtc) = (&self.card, head.crtc);
            restarted(|| card.page_flip(crtc, framebuffer, PageFlipFlags::EVENT, None))?;
        }
        let mut pending: Vec<_> = self.heads.iter().map(|head| head.crtc).collect();
        let mut first = None;
        while !pending.is_empty() {
            let mut fds = [PollFd::new(&self.card, PollFlags::IN)];
            match poll(&mut fds, Some(&FLIP_LIMIT)) {
                Ok(0) => bail!("no flip event within {} s", FLIP_LIMIT.tv_sec),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in restarted(|| self.card.receive_events())? {
                if let Event::PageFlip(event) = event {
                    pending.retain(|crtc| *crtc != event.crtc);
                    if event.crtc == self.heads[0].crtc {
                        first = Some(event.duration);
                    }
                }
            }
        }
        first.context("the flip's event named another CRTC")
    }

    /// Draws test picture `seed` off screen, and flips to it.
    pub fn draw(&mut self, seed: u8) -> Result<()> {
        for (index, head) in self.heads.iter_mut().enumerate() {
            head.frames[1].redraw(&self.card, seed_of_head(seed, index))?;
        }
        self.flip()?;
        Ok(())
    }

    /// Draws test picture `seed` off screen, and has the first output flip to it, without waiting. Returns the fence of that.
    fn draw_with_fence(&mut self, seed: u8) -> Result<Fence> {
        let head = &mut self.heads[0];
        head.frames[1].redraw(&self.card, seed)?;
        head.frames.swap(0, 1);
        Fence::of_flip(&self.card, head.crtc, head.frames[0].framebuffer)
    }

    /// Draws test picture `seed` into the frame that is on the first output, and declares a part of it dirty: the rest must not
    /// reach the screen.
    pub fn draw_and_show_part(&mut self, seed: u8, [x, y, width, height]: [u16; 4]) -> Result<()> {
        let frame = &mut self.heads[0].frames[0];
        frame.redraw(&self.card, seed)?;
        let clip = ClipRect::new(x, y, x + width, y + height);
        restarted(|| self.card.dirty_framebuffer(frame.framebuffer, &[clip]))?;
        Ok(())
    }

    /// Turns every output off, draws test picture `seed` off screen, and turns the outputs on again to show it, while the kernel's
    /// allocation `nth` fails; see [`shortage::during`].
    pub fn set(&mut self, seed: u8, nth: u32) -> Result<()> {
        for (index, head) in self.heads.iter_mut().enumerate() {
            self.card.set_crtc(head.crtc, None, (0, 0), &[], None)?;
            head.frames.swap(0, 1);
            head.frames[0].redraw(&self.card, seed_of_head(seed, index))?;
        }
        shortage::during(nth, || {
            self.heads.iter().try_for_each(|head| {
                let framebuffer = Some(head.frames[0].framebuffer);
                let connectors = [head.connector];
                self.card
                    .set_crtc(head.crtc, framebuffer, (0, 0), &connectors, Some(head.mode))
            })
        })
    }

    /// Turns every output on or off by its connector's property, which keeps its mode and its frame.
    pub fn set_power(&self, on: bool) -> Result<()> {
        let power = match on {
            true => drm_ffi::DRM_MODE_DPMS_ON,
            false => drm_ffi::DRM_MODE_DPMS_OFF,
        };
        for head in &self.heads {
            let (card, connector) = (&self.card, head.connector);
            let properties = card.get_properties(connector)?.as_hashmap(card)?;
            let dpms = properties.get("DPMS").context("there is no DPMS")?.handle();
            restarted(|| card.set_property(connector, dpms, power.into()))?;
        }
        Ok(())
    }

    /// Gives up the frames. The card, given back to the caller, is as it was.
    pub fn end(self) -> Result<Card> {
        for head in self.heads {
            for frame in head.frames {
                frame.destroy(&self.card)?;
            }
        }
        Ok(self.card)
    }

    /// Flips between two pictures until a line comes in; then says what is on screen.
    fn flip_until_told(&mut self, orders: &Receiver<String>) -> Result<()> {
        self.flip()?;
        println!(
            "flipping {} {}",
            self.heads[0].frames[0].seed, self.heads[0].frames[1].seed
        );
        let mut flips = 1;
        while orders.try_recv().is_err() {
            self.flip()?;
            flips += 1;
        }
        println!("stopped {} after {flips}", self.heads[0].frames[0].seed);
        Ok(())
    }
}

/// Does what standard input says, a line at a time, and answers each with a line:
///
/// - `draw SEED`: draw test picture SEED off screen and flip to it; `drawn SEED`.
/// - `flip`: flip between the last two pictures, `flipping SEED SEED`, until any line; `stopped SEED after COUNT`.
/// - `part SEED X Y WIDTH HEIGHT`: draw test picture SEED on screen, but declare only this part dirty; `drawn SEED`.
/// - `set SEED NTH`: turn the outputs off, and on again with test picture SEED, while allocation NTH fails; what
///   [`shortage::during`] prints.
/// - `power on`, `power off`: turn the outputs on or off, with what they show; `power is on`, `power is off`.
/// - `fence SEED`: draw test picture SEED off screen and have the first output flip to it, without waiting; `fence`, and what the kernel
///   says of the fence. What follows is for [`hold_fence`].
/// - end of input: end.
pub fn serve(card: Card, seed: u8, size: Option<(u16, u16)>) -> Result<()> {
    let mut client = Client::new(card, seed, size)?;
    let (width, height) = client.mode().size();
    println!("shown {seed} {width} {height}");

    let (sender, orders) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    while let Ok(order) = orders.recv() {
        let words: Vec<&str> = order.split_whitespace().collect();
        match words[..] {
            ["draw", seed] => {
                client.draw(seed.parse()?)?;
                println!("drawn {seed}");
            }
            ["flip"] => client.flip_until_told(&orders)?,
            ["part", seed, x, y, width, height] => {
                let area = [x.parse()?, y.parse()?, width.parse()?, height.parse()?];
                client.draw_and_show_part(seed.parse()?, area)?;
                println!("drawn {seed}");
            }
            ["set", seed, nth] => client.set(seed.parse()?, nth.parse()?)?,
            ["power", power @ ("on" | "off")] => {
                client.set_power(power == "on")?;
                println!("power is {power}");
            }
            ["fence", seed] => {
                let fence = client.draw_with_fence(seed.parse()?)?;
                println!("fence {}", fence.info()?);
                return hold_fence(client, fence, &orders);
            }
            _ => bail!("'{order}' is no order"),
        }
    }
    Ok(())
}

/// Does what standard input says to who has a fence:
///
/// - `wait`: wait until it is signalled; `signalled`, and what the kernel says of it.
/// - `close`: close the card; `closed`.
/// - `ask`: `fence`, and what the kernel says of it.
/// - end of input: end.
fn hold_fence(client: Client, fence: Fence, orders: &Receiver<String>) -> Result<()> {
    let mut client = Some(client);
    while let Ok(order) = orders.recv() {
        match order.as_str() {
            "wait" => {
                println!("waiting");
                fence.wait()?;
                println!("signalled {}", fence.info()?);
            }
            "close" => {
                client = None;
                println!("closed");
            }
            "ask" => println!("fence {}", fence.info()?),
            _ => bail!("'{order}' is no order"),
        }
    }
    drop(client);
    Ok(())
}
