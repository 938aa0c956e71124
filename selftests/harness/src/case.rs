// SPDX-License-Identifier: GPL-2.0

//! A test case: its guest, and what has to hold at the end of every case.

use std::fs;
use std::path::{
    Path,
    PathBuf, //
};

use anyhow::{
    Context,
    Result,
    bail, //
};
use libtest_mimic::{
    Failed,
    Trial, //
};

use crate::host;
use crate::kernel::{
    Kernel,
    results, //
};
use crate::logs;
use crate::vm::{
    CONSOLE,
    FIRST_CONSOLE,
    Machine,
    Vm, //
};

/// A test case that runs.
pub struct Case {
    pub kernel: Kernel,
    vm: Option<Vm>,
    /// How many guests there have been; each has a directory of its own.
    guests: u32,
    dir: PathBuf,
    expected: Vec<&'static str>,
    refused: Vec<&'static str>,
    violations: bool,
}

impl Case {
    fn new(name: &str) -> Result<Self> {
        let dir = results()?.join("cases").join(name.replace("::", "."));
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        fs::create_dir_all(&dir)?;
        Ok(Self {
            kernel: Kernel::from_env()?,
            vm: None,
            guests: 0,
            dir,
            expected: Vec::new(),
            refused: Vec::new(),
            violations: false,
        })
    }

    /// Says that a line with `text` in the kernel's log is what the case is about.
    pub fn expect_in_log(&mut self, text: &'static str) {
        self.expected.push(text);
    }

    /// Says that the reference host may refuse `command`, without being told to.
    pub fn expect_refused(&mut self, command: &'static str) {
        self.refused.push(command);
    }

    /// Says that the case looks at violations, and what the reference host refuses, by itself.
    pub fn expect_violations(&mut self) {
        self.violations = true;
    }

    /// Boots the case's guest, and loads the driver.
    pub fn boot(&mut self, machine: &Machine) -> Result<&mut Vm> {
        let dir = self.next_guest();
        let vm = Vm::boot(&self.kernel, machine, &dir)?;
        Ok(self.vm.insert(vm))
    }

    /// The guest that runs.
    pub fn vm(&mut self) -> Result<&mut Vm> {
        self.vm.as_mut().context("there is no guest")
    }

    /// Ends the guest, which cannot be asked for its log any more.
    pub fn switch_off(&mut self) {
        self.vm = None;
    }

    /// As [`Case::boot`], without the driver.
    pub fn boot_bare(&mut self, machine: &Machine) -> Result<&mut Vm> {
        let dir = self.next_guest();
        let vm = Vm::boot_bare(&self.kernel, machine, &dir)?;
        Ok(self.vm.insert(vm))
    }

    /// Starts the guest, which has switched itself off, once more: what ran in it goes on if its kernel finds it on the disk.
    pub fn boot_again(&mut self) -> Result<&mut Vm> {
        let vm = self.vm.take().context("there was no first time")?;
        let dir = self.next_guest();
        let vm = vm.start_again(&self.kernel, &dir)?;
        Ok(self.vm.insert(vm))
    }

    fn guest_dir(&self, number: u32) -> PathBuf {
        self.dir.join(format!("guest{number}"))
    }

    fn next_guest(&mut self) -> PathBuf {
        self.guests += 1;
        self.guest_dir(self.guests)
    }

    /// Looks for what must not be in any guest's logs.
    fn check_logs(&mut self) -> Result<()> {
        let mut logs = Vec::new();
        let mut complaints = Vec::new();
        if let Some(vm) = &mut self.vm {
            let hung = hung(vm).context("looking for tasks that hang");
            for task in or_complain(hung, &mut complaints).unwrap_or_default() {
                complaints.push(format!("a task hangs: {task}"));
            }
        }
        if self.kernel.has("CONFIG_DEBUG_KMEMLEAK")
            && let Some(vm) = &mut self.vm
        {
            let leaks = leaks(vm).context("looking for leaks");
            let leaks = or_complain(leaks, &mut complaints).unwrap_or_default();
            if let Some(first) = leaks.lines().next() {
                fs::write(vm.dir.join("leaks.log"), &leaks)?;
                complaints.push(format!("memory leaked, see leaks.log, the first: {first}"));
            }
        }
        if self.kernel.has("CONFIG_LOCKDEP")
            && let Some(vm) = &mut self.vm
        {
            let watched = is_watched(vm).context("asking for lockdep");
            if or_complain(watched, &mut complaints) == Some(false) {
                complaints.push("lockdep has turned itself off".into());
            }
        }
        // The console has it all, unless it was cut off; the guest's own buffer has it, unless it is dead.
        if let Some(vm) = &mut self.vm {
            let log = vm.run("dmesg").context("collecting the kernel's log");
            if let Some(log) = or_complain(log, &mut complaints) {
                fs::write(vm.dir.join("dmesg.log"), &log)?;
                logs.push(log);
            }
        }
        let mut refused = Vec::new();
        for number in 1..=self.guests {
            let dir = self.guest_dir(number);
            if dir.exists() {
                logs.extend(or_complain(read(&dir, CONSOLE), &mut complaints));
                // Only of a guest that had to be booted twice. That it hung is forgiven, not what it said.
                logs.extend(read(&dir, FIRST_CONSOLE).ok());
                let log = or_complain(read(&dir, "qemu.log"), &mut complaints).unwrap_or_default();
                refused.extend(logs::refused_commands(&log).into_iter().map(String::from));
                if host::was_there(&dir) && !self.violations {
                    let of_host = host::complaints(&dir, &self.refused);
                    let of_host = or_complain(of_host, &mut complaints).unwrap_or_default();
                    complaints.extend(of_host);
                }
            }
        }
        let mut faults: Vec<_> = logs
            .iter()
            .flat_map(|log| logs::kernel_faults(log, &self.expected))
            .collect();
        faults.dedup();
        if let Some(first) = faults.first() {
            complaints.push(format!(
                "the kernel's log has {} faults, the first: {first}",
                faults.len()
            ));
        }
        if let Some(first) = refused.first() {
            complaints.push(format!(
                "the host refused {} commands, the first: {first}",
                refused.len()
            ));
        }
        if complaints.is_empty() {
            return Ok(());
        }
        bail!("{}", complaints.join("\n"))
    }
}

/// Returns what was asked for, or adds the reason why there is nothing to `complaints`: what else there is, is to be looked at.
fn or_complain<T>(result: Result<T>, complaints: &mut Vec<String>) -> Option<T> {
    result
        .map_err(|error| complaints.push(format!("{error:#}")))
        .ok()
}

/// Reads a log in the directory of a guest.
fn read(dir: &Path, name: &str) -> Result<String> {
    let path = dir.join(name);
    let log = fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(String::from_utf8_lossy(&log).into_owned())
}

/// Returns the tasks of the guest that hang: that have not moved for longer than anybody waits for the driver, or for a commit. The
/// kernel's own detector does not see those that began to wait when a case was nearly over.
fn hung(vm: &mut Vm) -> Result<Vec<String>> {
    /// In seconds. A commit has 10 s until the kernel complains of it.
    const LONGEST: u32 = 15;
    /// Name and number of each task that waits, whatever comes, how often it has waited, and where.
    const WAITING: &str = r#"
for status in $(grep -ls '^State:.D' /proc/[0-9]*/task/[0-9]*/status); do
    [ -e $status ] || continue
    echo $(sed -n 's/^\(Name\|Pid\|voluntary_ctxt_switches\)://p' $status) $(cat ${status%status}wchan)
done
"#;
    let look = |vm: &mut Vm| -> Result<Vec<String>> {
        let tasks = vm.run(WAITING)?;
        Ok(tasks.lines().map(String::from).collect())
    };
    let mut hung = look(vm)?;
    for _ in 0..LONGEST {
        if hung.is_empty() {
            break;
        }
        vm.run("sleep 1")?;
        let still = look(vm)?;
        hung.retain(|task| still.contains(task));
    }
    Ok(hung)
}

/// Whether the guest's kernel still looks after its locks. It stops after its first report, whatever that was about.
fn is_watched(vm: &mut Vm) -> Result<bool> {
    let stats = vm.run("cat /proc/lockdep_stats")?;
    let mut lines = stats.lines();
    let value = lines.find_map(|line| line.trim().strip_prefix("debug_locks:"));
    Ok(value.context("there is no debug_locks")?.trim() != "0")
}

/// Has the guest's kernel look for memory that nobody has a pointer to any more, and returns what it found.
///
/// It reports nothing that it has not found the same before, hence the first look, and nothing that was younger than MSECS_MIN_AGE
/// when the last look began: by then, 5 s have to have passed in the guest.
fn leaks(vm: &mut Vm) -> Result<String> {
    const LOOK: &str = "echo scan > /sys/kernel/debug/kmemleak";
    const SECONDS: &str = "cut -d . -f 1 /proc/uptime";
    let now: u64 = vm.run(SECONDS)?.trim().parse()?;
    vm.run(LOOK)?;
    vm.run(&format!(
        "until [ $({SECONDS}) -gt {} ]; do sleep 1; done",
        now + 5
    ))?;
    vm.run(LOOK)?;
    vm.run("cat /sys/kernel/debug/kmemleak")
}

/// What a case's name begins with if it takes too long for every day.
const SOAK: &str = "soak::";

/// Makes a test of `run`, which passes only if the logs are clean as well. The long ones run only when they are asked for.
pub fn trial(
    name: impl Into<String>,
    run: impl Fn(&mut Case) -> Result<()> + Send + 'static,
) -> Trial {
    let name = name.into();
    let long = name.starts_with(SOAK);
    Trial::test(name.clone(), move || {
        let mut case = Case::new(&name).map_err(|error| Failed::from(format!("{error:#}")))?;
        let mut complaints = Vec::new();
        if let Err(error) = run(&mut case) {
            complaints.push(format!("{error:#}"));
        }
        if let Err(error) = case.check_logs() {
            complaints.push(format!("{error:#}"));
        }
        if complaints.is_empty() {
            return Ok(());
        }
        complaints.push(format!("logs and pictures: {}", case.dir.display()));
        Err(Failed::from(complaints.join("\n")))
    })
    .with_ignored_flag(long)
}
