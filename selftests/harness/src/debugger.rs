// SPDX-License-Identifier: GPL-2.0

//! Stops a guest at a function of its kernel, over QEMU's gdb stub: for what must happen at one moment, and at no other.

use std::io::{
    Read,
    Write, //
};
use std::os::unix::net::UnixStream;

use anyhow::{
    Context,
    Result,
    ensure, //
};

use crate::kernel;
use crate::vm::{
    LIMIT,
    Vm, //
};

/// A debugger at a guest that is halted.
pub struct Debugger {
    stub: UnixStream,
    symbols: &'static str,
}

impl Debugger {
    /// Halts the guest. Its machine must have been made with a debugger in mind.
    pub fn halt(vm: &Vm) -> Result<Self> {
        let path = vm.debugger()?;
        let stub = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
        stub.set_read_timeout(Some(LIMIT * vm.patience))?;
        let mut debugger = Self {
            stub,
            symbols: kernel::symbols()?,
        };
        // Why it is halted is of no interest; the answer shows that it is.
        debugger.ask("?")?;
        Ok(debugger)
    }

    fn address(&self, symbol: &str) -> Result<&str> {
        self.symbols
            .lines()
            .find_map(|line| line.strip_suffix(symbol)?.strip_suffix(' ')?.get(..16))
            .with_context(|| format!("the kernel has no {symbol}"))
    }

    /// Lets the guest run from now until it comes to `function`, or up to the end of the limit.
    pub fn run_until(&mut self, function: &str) -> Result<()> {
        let place = format!("0,{},1", self.address(function)?);
        self.order(&format!("Z{place}"))?;
        let stop = self.ask("c")?;
        ensure!(
            stop.starts_with('T'),
            "the guest did not stop at {function}: {stop}"
        );
        self.order(&format!("z{place}"))
    }

    /// Lets the guest run until it comes to `function`, and has that return `value` without doing anything.
    pub fn return_from(&mut self, function: &str, value: i32) -> Result<()> {
        // The numbers by which the stub knows registers of x86-64.
        const RAX: u32 = 0;
        const RSP: u32 = 7;
        const RIP: u32 = 16;
        self.run_until(function)?;
        let stack = parse_u64(&self.ask(&format!("p{RSP:x}"))?)?;
        let caller = parse_u64(&self.ask(&format!("m{stack:x},8"))?)?;
        for (register, value) in [
            (RAX, i64::from(value) as u64),
            (RSP, stack + 8),
            (RIP, caller),
        ] {
            self.order(&format!("P{register:x}={}", hex(&value.to_le_bytes())))?;
        }
        Ok(())
    }

    /// Lets the guest carry out one instruction: the one where it has stopped would stop it again.
    pub fn step(&mut self) -> Result<()> {
        let stop = self.ask("s")?;
        ensure!(stop.starts_with('T'), "the guest did not step: {stop}");
        Ok(())
    }

    /// Sets a variable of the kernel of four bytes.
    pub fn set(&mut self, variable: &str, value: u32) -> Result<()> {
        let bytes = hex(&value.to_le_bytes());
        self.order(&format!("M{},4:{bytes}", self.address(variable)?))
    }

    /// Lets the guest go.
    pub fn go(mut self) -> Result<()> {
        self.order("D")
    }

    fn order(&mut self, text: &str) -> Result<()> {
        let answer = self.ask(text)?;
        ensure!(answer == "OK", "the gdb stub says '{answer}' to {text}");
        Ok(())
    }

    fn ask(&mut self, text: &str) -> Result<String> {
        let sum = text.bytes().fold(0u8, u8::wrapping_add);
        write!(self.stub, "${text}#{sum:02x}")?;
        let mut answer = Vec::new();
        let mut byte = [0];
        loop {
            self.stub
                .read_exact(&mut byte)
                .with_context(|| format!("waiting for the answer to {text}"))?;
            match byte[0] {
                b'+' if answer.is_empty() => {}
                b'#' => break,
                other => answer.push(other),
            }
        }
        // The checksum, on a socket that loses nothing.
        self.stub.read_exact(&mut [0; 2])?;
        self.stub.write_all(b"+")?;
        let text = String::from_utf8_lossy(&answer).into_owned();
        Ok(text.trim_start_matches('$').to_owned())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a number as the stub gives it, in the order of the guest's bytes.
fn parse_u64(text: &str) -> Result<u64> {
    let number = u64::from_str_radix(text, 16);
    number
        .map(u64::swap_bytes)
        .with_context(|| format!("the gdb stub gives '{text}' for a number"))
}
