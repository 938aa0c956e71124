// SPDX-License-Identifier: GPL-2.0

//! Measures the driver and Linux's C driver side by side: the same kernel, the same operations, in executed instructions of the guest
//! and in what arrives at the host. Nothing depends on how fast the machine is.

mod counts;
mod figures;
mod host;
mod plot;
mod programs;
mod symbols;

use std::fmt::Write as _;
use std::fs;
use std::path::{
    Path,
    PathBuf, //
};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{
    Context,
    Result,
    anyhow,
    bail,
    ensure, //
};
use clap::Parser;
use image::{
    Rgb,
    RgbImage, //
};
use virtgpu_guest::wire::Report;
use virtgpu_lab::kernel::{
    self,
    Driver,
    Kernel, //
};
use virtgpu_lab::screen;
use virtgpu_lab::vm::{
    Machine,
    Mark,
    Note,
    Program,
    Vm, //
};

use crate::counts::Counts;
use crate::figures::{
    Figures,
    MEASURED,
    REFERENCE, //
};
use crate::host::Traffic;
use crate::symbols::{
    Function,
    Image,
    Modules,
    Symbols, //
};

/// How long a measurement may take. Most take a second; the machine may be slow or busy.
const LIMIT: Duration = Duration::from_secs(400);

/// How often everything is measured. What is shown is the median.
const TIMES: usize = 5;

/// Measures the drivers side by side, prints a table, and leaves results.csv, results.png and profiles in VIRTGPU_RUN.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Measure this driver only: rust or c. It may be given more than once.
    #[arg(long, value_parser = parse_driver)]
    driver: Vec<Driver>,
    /// How many buffers of 1 MiB are alive while the devices are suspended. It may be given more than once.
    #[arg(long, default_values_t = [1, 16, 256, 1024])]
    buffers: Vec<u32>,
    /// Leave out everything but suspend.
    #[arg(long)]
    only_suspend: bool,
    /// Leave out suspend.
    #[arg(long, conflicts_with = "only_suspend")]
    only_operations: bool,
}

fn parse_driver(name: &str) -> Result<Driver> {
    match name {
        REFERENCE => Ok(Driver::C),
        MEASURED => Ok(Driver::Rust),
        _ => bail!("the drivers are {REFERENCE} and {MEASURED}"),
    }
}

fn name_of(driver: Driver) -> &'static str {
    match driver {
        Driver::C => REFERENCE,
        Driver::Rust => MEASURED,
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtgpu-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let dir = kernel::results()?;
    let bench = Bench {
        plugin: programs::plugin(&dir)?,
        guest: programs::guest(&dir)?,
        image: Image::read(kernel::symbols()?)?,
        dir,
    };
    let drivers = match &arguments.driver[..] {
        [] => &[Driver::C, Driver::Rust],
        chosen => chosen,
    };
    let buffers = if arguments.only_operations {
        &[]
    } else {
        &arguments.buffers[..]
    };
    let mut figures = Figures::default();
    for driver in drivers {
        let kernel = Kernel::with_driver(*driver)?;
        if !arguments.only_suspend {
            println!("measuring the {driver} driver");
            bench.operations(&kernel, &mut figures)?;
        }
        for host in [Host::Forgets, Host::Keeps, Host::NotReset] {
            // Only this driver asks a host to keep anything.
            if host == Host::Keeps && *driver == Driver::C {
                continue;
            }
            for buffers in buffers {
                let name = host.operation(*buffers);
                println!("measuring the {driver} driver: suspend_{name}");
                bench.suspend(&kernel, *buffers, host, &mut figures)?;
            }
        }
    }
    fs::write(bench.dir.join("results.csv"), figures.csv())?;
    let table = figures.table();
    fs::write(bench.dir.join("results.md"), &table)?;
    println!("\n{table}");
    plot::draw(&figures, &bench.dir.join("results.png"))?;
    println!("everything else is in {}", bench.dir.display());
    Ok(())
}

/// An operation that the guest did.
struct Done {
    name: String,
    times: u64,
    nanoseconds: u64,
}

impl Done {
    /// Reads the guest's report of an operation, if `line` is one.
    fn parse(line: &str) -> Option<Self> {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["measured", name, times, nanoseconds] => Some(Self {
                name: name.into(),
                times: times.parse().ok()?,
                nanoseconds: nanoseconds.parse().ok()?,
            }),
            _ => None,
        }
    }
}

/// What becomes of the host's side in suspend.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Host {
    /// QEMU's device is reset and forgets everything.
    Forgets,
    /// The reference host keeps everything, if it is told to (FREEZING).
    Keeps,
    /// QEMU's device is not reset, because it says that it keeps its state while it has no power.
    NotReset,
}

impl Host {
    /// What the operations of a suspend are called, after the part of it.
    fn operation(self, buffers: u32) -> String {
        match self {
            Self::Forgets => buffers.to_string(),
            Self::Keeps => format!("{buffers}_kept"),
            Self::NotReset => format!("{buffers}_not_reset"),
        }
    }

    fn machine(self) -> Machine {
        // What QEMU keeps of the resources is limited to 256 MiB otherwise.
        const GPU: &str = "virtio-gpu-pci,max_hostmem=4G";
        match self {
            Self::Forgets => Machine::with_gpu(GPU),
            Self::Keeps => Machine::on_reference_host(&[]),
            Self::NotReset => {
                Machine::behind_root_port(&format!("{GPU},x-pcie-pm-no-soft-reset=on"))
            }
        }
    }
}

/// Memory of the guest.
const MEMORY: &str = "3G";

/// What is the same for all guests.
struct Bench {
    plugin: PathBuf,
    guest: PathBuf,
    image: Image,
    dir: PathBuf,
}

/// A guest that is measured.
struct Guest<'a> {
    vm: Vm,
    counts: PathBuf,
    symbols: Symbols<'a>,
    driver: Driver,
    host: Host,
}

impl Bench {
    fn boot(&self, kernel: &Kernel, name: &str, processor: &str, host: Host) -> Result<Guest<'_>> {
        let dir = self.dir.join(format!("{}-{name}", name_of(kernel.driver)));
        fs::create_dir_all(&dir)?;
        let counts = dir.join("counts");
        let spans = dir.join("spans");
        let mut plugin = format!(
            "{},out={},spans={}",
            self.plugin.display(),
            counts.display(),
            spans.display()
        );
        for function in ["vp_notify", "vp_notify_with_data"] {
            let function = self.image.function(function)?;
            write!(plugin, ",point={}:{:x}", host::KICK, function.start)?;
        }
        let mut arguments = vec![
            String::from("-plugin"),
            plugin,
            "-d".into(),
            "guest_errors,plugin".into(),
            "-cpu".into(),
            processor.into(),
        ];
        for event in host::EVENTS {
            arguments.extend([String::from("-trace"), event.to_string()]);
        }
        let machine = Machine {
            icount: true,
            append: "nokaslr".into(),
            programs: vec![self.guest.clone()],
            memory: Some(MEMORY),
            arguments,
            ..host.machine()
        };
        let mut vm = Vm::boot(kernel, &machine, &dir)?;
        // A cursor that blinks would be measured as well.
        vm.run("echo 0 > /sys/class/graphics/fbcon/cursor_blink")?;
        let symbols = vm.run("grep '\\[' /proc/kallsyms")?;
        // With it, and with the counts, the hot places of a function can be found in its disassembly.
        fs::write(dir.join("symbols"), &symbols)?;
        let symbols = Symbols {
            image: &self.image,
            modules: Modules::parse(&symbols)?,
        };
        fs::write(spans, self.spans(&symbols, kernel.driver)?)?;
        Ok(Guest {
            vm,
            counts,
            symbols,
            driver: kernel.driver,
            host,
        })
    }

    /// The device's part of suspend, for the plugin: the virtio bus's functions, which call the driver's, and, where a driver has
    /// them, the functions that the PM core calls by itself. C does in the former what this driver does in the latter.
    fn spans(&self, symbols: &Symbols<'_>, driver: Driver) -> Result<String> {
        let mut text = String::new();
        for (span, bus, callback) in [
            (host::FREEZE, "virtio_device_freeze", "::suspend_callback"),
            (
                host::RESTORE,
                "virtio_device_restore_priv",
                "::resume_callback",
            ),
        ] {
            let callbacks = symbols.in_modules(callback);
            ensure!(
                callbacks.is_empty() == (driver == Driver::C),
                "the {driver} driver has {} functions {callback}",
                callbacks.len()
            );
            for Function { start, end } in [&[self.image.function(bus)?], &callbacks[..]].concat() {
                writeln!(text, "{span}:{start:x}:{end:x}")?;
            }
        }
        Ok(text)
    }

    fn operations(&self, kernel: &Kernel, figures: &mut Figures) -> Result<()> {
        let mut guest = self.boot(kernel, "operations", "max", Host::Forgets)?;
        let mut done = Vec::new();
        for _ in 0..TIMES {
            let start = guest.vm.mark();
            let program = guest.vm.start_program(&["virtgpu-bench", "operations"])?;
            for number in 0.. {
                let Some(line) = line(&mut guest.vm, program, start, number)? else {
                    break;
                };
                match Done::parse(&line) {
                    Some(operation) => done.push(operation),
                    None => println!("  {line}"),
                }
            }
        }
        guest.evaluate(&done, figures)
    }

    fn suspend(
        &self,
        kernel: &Kernel,
        buffers: u32,
        host: Host,
        figures: &mut Figures,
    ) -> Result<()> {
        let name = host.operation(buffers);
        // Clearing the buffers is not measured here: let it take 8 bytes an instruction, not one.
        let processor = "max,-erms,-fsrm";
        let mut guest = self.boot(kernel, &format!("suspend-{name}"), processor, host)?;
        guest.vm.run("echo devices > /sys/power/pm_test")?;
        // Its text would be drawn anew, which takes ten times the instructions of all the rest.
        guest.vm.run("echo 0 > /sys/class/vtconsole/vtcon1/bind")?;
        let start = guest.vm.mark();
        let (alive, times) = (buffers.to_string(), TIMES.to_string());
        let program = guest
            .vm
            .start_program(&["virtgpu-bench", "suspend", &alive, &times])?;
        let next = |guest: &mut Guest<'_>, number| -> Result<String> {
            line(&mut guest.vm, program, start, number)?.context("it has ended")
        };
        let text = next(&mut guest, 0)?;
        ensure!(text == "before", "'{text}' instead of 'before'");
        let drawn = drawn();
        screen::expect(&mut guest.vm, 0, "the first buffer", &drawn)?;
        if let Some(host) = &guest.vm.host {
            host.mark(host::BEGIN)?;
        }
        // C loses it, and there is nothing to wait for.
        let limit = match kernel.driver {
            Driver::C => Duration::ZERO,
            Driver::Rust => screen::SCREEN_LIMIT,
        };
        let (mut done, mut pictures) = (Vec::new(), Vec::new());
        for number in 1..=TIMES {
            guest.vm.say(program, "")?;
            let text = next(&mut guest, number)?;
            let operation = Done::parse(&text).with_context(|| format!("'{text}'"))?;
            done.push(Done {
                name: format!("suspend_{name}"),
                ..operation
            });
            let (after, right) =
                screen::watch(&mut guest.vm, 0, limit, |picture| *picture == drawn)?;
            after.save(guest.vm.dir.join(format!("after-{number}.png")))?;
            ensure!(
                right || kernel.driver == Driver::C,
                "suspend_{name}, time {number}: the screen is not what it was"
            );
            pictures.push(right);
        }
        guest.evaluate(&done, figures)?;
        guest.evaluate_spans(&name, &pictures, figures)
    }
}

/// What the guest's program has drawn when it suspends: draw() in guest.c.
fn drawn() -> RgbImage {
    const SIZE: u32 = 512;
    RgbImage::from_fn(SIZE, SIZE, |x, y| {
        let [_, red, green, blue] = ((y * SIZE + x) * 0x10f + 0x3b1f).to_be_bytes();
        Rgb([red, green, blue])
    })
}

/// Returns a line of a program's that was started after `start`, counted from 0, or nothing if it has ended well before.
fn line(vm: &mut Vm, program: Program, start: Mark, number: usize) -> Result<Option<String>> {
    let mut complaints = String::new();
    let mut seen = 0;
    vm.wait(
        "the guest's part of the benchmark",
        start,
        LIMIT,
        |note| match note {
            Note::Agent(Report::Out { id, text }) if program.is(*id) => {
                seen += 1;
                (seen == number + 1).then(|| Ok(Some(text.clone())))
            }
            Note::Agent(Report::Err { id, text }) if program.is(*id) => {
                complaints += text;
                None
            }
            Note::Agent(Report::Ended { id, code }) if program.is(*id) => Some(match code {
                0 => Ok(None),
                _ => Err(anyhow!("it ended with {code}: {complaints}")),
            }),
            _ => None,
        },
    )?
}

impl Guest<'_> {
    fn read(&self) -> Result<(Vec<counts::Interval>, Vec<host::Interval>)> {
        let log = fs::read(self.vm.dir.join("qemu.log"))?;
        let record = self.vm.host.as_ref().map(|host| host.record());
        let record = record.transpose()?;
        let arrived = host::parse(&String::from_utf8_lossy(&log), record.as_deref())?;
        let counted = counts::parse(&fs::read_to_string(&self.counts)?)?;
        Ok((counted, arrived))
    }

    /// Notes the figures of the operations that were done, each for one time.
    fn evaluate(&self, done: &[Done], figures: &mut Figures) -> Result<()> {
        let (counted, arrived) = self.read()?;
        ensure!(
            counted.len() == done.len() && arrived.len() == done.len(),
            "{} operations were done, {} counted, {} seen at the host",
            done.len(),
            counted.len(),
            arrived.len()
        );
        for ((done, counted), arrived) in done.iter().zip(&counted).zip(&arrived) {
            let times = done.times as f64;
            self.add(
                figures,
                &done.name,
                times,
                &counted.counts,
                &arrived.traffic,
            )?;
            let clock = done.nanoseconds as f64 / times / 1e3;
            figures.add(&done.name, self.name(), "clock_us", clock);
        }
        Ok(())
    }

    /// Notes the figures of the device's part of suspends, after each of which the picture was right or not.
    fn evaluate_spans(&self, case: &str, pictures: &[bool], figures: &mut Figures) -> Result<()> {
        let (counted, arrived) = self.read()?;
        for ((counted, arrived), right) in counted.iter().zip(&arrived).zip(pictures) {
            for span in [host::FREEZE, host::RESTORE] {
                let name = format!("{span}_{case}");
                let traffic = arrived.spans.get(span).cloned().unwrap_or_default();
                let seen = counted.spans.get(span).cloned();
                // The C driver is not called for a device that is not reset.
                ensure!(
                    seen.is_none() == (self.driver == Driver::C && self.host == Host::NotReset),
                    "{name} was seen, or not seen, against expectation"
                );
                let seen = seen.unwrap_or_default();
                self.add(figures, &name, 1.0, &seen.counts, &traffic)?;
                let clock = seen.before(u64::MAX) as f64 / 1e3;
                figures.add(&name, self.name(), "clock_us", clock);
                if span != host::RESTORE {
                    continue;
                }
                figures.add(&name, self.name(), "picture_right", (*right).into());
                if let Some(frame) = arrived.first_frame
                    && *right
                {
                    let clock = seen.before(frame) as f64 / 1e3;
                    figures.add(&name, self.name(), "first_frame_us", clock);
                }
            }
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        name_of(self.driver)
    }

    fn add(
        &self,
        figures: &mut Figures,
        operation: &str,
        times: f64,
        counts: &Counts,
        traffic: &Traffic,
    ) -> Result<()> {
        let module = self.driver.module().replace('-', "_");
        let parts = self.symbols.by_part(counts);
        let total: u64 = parts.values().sum();
        let mut add = |metric: &str, value: u64| {
            figures.add(operation, self.name(), metric, value as f64 / times);
        };
        add("instructions", total);
        add(
            "instructions_module",
            parts.get(&module).copied().unwrap_or(0),
        );
        for (part, count) in &parts {
            if *part != module {
                add(&format!("instructions_{part}"), *count);
            }
        }
        add("commands", traffic.commands());
        for (command, count) in &traffic.commands {
            add(&format!("commands_{command}"), *count);
        }
        add("kicks", traffic.kicks);
        add("interrupts", traffic.interrupts);
        add("bytes", traffic.bytes);
        self.write_profile(operation, times, counts, total)
    }

    /// Leaves the functions in which an operation's instructions were executed.
    fn write_profile(
        &self,
        operation: &str,
        times: f64,
        counts: &Counts,
        total: u64,
    ) -> Result<()> {
        let mut text = String::from("# instructions of one time, share, part, function\n");
        for (part, function, count) in self.symbols.by_function(counts) {
            writeln!(
                text,
                "{:12.1} {:5.1}% {part:16} {function}",
                count as f64 / times,
                100.0 * count as f64 / total as f64
            )?;
        }
        let dir = profiles(&self.vm.dir)?;
        fs::write(dir.join(format!("{operation}.txt")), text)?;
        Ok(())
    }
}

fn profiles(dir: &Path) -> Result<PathBuf> {
    let profiles = dir.join("profiles");
    fs::create_dir_all(&profiles)?;
    Ok(profiles)
}
