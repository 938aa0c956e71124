// SPDX-License-Identifier: GPL-2.0

//! Suspend on the reference host, which keeps everything while the guest sleeps, if it is asked to and keeps its word.

use anyhow::Result;
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::Machine;

const SIZE: (u32, u32) = (1024, 768);

pub fn trials() -> Vec<Trial> {
    vec![trial("freezing::kept", kept)]
}

fn kept(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}
