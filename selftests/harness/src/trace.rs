// SPDX-License-Identifier: GPL-2.0

//! Traces: what a driver sends to the reference host, for people to read, and compared with what was read once.
//!
//! A trace has a line for each command, with its arguments but for addresses and the number of pieces of memory, which depend on
//! where the guest finds memory. Lines that begin with `--` say what else happened.
//!
//! How often the host was notified depends on timing: a host that is still looking is not notified. Only a batch of commands that
//! an idle host gets is seen as one for sure. A trace of such batches has an empty line between them.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{
    Duration,
    Instant, //
};

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};
use serde_json::Value;

use crate::host::{
    self,
    Entry, //
};
use crate::kernel::Driver;
use crate::vm::{
    LIMIT,
    Vm, //
};

/// Where the traces are that others are compared with, one directory for each driver.
const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden");

/// Arguments of commands that depend on where the guest finds memory.
const VARYING: &[&str] = &["nr_entries"];

/// What a driver sends when the host says that its displays have changed.
const QUESTIONS: &[&str] = &["GET_DISPLAY_INFO", "GET_EDID"];

/// The mark that a trace begins at.
const BEGIN: &str = "begin";

/// Begins a trace here. Without it, a trace begins when the guest is switched on.
pub fn begin(vm: &mut Vm) -> Result<()> {
    step(vm, BEGIN)
}

/// Says in the trace what comes next.
pub fn step(vm: &mut Vm, text: &str) -> Result<()> {
    settle(vm)?.mark(text)
}

/// Waits until the host has got everything that the guest has sent so far.
///
/// The host says that its displays have changed, and the guest asks what they are now: commands come in their order. The
/// questions are left out of the trace.
fn settle(vm: &Vm) -> Result<&host::Host> {
    // Only this one keeps a record.
    let host = vm.host()?;
    let scanout = &host.control("state")?["scanouts"][0];
    host.control(&format!(
        "hotplug 0 {}x{}",
        scanout["size"][0], scanout["size"][1]
    ))?;
    let end = Instant::now() + LIMIT;
    loop {
        let record = host.record()?;
        let hotplug = record.iter().rposition(|entry| entry.event == "hotplug");
        let after = hotplug.map_or(&[][..], |at| &record[at..]);
        if QUESTIONS
            .iter()
            .all(|question| host::commands(after).any(|entry| entry.command == *question))
        {
            return Ok(host);
        }
        ensure!(Instant::now() < end, "the guest does not notice a hotplug");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a trace shows which commands the host was notified of at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batches {
    /// Each step, or the only one, is one batch.
    Shown,
    Hidden,
}

/// Compares what was sent since [`begin`] with the trace `name`. One that is not the same is written anew if the variable `GOLDEN`
/// is `write`.
pub fn expect(vm: &mut Vm, driver: Driver, name: &str, batches: Batches) -> Result<()> {
    let record = settle(vm)?.record()?;
    let begun = host::after_mark(&record, BEGIN).unwrap_or(&record);
    let seen = format!(
        "# SPDX-License-Identifier: GPL-2.0\n\n{}",
        render(begun, batches)
    );
    let path = Path::new(DIRECTORY)
        .join(format!("{driver}").to_lowercase())
        .join(name)
        .with_extension("txt");

    if fs::read_to_string(&path).is_ok_and(|golden| golden == seen) {
        return Ok(());
    }
    if env::var("GOLDEN").is_ok_and(|value| value == "write") {
        fs::create_dir_all(path.parent().context("it is in a directory")?)?;
        fs::write(&path, seen)?;
        eprintln!("golden: wrote {}, which was another one", path.display());
        return Ok(());
    }
    let seen_path = vm.dir.join("trace.txt");
    fs::write(&seen_path, &seen)?;
    let output = Command::new("diff")
        .args([
            "--new-file",
            "--unified=5",
            "--label=golden",
            "--label=seen",
        ])
        .args([&path, &seen_path])
        .output()
        .context("cannot run diff")?;
    bail!(
        "the driver does not send what is in {}:\n{}if it is to send this, GOLDEN=write writes it anew",
        path.display(),
        String::from_utf8_lossy(&output.stdout)
    )
}

/// Makes a trace of a record.
fn render(record: &[Entry], batches: Batches) -> String {
    let mut text = String::new();
    // The last notification's queue and number.
    let mut batch = None;
    let mut settling = false;
    for entry in record {
        let what = match entry.event.as_str() {
            "hotplug" => {
                settling = true;
                continue;
            }
            "mark" => {
                settling = false;
                format!("-- {}", entry.more["text"].as_str().unwrap_or_default())
            }
            "stop" => match entry.more["unanswered"].as_u64() {
                Some(0) => "-- the guest resets the device".into(),
                _ => format!(
                    "-- the guest resets the device, {} commands are lost",
                    entry.more["unanswered"]
                ),
            },
            "reset" => match entry.more["kept"].as_bool() {
                Some(true) => format!("-- the host has kept {} resources", entry.more["resources"]),
                _ => "-- the host has nothing".into(),
            },
            "start" => "-- DRIVER_OK".into(),
            "released" => "-- the host lets go of what it had kept".into(),
            "violation" => format!(
                "-- violation: {}",
                entry.more["text"].as_str().unwrap_or_default()
            ),
            "command" if settling && QUESTIONS.contains(&entry.command.as_str()) => continue,
            "command" => {
                let this = Some((entry.more["queue"].as_str(), entry.kick));
                let is_next = batch.is_none() || batches == Batches::Shown && batch != this;
                if is_next && !text.is_empty() {
                    text.push('\n');
                }
                batch = this;
                text += &command(entry);
                continue;
            }
            _ => continue,
        };
        batch = None;
        if !text.is_empty() {
            text.push('\n');
        }
        text += &what;
        text.push('\n');
    }
    text
}

/// Makes lines of a command.
fn command(entry: &Entry) -> String {
    let mut text = entry.command.clone();
    for (name, value) in entry.args.as_object().into_iter().flatten() {
        let name = name.as_str();
        // To write to a String cannot fail.
        let _ = match (name, value) {
            (name, _) if VARYING.contains(&name) => Ok(()),
            // Its number is not the driver's to choose freely, but nothing depends on it.
            ("fence_id", _) => write!(text, " fenced"),
            ("r", Value::Array(r)) if r.len() == 4 => {
                write!(text, " {}x{}+{}+{}", r[2], r[3], r[0], r[1])
            }
            (name, value) => write!(text, " {name}={value}"),
        };
    }
    if !entry.response.starts_with("OK_") && !entry.response.is_empty() {
        let _ = write!(text, " -> {}", entry.response);
    }
    text.push('\n');
    for violation in &entry.violations {
        let _ = writeln!(text, "    violation: {violation}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &[&str] = &[
        r#"{"event":"command","queue":"control","kick":1,"command":"GET_EDID","args":{"scanout":0},"response":"OK_EDID"}"#,
        r#"{"event":"interrupt","queue":"control"}"#,
        r#"{"event":"command","queue":"control","kick":2,"command":"RESOURCE_ATTACH_BACKING","args":{"resource_id":1,"nr_entries":15,"bytes":4096},"response":"OK_NODATA"}"#,
        r#"{"event":"command","queue":"control","kick":2,"command":"RESOURCE_FLUSH","args":{"r":[1,2,30,40],"resource_id":1,"fence_id":7},"response":"OK_NODATA"}"#,
        r#"{"event":"stop","unanswered":0}"#,
        r#"{"event":"reset","kept":true,"resources":2}"#,
        r#"{"event":"start","features":"0x0","resumed":false}"#,
        r#"{"event":"command","queue":"control","kick":3,"command":"RESOURCE_UNREF","args":{"resource_id":1},"response":"ERR_INVALID_RESOURCE_ID","violations":["there is no resource 1"]}"#,
    ];

    const TRACE: &str = "\
GET_EDID scanout=0

RESOURCE_ATTACH_BACKING resource_id=1 bytes=4096
RESOURCE_FLUSH 30x40+1+2 resource_id=1 fenced

-- the guest resets the device

-- the host has kept 2 resources

-- DRIVER_OK

RESOURCE_UNREF resource_id=1 -> ERR_INVALID_RESOURCE_ID
    violation: there is no resource 1
";

    fn record(lines: &[&str]) -> Vec<Entry> {
        lines
            .iter()
            .map(|line| serde_json::from_str(line).expect("it is well formed"))
            .collect()
    }

    #[test]
    fn a_record_becomes_a_trace() {
        let record = record(RECORD);
        assert_eq!(render(&record, Batches::Shown), TRACE);
        assert_eq!(
            render(&record, Batches::Hidden),
            TRACE.replace("scanout=0\n\n", "scanout=0\n")
        );
    }

    #[test]
    fn what_settles_is_left_out() {
        let lines = [
            r#"{"event":"hotplug","scanout":0}"#,
            r#"{"event":"command","queue":"control","kick":9,"command":"GET_DISPLAY_INFO"}"#,
            r#"{"event":"mark","text":"next"}"#,
            r#"{"event":"command","queue":"control","kick":10,"command":"GET_DISPLAY_INFO"}"#,
        ];
        assert_eq!(
            render(&record(&lines), Batches::Hidden),
            "-- next\n\nGET_DISPLAY_INFO\n"
        );
    }
}
