// SPDX-License-Identifier: GPL-2.0

//! The client in the guest, and the screens that it must lead to.

use anyhow::{
    Context,
    Result,
    ensure, //
};
use image::RgbImage;

use crate::screen;
use crate::vm::{
    Mark,
    Output,
    Program,
    Vm, //
};

/// `virtgpu-guest client`, which draws test pictures on every connected output.
pub struct Client {
    program: Program,
    /// Width and height of every head, in pixels.
    sizes: Vec<(u32, u32)>,
}

impl Client {
    /// Starts the client in the preferred modes, whose sizes the caller knows, and waits until test picture `seed` is on the screens.
    pub fn start(vm: &mut Vm, seed: u8, sizes: &[(u32, u32)]) -> Result<Self> {
        Self::start_with(vm, seed, sizes, &[])
    }

    /// As [`Client::start`], in the mode `size`, for a guest with one output.
    pub fn start_in_mode(vm: &mut Vm, seed: u8, size: (u32, u32)) -> Result<Self> {
        Self::start_with(
            vm,
            seed,
            &[size],
            &["--mode", &format!("{}x{}", size.0, size.1)],
        )
    }

    fn start_with(vm: &mut Vm, seed: u8, sizes: &[(u32, u32)], arguments: &[&str]) -> Result<Self> {
        let mark = vm.mark();
        let seed_argument = seed.to_string();
        let mut argv = vec!["virtgpu-guest", "client", &seed_argument];
        argv.extend(arguments);
        let program = vm.start_program(&argv)?;
        vm.wait_line(program, &format!("shown {seed} "), mark)?;
        let client = Self {
            program,
            sizes: sizes.to_vec(),
        };
        client.expect(vm, seed)?;
        Ok(client)
    }

    /// What head `head` shows of test picture `seed`.
    fn picture(&self, head: usize, seed: u8) -> RgbImage {
        let (width, height) = self.sizes[head];
        // As the client does it: every head has another picture.
        screen::test_picture(seed.wrapping_add(16 * head as u8), width, height)
    }

    /// Expects test picture `seed` on every screen.
    pub fn expect(&self, vm: &mut Vm, seed: u8) -> Result<()> {
        self.expect_all(vm, seed, &format!("picture {seed}"))
    }

    fn expect_all(&self, vm: &mut Vm, seed: u8, what: &str) -> Result<()> {
        for head in 0..self.sizes.len() {
            screen::expect(vm, head as u32, what, &self.picture(head, seed)).map_err(|error| {
                match vm.ended(self.program) {
                    Some(Output { code, err, .. }) => {
                        error.context(format!("the client has ended with {code}: {err}"))
                    }
                    None => error,
                }
            })?;
        }
        Ok(())
    }

    /// Has the client draw test picture `seed`, and expects it on every screen.
    pub fn draw(&self, vm: &mut Vm, seed: u8) -> Result<()> {
        self.draw_unseen(vm, seed)?;
        self.expect(vm, seed)
    }

    /// Has the client draw test picture `seed`, whether it appears or not.
    pub fn draw_unseen(&self, vm: &mut Vm, seed: u8) -> Result<()> {
        let mark = vm.mark();
        vm.say(self.program, &format!("draw {seed}"))?;
        vm.wait_line(self.program, &format!("drawn {seed}"), mark)?;
        Ok(())
    }

    /// Has the client turn its outputs off, and on again with test picture `seed`, while the kernel's allocation `nth` fails. Returns what
    /// the client says of that.
    pub fn set(&self, vm: &mut Vm, seed: u8, nth: u32) -> Result<String> {
        let mark = vm.mark();
        vm.say(self.program, &format!("set {seed} {nth}"))?;
        vm.wait_line(self.program, "tried ", mark)
    }

    /// Has the client draw all of test picture `seed` on the first screen, but declare only a part of it dirty.
    pub fn draw_and_show_part(
        &self,
        vm: &mut Vm,
        seed: u8,
        [x, y, width, height]: [u32; 4],
    ) -> Result<()> {
        let mark = vm.mark();
        vm.say(
            self.program,
            &format!("part {seed} {x} {y} {width} {height}"),
        )?;
        vm.wait_line(self.program, &format!("drawn {seed}"), mark)?;
        Ok(())
    }

    /// Has the client turn its outputs on or off, with what they show.
    pub fn set_power(&self, vm: &mut Vm, on: bool) -> Result<()> {
        let power = if on { "on" } else { "off" };
        let mark = vm.mark();
        vm.say(self.program, &format!("power {power}"))?;
        vm.wait_line(self.program, &format!("power is {power}"), mark)?;
        Ok(())
    }

    /// Has the client flip between its last two pictures until [`Client::stop_flips`], and returns their seeds.
    pub fn start_flips(&self, vm: &mut Vm) -> Result<[u8; 2]> {
        let mark = vm.mark();
        vm.say(self.program, "flip")?;
        let seeds = vm.wait_line(self.program, "flipping ", mark)?;
        let (first, second) = seeds.split_once(' ').context("two seeds are needed")?;
        Ok([first.parse()?, second.parse()?])
    }

    /// Expects that the screens go from one picture to the other and back.
    pub fn expect_flips(&self, vm: &mut Vm, seeds: [u8; 2]) -> Result<()> {
        for seed in [seeds[0], seeds[1], seeds[0]] {
            self.expect_all(vm, seed, &format!("picture {seed}, flipping"))?;
        }
        Ok(())
    }

    /// Ends the flips, and expects the last picture on every screen.
    pub fn stop_flips(&self, vm: &mut Vm) -> Result<()> {
        let mark = vm.mark();
        vm.say(self.program, "stop")?;
        let stopped = vm.wait_line(self.program, "stopped ", mark)?;
        let seed = stopped
            .split(' ')
            .next()
            .context("a seed is needed")?
            .parse()?;
        self.expect(vm, seed)
    }

    /// Expects that the client ends because its device is gone.
    pub fn expect_gone(self, vm: &mut Vm) -> Result<()> {
        let output = vm.wait_end(self.program)?;
        ensure!(
            output.code != 0 && output.err.contains("No such device"),
            "the client ended with {}: {}",
            output.code,
            output.err
        );
        Ok(())
    }

    /// Has the client draw test picture `seed` and flip to it without waiting, and keep the fence of that. Returns what the kernel says of
    /// the fence: its status, its driver and its timeline.
    pub fn flip_with_fence(self, vm: &mut Vm, seed: u8) -> Result<(Fence, String)> {
        let mark = vm.mark();
        vm.say(self.program, &format!("fence {seed}"))?;
        let info = vm.wait_line(self.program, "fence ", mark)?;
        Ok((Fence(self.program), info))
    }

    /// Starts the client on a host that misbehaves. It may end for that.
    pub fn try_start(vm: &mut Vm, seed: u8, sizes: &[(u32, u32)]) -> Result<Option<Self>> {
        let mark = vm.mark();
        let program = vm.start_program(&["virtgpu-guest", "client", &seed.to_string()])?;
        let shown = vm.wait_line_or_end(program, &format!("shown {seed} "), mark)?;
        Ok(shown.then(|| Self {
            program,
            sizes: sizes.to_vec(),
        }))
    }

    /// Has the client draw test picture `seed` on a host that misbehaves. Returns whether the client is still there.
    pub fn try_draw(&self, vm: &mut Vm, seed: u8) -> Result<bool> {
        let mark = vm.mark();
        vm.say(self.program, &format!("draw {seed}"))?;
        vm.wait_line_or_end(self.program, &format!("drawn {seed}"), mark)
    }

    /// Ends the client, if it has not ended, and does not ask how.
    pub fn leave(self, vm: &mut Vm) -> Result<()> {
        vm.hang_up(self.program)?;
        vm.wait_end(self.program).map(drop)
    }

    /// Ends the client.
    pub fn end(self, vm: &mut Vm) -> Result<()> {
        end(vm, self.program)
    }
}

/// A client that has the fence of a flip.
pub struct Fence(Program);

impl Fence {
    /// Has the client wait until the fence is signalled, and returns the mark for [`Fence::signalled`].
    pub fn start_to_wait(&self, vm: &mut Vm) -> Result<Mark> {
        let mark = vm.mark();
        vm.say(self.0, "wait")?;
        vm.wait_line(self.0, "waiting", mark)?;
        Ok(mark)
    }

    /// Waits until the client does not wait any more, as it has since `mark`. Returns what the kernel says of the fence.
    pub fn signalled(&self, vm: &mut Vm, mark: Mark) -> Result<String> {
        vm.wait_line(self.0, "signalled ", mark)
    }

    /// Has the client close the card.
    pub fn close_card(&self, vm: &mut Vm) -> Result<()> {
        let mark = vm.mark();
        vm.say(self.0, "close")?;
        vm.wait_line(self.0, "closed", mark)?;
        Ok(())
    }

    /// Returns what the kernel says of the fence.
    pub fn ask(&self, vm: &mut Vm) -> Result<String> {
        let mark = vm.mark();
        vm.say(self.0, "ask")?;
        vm.wait_line(self.0, "fence ", mark)
    }

    /// Ends the client, and with it the fence.
    pub fn end(self, vm: &mut Vm) -> Result<()> {
        end(vm, self.0)
    }
}

/// Ends a client that has nothing to complain of.
fn end(vm: &mut Vm, program: Program) -> Result<()> {
    vm.hang_up(program)?;
    let output = vm.wait_end(program)?;
    ensure!(
        output.code == 0,
        "the client ended with {}: {}",
        output.code,
        output.err
    );
    Ok(())
}
