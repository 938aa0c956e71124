// SPDX-License-Identifier: GPL-2.0

//! The control socket: a line of words asks, a line of JSON answers.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{json, Value};

use crate::backend::Gpu;

use crate::fault::{number, number32};
use crate::options::display;

/// What can be asked, for `--help`.
pub const HELP: &str = "  state                      scanouts, resources, what was negotiated
  counters                   how often each thing happened
  violations                 what the guest did that the specification forbids
  faults                     what was injected
  dump [DIRECTORY]           write scanout-N.png and cursor-N.png
  hotplug SCANOUT WxH|off    plug in a display of that size, or unplug it
  claim-scanouts NUMBER|off  have the configuration space say that there are so many
  fault RULE                 add a rule, for example: 3rd SET_SCANOUT: no answer
  random SEED[:RATE]|off     strike RATE (20) of a thousand commands
  clear                      forget all rules, and stop random faults
  answer-now                 give the answers that were to be late, and say how many
  freezing CONDUCT           what happens when the guest freezes, as --conduct
  interrupts NUMBER          interrupt the guest for nothing
  config-change              say that the configuration space changed, although it did not
  reset-counters             set the counters to 0, and forget violations and faults
  mark TEXT                  write a line into the record
  quit                       write the pictures, and exit";

/// Answers one line.
fn answer(gpu: &Gpu, png: Option<&Path>, line: &str) -> Result<Value, String> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let rest = rest.trim();
    if word == "answer-now" {
        return Ok(json!(gpu.answer_now()));
    }
    let mut state = gpu.state();
    match word {
        "state" => return Ok(state.device.state()),
        "counters" => return Ok(json!(state.device.record.counters)),
        "violations" => return Ok(json!(state.device.record.violations)),
        "faults" => return Ok(json!(state.device.record.injected)),
        "dump" => {
            let directory = match rest {
                "" => png.ok_or("no directory: start with --png, or name one")?,
                rest => Path::new(rest),
            };
            let files = state.device.dump(directory);
            return Ok(json!(files.map_err(|error| error.to_string())?));
        }
        "hotplug" => {
            let (scanout, size) = rest.split_once(' ').ok_or("hotplug SCANOUT WxH|off")?;
            state.device.hotplug(number32(scanout)?, display(size)?)?;
            state.config_changed().map_err(|error| error.to_string())?;
        }
        "claim-scanouts" if rest == "off" => state.device.claim_scanouts(None),
        "claim-scanouts" => state.device.claim_scanouts(Some(number32(rest)?)),
        "fault" => state.device.faults.add(rest.parse()?),
        "random" if rest == "off" => state.device.faults.randomise(None),
        "random" => state.device.faults.randomise(Some(rest.parse()?)),
        "clear" => state.device.faults.clear(),
        "freezing" => state.device.set_conduct(rest.parse()?),
        "interrupts" => {
            let number = number(rest)?;
            state
                .interrupt_storm(number)
                .map_err(|error| error.to_string())?;
        }
        "config-change" => state.config_changed().map_err(|error| error.to_string())?,
        "reset-counters" => {
            state.device.record.counters.clear();
            state.device.record.violations.clear();
            state.device.record.injected.clear();
        }
        "mark" => state.device.record.line("mark", json!({ "text": rest })),
        _ => return Err(format!("`{word}` is nothing to ask")),
    }
    Ok(json!({ "ok": true }))
}

fn serve(gpu: &Gpu, png: Option<&Path>, stream: UnixStream, quit: &dyn Fn()) -> io::Result<()> {
    let mut reply = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let line = line.trim();
        if line == "quit" {
            writeln!(reply, "{}", json!({ "ok": true }))?;
            quit();
            return Ok(());
        }
        let answer = answer(gpu, png, line).unwrap_or_else(|error| json!({ "error": error }));
        writeln!(reply, "{answer}")?;
    }
    Ok(())
}

/// Listens on `path` for as long as the program runs.
pub fn listen(
    gpu: Arc<Gpu>,
    path: &Path,
    png: Option<PathBuf>,
    quit: impl Fn() + Clone + Send + 'static,
) -> io::Result<()> {
    // Left over from a run that was killed.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                let (gpu, png, quit) = (gpu.clone(), png.clone(), quit.clone());
                std::thread::spawn(move || {
                    // Whoever hangs up does not want to know.
                    let _ = serve(&gpu, png.as_deref(), stream, &quit);
                });
            }
        })?;
    Ok(())
}

/// Asks a running host, and returns the answer.
pub fn ask(path: &Path, line: &str) -> io::Result<Value> {
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "{line}")?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply)?;
    Ok(serde_json::from_str(&reply)?)
}
