// SPDX-License-Identifier: GPL-2.0

//! The reference host: a GPU outside of QEMU that is strict, records every command, and speaks FREEZING.
//!
//! A machine has it by [`Machine::on_reference_host`](crate::vm::Machine::on_reference_host); it starts and ends with its guest, and
//! is then at [`Vm::host`](crate::vm::Vm::host). Screens are looked at as on any machine. A case fails at its end if the record has
//! a violation, or a command that was refused and that the case does not expect
//! ([`Case::expect_refused`](crate::case::Case::expect_refused)). What the host was told to do wrong is no refusal.

use std::fs::{
    self,
    File, //
};
use std::io::{
    BufRead,
    BufReader,
    Write, //
};
use std::os::unix::net::UnixStream;
use std::path::{
    Path,
    PathBuf, //
};
use std::process::{
    Child,
    Command,
    Stdio, //
};
use std::sync::Mutex;
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
use image::RgbImage;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::cargo;

/// How long it may take to listen, or to answer.
const LIMIT: Duration = Duration::from_secs(20);

/// Name of the record in the guest's directory.
const RECORD: &str = "record.jsonl";

/// Name of what the host complained of in the guest's directory.
const COMPLAINTS: &str = "host.stderr";

/// A line of the record. Which of its parts there are, depends on the event.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    /// `command`, `interrupt`, `start`, `stop`, `reset`, `mark` and others.
    pub event: String,
    /// The command's name, as in `linux/virtio_gpu.h` without `VIRTIO_GPU_CMD_`.
    #[serde(default)]
    pub command: String,
    #[serde(default)]
    pub args: Value,
    /// How often the guest had notified the host by then, on the command's queue.
    #[serde(default)]
    pub kick: u64,
    /// Bytes of the command, and of the room for its answer.
    #[serde(default)]
    pub length: u64,
    #[serde(default)]
    pub room: u64,
    /// The answer's type, without `VIRTIO_GPU_RESP_`.
    #[serde(default)]
    pub response: String,
    /// What the host did wrong because a rule says so.
    pub fault: Option<String>,
    /// What the host did wrong because its conduct says so.
    pub conduct: Option<String>,
    #[serde(default)]
    pub violations: Vec<String>,
    /// Everything else.
    #[serde(flatten)]
    pub more: Value,
}

impl Entry {
    /// Whether the host refused a command that it was not told to refuse.
    pub fn is_refused(&self) -> bool {
        let is_error = self.response.starts_with("ERR") || self.response.starts_with("0x");
        self.fault.is_none() && self.conduct.is_none() && is_error
    }
}

/// Reads the record of a guest whose directory is `dir`.
pub fn read_record(dir: &Path) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(dir.join(RECORD))?;
    // The last line may not be all there yet.
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

/// Returns what comes after the last mark `text`.
pub fn after_mark<'a>(record: &'a [Entry], text: &str) -> Result<&'a [Entry]> {
    let mark = record
        .iter()
        .rposition(|entry| entry.event == "mark" && entry.more["text"] == text)
        .with_context(|| format!("the record has no mark {text}"))?;
    Ok(&record[mark + 1..])
}

/// Returns the commands in a part of the record.
pub fn commands(record: &[Entry]) -> impl Iterator<Item = &Entry> {
    record.iter().filter(|entry| entry.event == "command")
}

/// Marks of [`Host::misbehave`] and [`Host::behave`].
const MISBEHAVES: &str = "the host misbehaves";
const BEHAVES: &str = "the host behaves";

/// Whether the guest may be led astray by faults of the host.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Excuse {
    None,
    /// The host misbehaves.
    Now,
    /// It did, and what the guest took for true has not been forgotten by a reset yet.
    Earlier,
}

impl Excuse {
    fn after(self, entry: &Entry) -> Self {
        let mark = match entry.event.as_str() {
            "mark" => entry.more["text"].as_str(),
            _ => None,
        };
        match (mark, self) {
            (Some(MISBEHAVES), _) => Self::Now,
            (Some(BEHAVES), Self::Now) => Self::Earlier,
            (_, Self::Earlier) if entry.event == "stop" => Self::None,
            _ => self,
        }
    }
}

/// Returns what must not be in a record: violations, and commands that were refused, except those whose names are in `expected`.
///
/// A guest whose resource the host did not create when it was told to, and that goes on using it, is excused.
fn faults(record: &[Entry], expected: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut excuse = Excuse::None;
    for entry in record {
        excuse = excuse.after(entry);
        // What would have been refused anyway may be struck by a fault, too.
        if excuse != Excuse::None && (entry.is_refused() || entry.fault.is_some()) {
            continue;
        }
        let what = format!("{} {}", entry.command, entry.args);
        if entry.event == "violation" {
            complaints.push(format!("violation: {}", entry.more["text"]));
        }
        for violation in &entry.violations {
            complaints.push(format!("violation by {what}: {violation}"));
        }
        let is_expected = expected.contains(&entry.command.as_str());
        if entry.is_refused() && entry.violations.is_empty() && !is_expected {
            complaints.push(format!("refused: {what}: {}", entry.response));
        }
    }
    complaints
}

/// Whether a guest whose directory is `dir` had a host.
pub(crate) fn was_there(dir: &Path) -> bool {
    dir.join(RECORD).exists()
}

/// Returns what must not be in the directory of a guest: [`faults`] in the record, and anything that the host said.
pub(crate) fn complaints(dir: &Path, expected: &[&str]) -> Result<Vec<String>> {
    let mut complaints = faults(&read_record(dir)?, expected);
    let said = fs::read_to_string(dir.join(COMPLAINTS))?;
    // What it says at its end is in the record as well.
    let said = said.lines().filter(|line| !line.starts_with("violation: "));
    complaints.extend(said.map(|line| format!("the host says: {line}")));
    Ok(complaints)
}

/// Builds the host and returns its path.
fn program() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().expect("not poisoned");
    if let Some(program) = &*built {
        return Ok(program.clone());
    }
    let program = cargo::build(
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../host")),
        &["--package=virtgpu-host"],
        &[],
    )?;
    Ok(built.insert(program).clone())
}

/// A host that runs. It ends with this object.
pub struct Host {
    child: Child,
    dir: PathBuf,
    sockets: TempDir,
}

impl Host {
    /// Starts a host, which leaves its record and its pictures in `dir`.
    pub(crate) fn start(options: &[String], dir: &Path) -> Result<Self> {
        let sockets = tempfile::Builder::new().prefix("virtgpu-").tempdir()?;
        let mut child = Command::new(program()?)
            .arg("--socket")
            .arg(sockets.path().join("gpu"))
            .arg("--control")
            .arg(sockets.path().join("control"))
            .arg("--record")
            .arg(dir.join(RECORD))
            .arg("--png")
            .arg(dir)
            .args(options)
            .stdin(Stdio::null())
            .stderr(File::create(dir.join(COMPLAINTS))?)
            .spawn()
            .context("cannot run the host")?;
        let end = Instant::now() + LIMIT;
        while !sockets.path().join("gpu").exists() {
            if let Some(status) = child.try_wait()? {
                let said = fs::read_to_string(dir.join(COMPLAINTS))?;
                bail!("the host ended with {status}: {said}");
            }
            ensure!(Instant::now() < end, "the host does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self {
            child,
            dir: dir.to_owned(),
            sockets,
        })
    }

    /// Where QEMU finds the GPU.
    pub(crate) fn socket(&self) -> PathBuf {
        self.sockets.path().join("gpu")
    }

    /// Asks the host for something, as `virtgpu-host ctl` does, and returns its answer.
    pub fn control(&self, line: &str) -> Result<Value> {
        let mut stream = UnixStream::connect(self.sockets.path().join("control"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        writeln!(stream, "{line}")?;
        let mut answer = String::new();
        BufReader::new(stream)
            .read_line(&mut answer)
            .with_context(|| format!("waiting for the host's answer to '{line}'"))?;
        let answer: Value = serde_json::from_str(&answer)?;
        if let Some(error) = answer.get("error") {
            bail!("the host refuses '{line}': {error}");
        }
        Ok(answer)
    }

    /// Writes a mark into the record, see [`after_mark`].
    pub fn mark(&self, text: &str) -> Result<()> {
        self.control(&format!("mark {text}")).map(drop)
    }

    /// Has the host misbehave, with an order for [`Host::control`], until [`Host::behave`]. Commands that are refused meanwhile, and
    /// from then to the next reset of the device, are not held against the guest.
    pub fn misbehave(&self, order: &str) -> Result<()> {
        self.control("reset-counters")?;
        self.mark(MISBEHAVES)?;
        self.control(order).map(drop)
    }

    /// Waits until there were as many faults since [`Host::misbehave`].
    pub fn wait_faults(&self, count: usize) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let faults = self.faults()?;
            if faults >= count {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "the host made {faults} faults instead of {count}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until there was a command of that name after the last mark `text`.
    pub fn wait_command(&self, name: &str, text: &str) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while !commands(after_mark(&self.record()?, text)?).any(|entry| entry.command == name) {
            ensure!(Instant::now() < end, "the host was told no {name}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// How many faults there were since [`Host::misbehave`].
    pub fn faults(&self) -> Result<usize> {
        let faults = self.control("faults")?;
        Ok(faults.as_array().context("faults are a list")?.len())
    }

    /// Has the host keep back its answers to `command` until [`Host::answer_now`].
    pub fn hold(&self, command: &str) -> Result<()> {
        self.control(&format!("fault {command}: answer after 600 s"))
            .map(drop)
    }

    /// Ends the faults, has the host give the answers that it has kept back, and returns how many there were.
    pub fn answer_now(&self) -> Result<usize> {
        self.control("clear")?;
        let answered = self.control("answer-now")?;
        Ok(answered.as_u64().context("answers are counted")? as usize)
    }

    /// Ends the faults.
    pub fn behave(&self) -> Result<()> {
        self.control("clear")?;
        self.mark(BEHAVES)
    }

    /// Returns the record so far.
    pub fn record(&self) -> Result<Vec<Entry>> {
        read_record(&self.dir)
    }

    /// Returns what a head shows; a head that shows nothing is black.
    pub fn picture(&self, head: u32) -> Result<RgbImage> {
        self.control("dump")?;
        let path = self.dir.join(format!("scanout-{head}.png"));
        let picture = image::open(&path).with_context(|| path.display().to_string())?;
        Ok(picture.into_rgb8())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It ends with its guest, but if there never was one, it waits for ever.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(line: &str, expected: &[&str]) -> Vec<String> {
        let entry = serde_json::from_str(line).expect("it is well formed");
        faults(&[entry], expected)
    }

    #[test]
    fn a_refusal_must_be_expected() {
        let line = r#"{"t":1.5,"event":"command","command":"RESOURCE_UNREF","args":{"resource_id":9},"response":"ERR_INVALID_RESOURCE_ID"}"#;
        assert_eq!(
            complaint(line, &[]),
            [r#"refused: RESOURCE_UNREF {"resource_id":9}: ERR_INVALID_RESOURCE_ID"#]
        );
        assert!(complaint(line, &["RESOURCE_UNREF"]).is_empty());
        assert!(complaint(&line.replace("ERR_INVALID_RESOURCE_ID", "OK_NODATA"), &[]).is_empty());
        for told in ["fault", "conduct"] {
            let line = line.replace("\"t\":1.5", &format!("\"{told}\":\"error 0x1203\""));
            assert!(complaint(&line, &[]).is_empty());
        }
    }

    #[test]
    fn a_violation_is_never_expected() {
        let by_command = r#"{"event":"command","command":"GET_EDID","args":{},"response":"ERR_INVALID_SCANOUT_ID","violations":["there is no scanout 3"]}"#;
        assert_eq!(
            complaint(by_command, &["GET_EDID"]),
            ["violation by GET_EDID {}: there is no scanout 3"]
        );
        let by_none = r#"{"event":"violation","rule":"before-driver-ok","text":"1 commands were queued before DRIVER_OK"}"#;
        assert_eq!(
            complaint(by_none, &[]),
            [r#"violation: "1 commands were queued before DRIVER_OK""#]
        );
    }

    #[test]
    fn who_was_misled_is_excused_until_the_reset() {
        let record = |lines: &[&str]| -> Vec<Entry> {
            let entries = lines.iter().map(|line| serde_json::from_str(line));
            entries
                .map(|entry| entry.expect("it is well formed"))
                .collect()
        };
        const MISBEHAVES: &str = r#"{"event":"mark","text":"the host misbehaves"}"#;
        const BEHAVES: &str = r#"{"event":"mark","text":"the host behaves"}"#;
        const STOP: &str = r#"{"event":"stop"}"#;
        const REFUSED: &str = r#"{"event":"command","command":"RESOURCE_FLUSH","response":"ERR_INVALID_RESOURCE_ID","violations":["no resource 1"]}"#;
        const PADDING: &str = r#"{"event":"command","command":"RESOURCE_FLUSH","response":"OK_NODATA","violations":["padding is not zero"]}"#;

        let excused = record(&[MISBEHAVES, REFUSED, STOP, REFUSED, BEHAVES, REFUSED, STOP]);
        assert!(faults(&excused, &[]).is_empty());
        for lines in [
            &[MISBEHAVES, BEHAVES, STOP, REFUSED][..],
            &[BEHAVES, REFUSED],
            &[MISBEHAVES, PADDING],
        ] {
            assert_eq!(faults(&record(lines), &[]).len(), 1, "{lines:?}");
        }
    }

    #[test]
    fn what_comes_after_a_mark_is_found() {
        let record: Vec<Entry> = [
            r#"{"event":"mark","text":"here"}"#,
            r#"{"event":"command","command":"GET_EDID"}"#,
            r#"{"event":"mark","text":"here"}"#,
            r#"{"event":"command","command":"RESOURCE_FLUSH"}"#,
            r#"{"event":"interrupt","queue":"control"}"#,
        ]
        .map(|line| serde_json::from_str(line).expect("it is well formed"))
        .into();
        let after = after_mark(&record, "here").expect("it is there");
        let names: Vec<_> = commands(after).map(|entry| &entry.command).collect();
        assert_eq!(names, ["RESOURCE_FLUSH"]);
        assert!(after_mark(&record, "there").is_err());
    }
}
