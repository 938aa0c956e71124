// SPDX-License-Identifier: GPL-2.0

//! A guest: QEMU, its monitor, its console, and the agent inside.
//!
//! Everything that a guest and its QEMU say arrives as a [`Note`] in one list, in the order of arrival. Whoever waits names the
//! note that is awaited and the place in the list from which on it counts, so that nothing is missed and nothing is slept for.

use std::fmt::Display;
use std::fs::{
    self,
    File, //
};
use std::io::{
    BufRead,
    BufReader,
    Write, //
};
use std::os::unix::net::{
    UnixListener,
    UnixStream, //
};
use std::path::{
    Path,
    PathBuf, //
};
use std::process::{
    Child,
    Command,
    Stdio, //
};
use std::sync::mpsc::{
    self,
    Receiver,
    RecvTimeoutError,
    Sender, //
};
use std::thread;
use std::time::{
    Duration,
    Instant, //
};

use anyhow::{
    Context,
    Result,
    anyhow,
    bail,
    ensure, //
};
use serde_json::{
    Value,
    json, //
};
use tempfile::TempDir;
use virtgpu_guest::wire::{
    CardInfo,
    Order,
    Report,
    Shown, //
};

use crate::accelerator;
use crate::host::{
    self,
    Host, //
};
use crate::initramfs;
use crate::kernel::Kernel;
use crate::logs;
use crate::removal;
use crate::vnc::Window;

/// How long a guest may take to its shell. It takes 3 s on an idle machine, and a machine may be busy.
const BOOT_LIMIT: Duration = Duration::from_secs(90);

/// How long anything else in a guest may take.
pub const LIMIT: Duration = Duration::from_secs(40);

/// How long the monitor may take to answer.
const MONITOR_LIMIT: Duration = Duration::from_secs(20);

/// How many times as long everything may take with a kernel that looks at every access to memory, or where instructions are counted.
const PATIENCE: u32 = 6;

const SIGTERM: i32 = 15;

/// QEMU's end of the reference host. A configuration space of 24 bytes is one with a blob alignment.
pub const REFERENCE: &str =
    "vhost-user-test-device-pci,virtio-id=16,num_vqs=2,config_size=24,vq_size=256,chardev=gpu";

/// Returns [`REFERENCE`] with another value of a property that it has.
pub fn reference_with(property: &str, value: impl Display) -> String {
    let mut known = false;
    let properties = REFERENCE.split(',').map(|one| match one.split_once('=') {
        Some((name, _)) if name == property => {
            known = true;
            format!("{name}={value}")
        }
        _ => one.to_owned(),
    });
    let properties: Vec<_> = properties.collect();
    assert!(known, "the reference host's device has no {property}");
    properties.join(",")
}

/// Name of the GPU in the machine.
pub const GPU: &str = "gpu0";

/// Names of what the console said in the directory of a guest, and of what it said the first time if the guest was booted twice.
pub(crate) const CONSOLE: &str = "console.log";
pub(crate) const FIRST_CONSOLE: &str = "console-first.log";

/// Name of the gdb stub's socket.
const DEBUGGER: &str = "gdb";

/// Name of the test protocol's socket.
const BUS: &str = "bus";

/// A machine to boot.
#[derive(Clone)]
pub struct Machine {
    /// QEMU's `-machine`.
    pub machine: &'static str,
    /// Memory, in QEMU's notation, if it is not to be what does for the kernel.
    pub memory: Option<&'static str>,
    /// QEMU's `-device` arguments; the GPU has the id [`GPU`].
    pub devices: Vec<String>,
    /// Options of the reference host, if the GPU is its.
    pub host: Option<Vec<String>>,
    pub cpus: u32,
    /// Counted instructions for a clock: what the guest measures does not depend on the host.
    pub icount: bool,
    /// Appended to the kernel's command line.
    pub append: String,
    /// How many heads have a window, whose size the case can change.
    pub windows: u32,
    /// Whether a [`crate::debugger::Debugger`] can halt the guest.
    pub debugger: bool,
    /// Whether the GPU can vanish, see [`crate::removal`].
    pub removable: bool,
    /// Whether there is a disk to swap and hibernate to, of this many MiB.
    pub swap: Option<u32>,
    /// More programs, which come with their libraries, and other files for the guest's `/bin`.
    pub programs: Vec<PathBuf>,
    /// More arguments for QEMU.
    pub arguments: Vec<String>,
}

impl Machine {
    /// A machine with the given GPU.
    pub fn with_gpu(device: &str) -> Self {
        Self {
            machine: "pc,hpet=off",
            memory: None,
            devices: vec![format!("{device},id={GPU}")],
            host: None,
            cpus: 1,
            icount: false,
            append: String::new(),
            windows: 0,
            debugger: false,
            removable: false,
            swap: None,
            programs: Vec::new(),
            arguments: Vec::new(),
        }
    }

    /// A machine with the given PCI Express GPU behind a root port.
    pub fn behind_root_port(device: &str) -> Self {
        Self {
            machine: "q35,hpet=off",
            devices: vec![
                "pcie-root-port,id=port0".into(),
                format!("{device},id={GPU},bus=port0"),
            ],
            ..Self::with_gpu(device)
        }
    }

    /// A machine whose GPU is that of the reference host, which is given `options`. More properties can be added to the device,
    /// [`REFERENCE`].
    pub fn on_reference_host(options: &[&str]) -> Self {
        Self {
            host: Some(options.iter().map(|word| word.to_string()).collect()),
            ..Self::with_gpu(REFERENCE)
        }
    }

    fn arguments(&self, kernel: &Kernel, dir: &Path, shell: bool) -> Result<Vec<String>> {
        let accelerator = match self.icount {
            true => "tcg",
            false => accelerator::fastest(&kernel.image),
        };
        // The kernel's idea of a valid address is wrong for a moment while it boots with five levels of page tables, and KASAN
        // complains if an interrupt comes then.
        let cpu = match kernel.has("CONFIG_KASAN") {
            true => "max,la57=off",
            false => "max",
        };
        // What KASAN and kmemleak need of 512 MiB, and a hibernating guest's copy of it, leave next to nothing for those who draw
        // meanwhile.
        let memory = self.memory.unwrap_or(match kernel.has("CONFIG_KASAN") {
            true => "1G",
            false => "512M",
        });
        // A host under load may be too late for the kernel's check whether the timer ticks.
        let mut append = format!(
            "console=ttyS0 no_console_suspend ignore_loglevel pm_debug_messages \
             suspend.pm_test_delay=0 oops=panic panic=-1 no_timer_check {}",
            self.append
        );
        if self.icount {
            append += " tsc=reliable";
        }
        if kernel.has("CONFIG_DEBUG_KMEMLEAK") {
            // Without checks, slabs keep the addresses of objects that they have handed out, where kmemleak finds them.
            append += " slab_debug=F";
        }
        if self.swap.is_some() {
            // On a busy machine a kernel may find the local APIC's timer wrong and have no handler for it; if the kernel that reads
            // the image has not, and uses it, the one in the image dies of its first tick.
            append += " resume=/dev/vda nolapic_timer";
        }
        if shell {
            append += " lab.shell";
        }
        let display = match std::env::var("DISPLAY_BACKEND") {
            Ok(name) if !name.is_empty() => name,
            _ => "none".into(),
        };
        let mut arguments: Vec<String> = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-run-with",
            "exit-with-parent=on",
            "-machine",
            self.machine,
            "-accel",
            accelerator,
            "-cpu",
            cpu,
            "-m",
            memory,
            "-display",
            &display,
            "-vga",
            "none",
            "-trace",
            "virtio_gpu_*",
            "-d",
            "guest_errors",
        ]
        .map(String::from)
        .into();
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        add("-D", dir.join("qemu.log").display().to_string());
        add("-smp", self.cpus.to_string());
        add("-kernel", kernel.image.display().to_string());
        add(
            "-initrd",
            initramfs::make(kernel, &self.programs)?
                .display()
                .to_string(),
        );
        add("-append", append);
        if self.icount {
            // The guest's clock must not run ahead while another process, which knows nothing of it, does something.
            let sleep = if self.host.is_some() { "on" } else { "off" };
            add("-icount", format!("shift=0,sleep={sleep}"));
        }
        if self.host.is_some() {
            // It reads and writes the guest's memory.
            add(
                "-object",
                format!("memory-backend-memfd,id=memory,size={memory},share=on"),
            );
            add("-machine", "memory-backend=memory".into());
        }
        for device in &self.devices {
            add("-device", device.clone());
        }
        if self.removable {
            let path = dir.join("ones");
            fs::write(&path, vec![u8::MAX; removal::ONES_SIZE as usize])?;
            add(
                "-object",
                format!(
                    "memory-backend-file,id=ones,mem-path={},size={},share=on,readonly=on,rom=on",
                    path.display(),
                    removal::ONES_SIZE
                ),
            );
            let (slot, function) = removal::ONES_PLACE;
            add(
                "-device",
                format!("ivshmem-plain,memdev=ones,addr={slot:x}.{function}"),
            );
        }
        if let Some(size) = self.swap {
            // The disk outlives a guest that starts again.
            let path = dir.with_file_name("swap");
            if !path.exists() {
                File::create(&path)?.set_len(u64::from(size) << 20)?;
            }
            arguments.push("-drive".into());
            arguments.push(format!(
                "if=none,id=swap,format=raw,file={}",
                path.display()
            ));
            arguments.extend(["-device", "virtio-blk-pci,drive=swap"].map(String::from));
        }
        arguments.extend_from_slice(&self.arguments);
        Ok(arguments)
    }
}

/// Something that a guest or its QEMU said.
#[derive(Debug, Clone)]
pub enum Note {
    /// A message of QEMU's monitor.
    Monitor(Value),
    /// A report of the agent.
    Agent(Report),
    /// A line on the console.
    Console(String),
}

/// A place in the list of notes.
#[derive(Debug, Clone, Copy)]
pub struct Mark(usize);

/// A program that runs in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program(u32);

impl Program {
    /// Whether a report's `id` means this program.
    pub fn is(self, id: u32) -> bool {
        self.0 == id
    }
}

/// What a program left.
#[derive(Debug, Default)]
pub struct Output {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Output {
    /// Adds what `program` says in `note`. Returns its exit status if it has ended.
    fn take_in(&mut self, program: Program, note: &Note) -> Option<i32> {
        let (stream, text) = match note {
            Note::Agent(Report::Out { id, text }) if program.is(*id) => (&mut self.out, text),
            Note::Agent(Report::Err { id, text }) if program.is(*id) => (&mut self.err, text),
            Note::Agent(Report::Ended { id, code }) if program.is(*id) => return Some(*code),
            _ => return None,
        };
        stream.push_str(text);
        stream.push('\n');
        None
    }
}

/// A guest that runs. It ends with this object.
pub struct Vm {
    qemu: Child,
    monitor: UnixStream,
    agent: UnixStream,
    notes: Receiver<Note>,
    seen: Vec<Note>,
    programs: u32,
    commands: u64,
    /// Directory of this guest's logs.
    pub dir: PathBuf,
    /// The machine that runs.
    pub machine: Machine,
    /// The reference host, if the GPU is its.
    pub host: Option<Host>,
    /// How many times as long as in other machines everything may take.
    pub patience: u32,
    windows: Vec<Window>,
    sockets: TempDir,
}

impl Vm {
    /// Boots a guest until its agent listens, and loads the driver. Logs go to `dir`.
    pub fn boot(kernel: &Kernel, machine: &Machine, dir: &Path) -> Result<Self> {
        let mut vm = Self::boot_bare(kernel, machine, dir)?;
        vm.run("load-driver")?;
        if kernel.has("CONFIG_KASAN") {
            // Else a guest that hibernates first takes all memory there is, for a while, so that its image becomes small.
            vm.run("echo 1073741824 > /sys/power/image_size")?;
        }
        Ok(vm)
    }

    /// As [`Vm::boot`], without the driver's modules.
    pub fn boot_bare(kernel: &Kernel, machine: &Machine, dir: &Path) -> Result<Self> {
        let attempt = || -> Result<Self> {
            let mut vm = Self::start(kernel, machine, dir)?;
            let ready = |note: &Note| matches!(note, Note::Agent(Report::Ready)).then_some(());
            vm.wait("the guest's agent", Mark(0), BOOT_LIMIT, ready)?;
            Ok(vm)
        };
        attempt().or_else(|error| {
            // About one boot in sixty hangs under TCG on a loaded machine, before any of our code runs.
            eprintln!("{}: no shell, booting once more: {error:#}", dir.display());
            if dir.join(CONSOLE).exists() {
                fs::rename(dir.join(CONSOLE), dir.join(FIRST_CONSOLE))?;
            }
            attempt()
        })
    }

    /// Starts QEMU and waits for its monitor only.
    pub fn start(kernel: &Kernel, machine: &Machine, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let sockets = tempfile::Builder::new().prefix("virtgpu-").tempdir()?;
        let socket = |name: &str| sockets.path().join(name);
        let listen = |name: &str| UnixListener::bind(socket(name));
        let listeners = (listen("monitor")?, listen("console")?, listen("agent")?);

        let mut arguments = machine.arguments(kernel, dir, false)?;
        let host = match &machine.host {
            None => None,
            Some(options) => Some(Host::start(options, dir)?),
        };
        if let Some(host) = &host {
            arguments.push("-chardev".into());
            arguments.push(format!("socket,id=gpu,path={}", host.socket().display()));
        }
        // A microvm has one serial line of its own.
        let agent = match machine.machine.starts_with("microvm") {
            true => ["-device", "isa-serial,chardev=agent,iobase=0x2f8,irq=3"],
            false => ["-serial", "chardev:agent"],
        };
        for (name, user) in [
            ("monitor", ["-qmp", "chardev:monitor"]),
            ("console", ["-serial", "chardev:console"]),
            ("agent", agent),
        ] {
            let path = socket(name);
            arguments.push("-chardev".into());
            arguments.push(format!("socket,id={name},path={}", path.display()));
            arguments.extend(user.into_iter().map(String::from));
        }
        for head in 0..machine.windows {
            arguments.push("-vnc".into());
            let path = socket(&format!("vnc{head}"));
            arguments.push(format!(
                "unix:{},id=vnc{head},display={GPU},head={head}",
                path.display()
            ));
        }
        if machine.debugger {
            let path = socket(DEBUGGER);
            arguments.push("-gdb".into());
            arguments.push(format!("unix:{},server=on,wait=off", path.display()));
        }
        if machine.removable {
            let path = socket(BUS);
            arguments.push("-qtest".into());
            arguments.push(format!("unix:{},server=on,wait=off", path.display()));
            arguments.extend(["-qtest-log", "none"].map(String::from));
        }
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run qemu-system-x86_64")?;
        fs::write(dir.join("qemu.args"), arguments.join("\n"))?;

        // QEMU closes its standard error when it ends, of its own will or not. If it never came to connect, somebody must.
        let mut stderr = qemu.stderr.take().expect("piped");
        let mut log = File::create(dir.join("qemu.stderr"))?;
        let wake = [socket("monitor"), socket("console"), socket("agent")];
        thread::spawn(move || {
            let _ = std::io::copy(&mut stderr, &mut log);
            for path in wake {
                let _ = UnixStream::connect(path);
            }
        });

        let (sender, notes) = mpsc::channel();
        let (monitor, _) = listeners.0.accept()?;
        let (console, _) = listeners.1.accept()?;
        let (agent, _) = listeners.2.accept()?;
        let log = File::create(dir.join(CONSOLE))?;
        read_json(monitor.try_clone()?, sender.clone(), Note::Monitor);
        read_json(agent.try_clone()?, sender.clone(), Note::Agent);
        read_console(console, log, sender);

        let mut vm = Self {
            qemu,
            monitor,
            agent,
            notes,
            seen: Vec::new(),
            programs: 0,
            commands: 0,
            dir: dir.to_owned(),
            machine: machine.clone(),
            host,
            patience: match machine.icount || kernel.has("CONFIG_KASAN") {
                true => PATIENCE,
                false => 1,
            },
            windows: Vec::new(),
            sockets,
        };
        vm.monitor("qmp_capabilities", json!({}))?;
        Ok(vm)
    }

    /// Returns the reference host of a machine that has it.
    pub fn host(&self) -> Result<&Host> {
        self.host.as_ref().context("the machine has no such host")
    }

    /// Returns the present end of the list of notes.
    pub fn mark(&mut self) -> Mark {
        self.seen.extend(self.notes.try_iter());
        Mark(self.seen.len())
    }

    /// Returns the notes after `mark` that have arrived.
    pub fn since(&mut self, mark: Mark) -> &[Note] {
        self.seen.extend(self.notes.try_iter());
        &self.seen[mark.0..]
    }

    /// Waits for the first note after `mark` that `pick` has a use for, and for `limit` at most.
    pub fn wait<T>(
        &mut self,
        what: &str,
        mark: Mark,
        limit: Duration,
        mut pick: impl FnMut(&Note) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit * self.patience;
        let mut next = mark.0;
        loop {
            while let Some(note) = self.seen.get(next) {
                if let Some(found) = pick(note) {
                    return Ok(found);
                }
                next += 1;
            }
            match self
                .notes
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(note) => self.seen.push(note),
                Err(RecvTimeoutError::Timeout) => {
                    let last = self.last_console_lines();
                    bail!(
                        "waited {} s for {what}; the console's last lines:\n{last}",
                        limit.as_secs()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let stderr =
                        fs::read_to_string(self.dir.join("qemu.stderr")).unwrap_or_default();
                    let last = self.last_console_lines();
                    bail!(
                        "QEMU ended while waiting for {what}: {stderr}\nthe console's last lines:\n{last}"
                    )
                }
            }
        }
    }

    fn last_console_lines(&self) -> String {
        let lines = self.seen.iter().rev().filter_map(|note| match note {
            Note::Console(line) => Some(line.as_str()),
            _ => None,
        });
        let mut last: Vec<&str> = lines.take(12).collect();
        last.reverse();
        last.join("\n")
    }

    /// Gives QEMU's monitor a command, and returns its answer.
    pub fn monitor(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mark = self.mark();
        self.commands += 1;
        let id = self.commands;
        let text = json!({ "execute": command, "arguments": arguments, "id": id });
        writeln!(self.monitor, "{text}").with_context(|| format!("QEMU is gone ({command})"))?;
        let answer = self.wait(command, mark, MONITOR_LIMIT, |note| match note {
            Note::Monitor(message) if message["id"] == id => Some(message.clone()),
            _ => None,
        })?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => bail!("QEMU refuses {command}: {}", answer["error"]["desc"]),
        }
    }

    /// Gives a command of QEMU's human monitor.
    pub fn human_monitor(&mut self, command: &str) -> Result<String> {
        let answer = self.monitor("human-monitor-command", json!({ "command-line": command }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for an event of QEMU.
    pub fn wait_event(&mut self, name: &str, mark: Mark) -> Result<()> {
        self.wait(&format!("QEMU's event {name}"), mark, LIMIT, |note| {
            event(note, name)
        })
    }

    /// Waits for a line on the console that contains `text`.
    pub fn wait_console(&mut self, text: &str, mark: Mark) -> Result<()> {
        self.wait(
            &format!("'{text}' on the console"),
            mark,
            LIMIT,
            |note| match note {
                Note::Console(line) if line.contains(text) => Some(()),
                _ => None,
            },
        )
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        let text = serde_json::to_string(order)?;
        writeln!(self.agent, "{text}").context("QEMU is gone")
    }

    /// Starts a program in the guest.
    pub fn start_program(&mut self, argv: &[&str]) -> Result<Program> {
        self.programs += 1;
        let id = self.programs;
        let argv = argv.iter().map(|word| word.to_string()).collect();
        self.order(&Order::Start { id, argv })?;
        Ok(Program(id))
    }

    /// Gives a program a line on its standard input.
    pub fn say(&mut self, program: Program, text: &str) -> Result<()> {
        self.order(&Order::Say {
            id: program.0,
            text: text.into(),
        })
    }

    /// Sends a program a signal.
    pub fn signal(&mut self, program: Program, signal: i32) -> Result<()> {
        self.order(&Order::Signal {
            id: program.0,
            signal,
        })
    }

    /// Waits for a line that the program writes after `mark` and that starts with `text`, and returns what follows.
    ///
    /// A program that ends instead is an error.
    pub fn wait_line(&mut self, program: Program, text: &str, mark: Mark) -> Result<String> {
        let mut complaints = String::new();
        self.wait(
            &format!("'{text}' of program {}", program.0),
            mark,
            LIMIT,
            |note| match note {
                Note::Agent(Report::Out { id, text: line }) if *id == program.0 => line
                    .strip_prefix(text)
                    .map(|rest| Ok(rest.trim().to_owned())),
                Note::Agent(Report::Err { id, text: line }) if *id == program.0 => {
                    complaints += line;
                    complaints.push('\n');
                    None
                }
                Note::Agent(Report::Ended { id, code }) if *id == program.0 => Some(Err(anyhow!(
                    "the program ended with {code} instead of '{text}': {complaints}"
                ))),
                _ => None,
            },
        )?
    }

    /// As [`Vm::wait_line`], but a program that ends instead, or has ended, is no error. Returns whether the line came.
    pub fn wait_line_or_end(&mut self, program: Program, text: &str, mark: Mark) -> Result<bool> {
        let what = format!("'{text}' of program {}, or its end", program.0);
        let mut next = 0;
        self.wait(&what, Mark(0), LIMIT, |note| {
            next += 1;
            match note {
                Note::Agent(Report::Ended { id, .. }) if *id == program.0 => Some(false),
                Note::Agent(Report::Out { id, text: line })
                    if *id == program.0 && next > mark.0 && line.starts_with(text) =>
                {
                    Some(true)
                }
                _ => None,
            }
        })
    }

    /// Waits until the program has ended, and returns everything that it wrote.
    pub fn wait_end(&mut self, program: Program) -> Result<Output> {
        let mut output = Output::default();
        self.wait(
            &format!("the end of program {}", program.0),
            Mark(0),
            LIMIT,
            |note| output.take_in(program, note),
        )
        .map(|code| Output { code, ..output })
    }

    /// What the program has left, if it has ended.
    pub fn ended(&mut self, program: Program) -> Option<Output> {
        let mut output = Output::default();
        let notes = self.since(Mark(0));
        let code = notes
            .iter()
            .find_map(|note| output.take_in(program, note))?;
        Some(Output { code, ..output })
    }

    /// Waits until another kernel has come up in the place of the one that ran at `mark`, and loads the driver.
    pub fn wait_next_kernel(&mut self, mark: Mark) -> Result<()> {
        self.wait("the agent of the next kernel", mark, BOOT_LIMIT, |note| {
            matches!(note, Note::Agent(Report::Ready)).then_some(())
        })?;
        self.run("load-driver").map(drop)
    }

    /// Runs a shell command in the guest, to its end.
    pub fn try_run(&mut self, command: &str) -> Result<Output> {
        let program = self.start_program(&["sh", "-c", command])?;
        self.wait_end(program)
    }

    /// Runs a shell command in the guest that must succeed, and returns its output.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let output = self.try_run(command)?;
        ensure!(
            output.code == 0,
            "'{command}' ended with {} in the guest: {}{}",
            output.code,
            output.out,
            output.err
        );
        Ok(output.out)
    }

    /// Waits until so many tasks sleep in the Rust driver: there they wait for the host, for room in the ring, or until they may go on.
    pub fn wait_for_waiters(&mut self, count: usize) -> Result<()> {
        self.run(&format!(
            "until [ $(grep -ls virtgpu_rs /proc/[0-9]*/wchan | wc -l) = {count} ]; do :; done"
        ))
        .map(drop)
    }

    /// Closes a program's standard input.
    pub fn hang_up(&mut self, program: Program) -> Result<()> {
        self.order(&Order::HangUp { id: program.0 })
    }

    /// Gives the window on a head a size. Size 0 by 0 closes it.
    pub fn start_to_resize_window(&mut self, head: u32, width: u16, height: u16) -> Result<()> {
        while self.windows.len() < self.machine.windows as usize {
            let path = self
                .sockets
                .path()
                .join(format!("vnc{}", self.windows.len()));
            self.windows.push(Window::open(&path)?);
        }
        self.windows[head as usize].resize(width, height)
    }

    /// As [`Vm::start_to_resize_window`], and waits until the guest has noticed.
    pub fn resize_window(&mut self, head: u32, width: u16, height: u16) -> Result<()> {
        self.until_uevent("/drm/card", "HOTPLUG=1", |vm| {
            vm.start_to_resize_window(head, width, height)
        })
    }

    /// Does something, and waits until the guest's kernel has reported an event with both texts.
    pub fn until_uevent(
        &mut self,
        path: &str,
        what: &str,
        act: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mark = self.mark();
        let listener = self.start_program(&["virtgpu-guest", "uevents"])?;
        self.wait_line(listener, "listening", mark)?;
        act(self)?;
        self.wait(
            &format!("a uevent with {path} and {what}"),
            mark,
            LIMIT,
            |note| match note {
                Note::Agent(Report::Out { id, text }) if listener.is(*id) => {
                    (text.contains(path) && text.contains(what)).then_some(())
                }
                _ => None,
            },
        )?;
        self.signal(listener, SIGTERM)?;
        self.wait_end(listener)?;
        Ok(())
    }

    /// Takes the GPU out of the machine, and waits until the guest has let go of it.
    pub fn unplug(&mut self) -> Result<()> {
        let mark = self.mark();
        self.monitor("device_del", json!({ "id": GPU }))?;
        self.wait_unplugged(mark)
    }

    /// Waits until the guest has let go of a GPU that is being taken out.
    pub fn wait_unplugged(&mut self, mark: Mark) -> Result<()> {
        self.wait("the GPU to be gone", mark, LIMIT, |note| match note {
            // There is one for each part of it, too.
            Note::Monitor(message) if message["data"]["device"] == GPU => {
                event(note, "DEVICE_DELETED")
            }
            _ => None,
        })
    }

    /// Puts the reference host's GPU back into `bus`, and waits until the guest has a card. The host is a new one: the old one, which
    /// has lost its guest, must not have anything to complain of.
    pub fn plug(&mut self, bus: &str) -> Result<()> {
        const ANOTHER: &str = "another-gpu";
        let options = self.machine.host.clone();
        let options = options.context("the machine has no reference host")?;
        self.host = None;
        let complaints = host::complaints(&self.dir, &[])?;
        ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
        let host = Host::start(&options, &self.dir)?;
        let socket = host.socket();
        self.host = Some(host);
        let device = reference_with("chardev", ANOTHER);
        self.until_uevent("/drm/card", "ACTION=add", |vm| {
            for command in [
                format!("chardev-remove {ANOTHER}"),
                format!("chardev-add socket,id={ANOTHER},path={}", socket.display()),
                format!("device_add {device},id={GPU},bus={bus}"),
            ] {
                let answer = vm.human_monitor(&command)?;
                let first = command.starts_with("chardev-remove");
                ensure!(first || answer.is_empty(), "{command}: {answer}");
            }
            Ok(())
        })
    }

    /// How often the host has been asked to create the guest's first resource of all: once, and again for each time that it had lost
    /// everything.
    pub fn creations(&self) -> Result<usize> {
        let log = fs::read_to_string(self.dir.join("qemu.log"))?;
        let created: Vec<_> = logs::resource_commands(&log)
            .into_iter()
            .filter(|(name, _)| *name == "res_create_2d")
            .collect();
        Ok(created
            .iter()
            .filter(|one| Some(*one) == created.first())
            .count())
    }

    /// Path of the gdb stub's socket.
    pub fn debugger(&self) -> Result<PathBuf> {
        ensure!(self.machine.debugger, "the machine has no debugger");
        Ok(self.sockets.path().join(DEBUGGER))
    }

    /// Path of the test protocol's socket.
    pub(crate) fn bus(&self) -> Result<PathBuf> {
        ensure!(self.machine.removable, "the machine's GPU cannot vanish");
        Ok(self.sockets.path().join(BUS))
    }

    /// Returns the card as the guest sees it.
    pub fn card(&mut self) -> Result<CardInfo> {
        Ok(serde_json::from_str(&self.run("virtgpu-guest info")?)?)
    }

    /// Returns the framebuffers that the guest has its outputs show.
    pub fn framebuffers(&mut self) -> Result<Vec<Shown>> {
        Ok(serde_json::from_str(
            &self.run("virtgpu-guest framebuffers")?,
        )?)
    }

    /// Starts QEMU again with the same machine, after it has ended by itself, as the caller knows from its event. Programs keep
    /// their names.
    pub fn start_again(mut self, kernel: &Kernel, dir: &Path) -> Result<Self> {
        self.qemu.wait()?;
        let mut vm = Self::start(kernel, &self.machine, dir)?;
        vm.programs = self.programs;
        Ok(vm)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Runs a guest with a shell on this terminal, and returns QEMU's exit status.
pub fn shell(kernel: &Kernel, machine: &Machine, dir: &Path) -> Result<std::process::ExitStatus> {
    fs::create_dir_all(dir)?;
    Ok(Command::new("qemu-system-x86_64")
        .args(machine.arguments(kernel, dir, true)?)
        .args(["-serial", "mon:stdio"])
        .status()?)
}

/// Picks an event of QEMU.
pub fn event(note: &Note, name: &str) -> Option<()> {
    matches!(note, Note::Monitor(message) if message["event"] == name).then_some(())
}

fn read_json<T: serde::de::DeserializeOwned + Send + 'static>(
    stream: UnixStream,
    to: Sender<Note>,
    note: fn(T) -> Note,
) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { break };
            // A reset of the serial line may cut one short; what waits for it runs into its limit.
            if let Ok(value) = serde_json::from_slice(&line)
                && to.send(note(value)).is_err()
            {
                break;
            }
        }
    });
}

fn read_console(stream: UnixStream, mut log: File, to: Sender<Note>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if writeln!(log, "{line}").is_err() || to.send(Note::Console(line)).is_err() {
                break;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_gets_another_value() {
        let device = reference_with("vq_size", 16);
        assert_eq!(device, REFERENCE.replace("vq_size=256", "vq_size=16"));
        assert_ne!(device, REFERENCE);
    }

    #[test]
    #[should_panic(expected = "has no vq_sizes")]
    fn a_property_must_be_there() {
        reference_with("vq_sizes", 16);
    }
}
