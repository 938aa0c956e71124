// SPDX-License-Identifier: GPL-2.0

//! Suspend on the reference host, which keeps everything while the guest sleeps, if it is asked to and keeps its word.

use anyhow::{
    Context,
    Result,
    ensure, //
};
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::host::{
    Entry,
    commands, //
};
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::Machine;

const SIZE: (u32, u32) = (1024, 768);

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("freezing::kept", kept),
        trial("freezing::screen_first", screen_first),
    ];
    for conduct in ["drop-all", "drop-one"] {
        trials.push(trial(format!("freezing::{conduct}"), move |case| {
            broken_promise(case, conduct)
        }));
    }
    trials
}

/// What is recovered, is recovered from a known state: nothing of what the host has kept all the same is in the way.
fn broken_promise(case: &mut Case, conduct: &str) -> Result<()> {
    // The question whether the sentinel is there.
    case.expect_refused("RESOURCE_UNREF");
    let vm = case.boot(&Machine::on_reference_host(&["--conduct", conduct]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    let mark = vm.mark();
    Sleep::S3.cycle(vm)?;
    vm.wait_console("the host did not keep its resources", mark)?;
    vm.wait_console("resources recovered", mark)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}

/// What was on the screen is the first thing that a host which forgot everything is told, in one go, whatever else there is.
fn screen_first(case: &mut Case) -> Result<()> {
    const SCREEN: [&str; 5] = [
        "RESOURCE_CREATE_2D",
        "RESOURCE_ATTACH_BACKING",
        "TRANSFER_TO_HOST_2D",
        "SET_SCANOUT",
        "RESOURCE_FLUSH",
    ];
    let vm = case.boot(&Machine::on_reference_host(&["--freezing", "off"]))?;
    // The console's buffer and the client's first are older.
    let client = Client::start(vm, 1, &[SIZE])?;
    client.draw(vm, 2)?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 2)?;

    let record = vm.host.as_ref().context("no reference host")?.record()?;
    let start = record.iter().rposition(|entry| entry.event == "start");
    let after: Vec<_> = commands(&record[start.context("never started")?..]).collect();
    let (screen, rest) = after
        .split_at_checked(SCREEN.len())
        .context("too few commands")?;
    let names: Vec<_> = screen.iter().map(|entry| &entry.command).collect();
    ensure!(
        names == SCREEN,
        "the first commands after resume are {names:?}"
    );
    let id = &screen[0].args["resource_id"];
    let is_same = |entry: &&&Entry| entry.args["resource_id"] == *id;
    ensure!(
        screen.iter().filter(is_same).count() == SCREEN.len() && *id != 1,
        "they are not for the buffer on the screen"
    );
    // Two buffers more, and one notification for them.
    let others: Vec<_> = rest.iter().take(2 * 3).collect();
    let names: Vec<_> = others.iter().map(|entry| &entry.command).collect();
    ensure!(
        names == [&SCREEN[..3], &SCREEN[..3]].concat(),
        "the next ones are {names:?}"
    );
    // The host may have looked before it was told.
    let kicks = others[5].kick - screen[0].kick;
    ensure!(kicks <= 1, "the host was told {kicks} times in between");
    client.draw(vm, 3)?;
    client.end(vm)
}

fn kept(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 1, &[SIZE])?;
    Sleep::S3.cycle(vm)?;
    client.expect(vm, 1)?;
    client.draw(vm, 2)?;
    client.end(vm)
}
