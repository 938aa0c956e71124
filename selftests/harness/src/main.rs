// SPDX-License-Identifier: GPL-2.0

//! Boots a guest to look at: once through suspend, or with a shell.

use std::process::ExitCode;

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};
use clap::{
    Parser,
    Subcommand, //
};
use image::RgbImage;
use virtgpu_lab::client::Client;
use virtgpu_lab::host::{
    Entry,
    after_mark,
    commands, //
};
use virtgpu_lab::kernel::{
    self,
    Kernel, //
};
use virtgpu_lab::screen;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::{
    self,
    Machine,
    Vm, //
};

/// Boots a guest with the driver that DRIVER names (rs or c), and the kernel in VIRTGPU_BUILD. Leaves its results in VIRTGPU_RUN.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Have modetest draw, suspend to RAM, wake up, and compare the screen before and after; on the host that HOST names (qemu or
    /// reference).
    Run,
    /// Boot to a shell on this terminal.
    Shell,
    /// Boot, run shell commands in the guest, and print what they print.
    Exec {
        /// QEMU's GPU, with its properties.
        #[arg(long, default_value = "virtio-gpu-pci")]
        device: String,
        /// Have the GPU of the reference host instead, with these options of `virtgpu-host`.
        #[arg(long, conflicts_with = "device", allow_hyphen_values = true)]
        host: Option<String>,
        #[arg(required = true)]
        commands: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        What::Run => run(),
        What::Shell => shell(),
        What::Exec {
            device,
            host,
            commands,
        } => {
            let machine = match &host {
                None => Machine::with_gpu(&device),
                Some(options) => {
                    Machine::on_reference_host(&options.split_whitespace().collect::<Vec<_>>())
                }
            };
            exec(&machine, &commands)
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("virtgpu-lab: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn shell() -> Result<ExitCode> {
    let kernel = Kernel::from_env()?;
    let dir = kernel::results()?.join("shell");
    let status = vm::shell(&kernel, &Machine::with_gpu("virtio-gpu-pci"), &dir)?;
    Ok(ExitCode::from(status.code().unwrap_or(255) as u8))
}

fn exec(machine: &Machine, commands: &[String]) -> Result<ExitCode> {
    let kernel = Kernel::from_env()?;
    let dir = kernel::results()?.join("exec");
    let mut vm = Vm::boot(&kernel, machine, &dir)?;
    for command in commands {
        let output = vm.try_run(command)?;
        print!("{}", output.out);
        eprint!("{}", output.err);
        if output.code != 0 {
            return Ok(ExitCode::from(output.code as u8));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run() -> Result<ExitCode> {
    let kernel = Kernel::from_env()?;
    let dir = kernel::results()?;
    println!("booting a guest with the {} driver", kernel.driver);
    let mut vm = Vm::boot(&kernel, &machine_from_env()?, &dir.join("guest"))?;

    let info = vm.card()?;
    let output = info
        .outputs
        .iter()
        .find(|output| output.connected)
        .context("no connector is connected")?;
    let mode = output.modes.first().context("the connector has no modes")?;
    println!(
        "modetest draws on {} in {}x{}",
        output.name, mode.width, mode.height
    );
    let setting = format!("{}:{}x{}", output.connector, mode.width, mode.height);
    // A black console, so that whatever is seen afterwards is modetest's.
    vm.run("printf '\\033[?25l\\033[2J' > /dev/tty1")?;
    let (_, black) = screen::watch(&mut vm, 0, screen::SCREEN_LIMIT, screen::is_black)?;
    ensure!(black, "the console cannot be cleared");
    let client = vm.start_program(&["modetest", "-M", "virtio_gpu", "-s", &setting])?;
    let before = wait_drawn(&mut vm)?;
    before.save(dir.join("before.png"))?;

    if let Some(host) = &vm.host {
        host.mark(SUSPEND)?;
    }
    println!("suspending to RAM, and waking up");
    Sleep::S3.cycle(&mut vm)?;
    let (after, same) = screen::watch(&mut vm, 0, screen::SCREEN_LIMIT, |picture| {
        *picture == before
    })?;
    after.save(dir.join("after.png"))?;
    if let Some(host) = &vm.host {
        println!("{}", what_was_kept(&host.record()?)?);
    }
    screen::side_by_side(&before, &after).save(dir.join("compare.png"))?;
    vm.say(client, "")?;
    vm.wait_end(client)?;

    let place = dir.display();
    if same {
        // A picture that is there, but dead, is no success either.
        let size = (mode.width, mode.height);
        if let Err(error) = draw_on(&mut vm, size) {
            println!(
                "MISMATCH: the picture is back, but what is drawn now does not appear: {error:#}"
            );
            return Ok(ExitCode::FAILURE);
        }
        println!(
            "MATCH: the screen after suspend is the screen before, pixel for pixel, and shows what is drawn now ({place}/compare.png)"
        );
        Ok(ExitCode::SUCCESS)
    } else {
        let difference = screen::difference(&after, &before);
        println!(
            "MISMATCH: the screen after suspend is another one: {difference} ({place}/compare.png)"
        );
        Ok(ExitCode::FAILURE)
    }
}

/// Mark in the record of the reference host.
const SUSPEND: &str = "suspend";

/// Returns the machine whose GPU is the one that the variable `HOST` names; without it, QEMU's own is meant.
fn machine_from_env() -> Result<Machine> {
    match std::env::var("HOST").as_deref() {
        Err(_) | Ok("" | "qemu") => Ok(Machine::with_gpu("virtio-gpu-pci")),
        Ok("reference") => Ok(Machine::on_reference_host(&[])),
        Ok(other) => bail!("HOST={other} is neither qemu nor reference"),
    }
}

/// Says what the reference host had after the suspend, and what had to be made anew.
fn what_was_kept(record: &[Entry]) -> Result<String> {
    let record = after_mark(record, SUSPEND)?;
    let reset = record
        .iter()
        .position(|entry| entry.event == "reset")
        .context("the device was not reset")?;
    let woken: Vec<_> = commands(&record[reset..]).collect();
    let created = woken
        .iter()
        .filter(|entry| entry.command == "RESOURCE_CREATE_2D")
        .count();
    let had = match record[reset].more["kept"] == true {
        true => format!("kept {} resources", record[reset].more["resources"]),
        false => "kept nothing".into(),
    };
    Ok(format!(
        "the host {had}; the guest has sent {} commands since, {created} of which created a resource",
        woken.len()
    ))
}

/// Draws other pictures, and expects them on the screen.
fn draw_on(vm: &mut Vm, size: (u32, u32)) -> Result<()> {
    let client = Client::start(vm, 1, &[size])?;
    client.draw(vm, 2)?;
    client.end(vm)
}

/// Waits until the screen shows what modetest drew, and compares it with the framebuffer in the guest.
///
/// The guest is not asked earlier: whoever opens the card first is its master, and that has to be modetest.
fn wait_drawn(vm: &mut Vm) -> Result<RgbImage> {
    let (picture, drawn) = screen::watch(vm, 0, vm::LIMIT, |picture| !screen::is_black(picture))?;
    ensure!(drawn, "modetest did not draw");
    let shown = vm.framebuffers()?;
    let first = shown.first().context("the guest shows no framebuffer")?;
    ensure!(
        screen::fingerprint(&picture) == first.fingerprint,
        "the screen is not what modetest's framebuffer has"
    );
    Ok(picture)
}
