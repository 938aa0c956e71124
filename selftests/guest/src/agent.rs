// SPDX-License-Identifier: GPL-2.0

//! The agent: runs programs for the harness, at the guest's end of a serial line.

use std::collections::HashMap;
use std::fs::{
    File,
    OpenOptions, //
};
use std::io::{
    BufRead,
    BufReader,
    Read,
    Write, //
};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{
    ChildStdin,
    Command,
    Stdio, //
};
use std::sync::{
    Arc,
    Mutex, //
};
use std::thread;

use anyhow::{
    Context,
    Result, //
};
use rustix::process::{
    Pid,
    Signal, //
};
use rustix::termios::{
    OptionalActions,
    tcgetattr,
    tcsetattr, //
};
use virtgpu_guest::wire::{
    Order,
    Report, //
};

/// The writing end of the line. A report is written in one piece.
#[derive(Clone)]
struct Line(Arc<Mutex<File>>);

impl Line {
    fn report(&self, report: &Report) {
        let mut text = serde_json::to_string(report).expect("reports are plain data");
        text.push('\n');
        // A line that broke cannot carry the complaint either.
        let _ = self
            .0
            .lock()
            .expect("nobody panics while writing")
            .write_all(text.as_bytes());
    }
}

struct Program {
    pid: Pid,
    stdin: Option<ChildStdin>,
}

/// Serves the line at `path` until it hangs up.
pub fn serve(path: &Path) -> Result<()> {
    let tty = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let mut settings = tcgetattr(&tty)?;
    settings.make_raw();
    tcsetattr(&tty, OptionalActions::Now, &settings)?;

    let line = Line(Arc::new(Mutex::new(tty.try_clone()?)));
    let programs = Arc::new(Mutex::new(HashMap::<u32, Program>::new()));
    line.report(&Report::Ready);

    for order in BufReader::new(tty).lines() {
        match serde_json::from_str(&order?)? {
            Order::Start { id, argv } => {
                if let Err(error) = start(id, &argv, &line, &programs) {
                    line.report(&Report::Err {
                        id,
                        text: format!("{argv:?}: {error}"),
                    });
                    line.report(&Report::Ended { id, code: 127 });
                }
            }
            // A program that has just ended is reported as such; what was meant for it is of no use any more.
            Order::Say { id, text } => {
                if let Some(program) = programs.lock().expect("not poisoned").get_mut(&id)
                    && let Some(stdin) = &mut program.stdin
                {
                    let _ = writeln!(stdin, "{text}");
                }
            }
            Order::HangUp { id } => {
                if let Some(program) = programs.lock().expect("not poisoned").get_mut(&id) {
                    program.stdin = None;
                }
            }
            Order::Signal { id, signal } => {
                if let Some(program) = programs.lock().expect("not poisoned").get(&id)
                    && let Some(signal) = Signal::from_named_raw(signal)
                {
                    let _ = rustix::process::kill_process(program.pid, signal);
                }
            }
        }
    }
    Ok(())
}

fn start(
    id: u32,
    argv: &[String],
    line: &Line,
    programs: &Arc<Mutex<HashMap<u32, Program>>>,
) -> Result<()> {
    let (name, arguments) = argv.split_first().context("no program given")?;
    let mut child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;

    let pid = Pid::from_child(&child);
    let stdin = child.stdin.take();
    let stdout = child.stdout.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    programs
        .lock()
        .expect("not poisoned")
        .insert(id, Program { pid, stdin });

    let out = forward(stdout, line.clone(), move |text| Report::Out { id, text });
    let err = forward(stderr, line.clone(), move |text| Report::Err { id, text });
    let line = line.clone();
    let programs = programs.clone();
    thread::spawn(move || {
        let status = child.wait();
        let _ = out.join();
        let _ = err.join();
        programs.lock().expect("not poisoned").remove(&id);
        let code = match status {
            Ok(status) => status
                .code()
                .or_else(|| status.signal().map(|signal| 128 + signal))
                .unwrap_or(255),
            Err(_) => 255,
        };
        line.report(&Report::Ended { id, code });
    });
    Ok(())
}

/// Reports what comes out of `stream`, line by line.
fn forward(
    stream: impl Read + Send + 'static,
    line: Line,
    report: impl Fn(String) -> Report + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for text in BufReader::new(stream).split(b'\n') {
            match text {
                Ok(text) => line.report(&report(String::from_utf8_lossy(&text).into_owned())),
                Err(_) => break,
            }
        }
    })
}
