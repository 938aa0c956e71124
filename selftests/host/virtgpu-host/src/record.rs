// SPDX-License-Identifier: GPL-2.0

//! The record: one JSON object a line for everything that happened, and the counters.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use serde_json::{json, Map, Value};
use virtio_gpu_protocol::{Entries, Request, Tail, FLAG_FENCE, FLAG_INFO_RING_IDX};

/// What is written, and what is remembered for the control socket.
pub struct Record {
    out: Option<Box<dyn Write + Send>>,
    start: Instant,
    /// Everything that the specification forbids and the guest did, with the command.
    pub violations: Vec<Value>,
    /// The faults that were injected, with the command.
    pub injected: Vec<Value>,
    /// How often each thing happened.
    pub counters: BTreeMap<String, u64>,
}

impl Record {
    /// A record that is written to `out`, if there is one.
    pub fn new(out: Option<Box<dyn Write + Send>>) -> Self {
        Self {
            out,
            start: Instant::now(),
            violations: Vec::new(),
            injected: Vec::new(),
            counters: BTreeMap::new(),
        }
    }

    /// Seconds since the start.
    fn now(&self) -> f64 {
        // Microseconds are what can be told apart.
        (self.start.elapsed().as_secs_f64() * 1e6).round() / 1e6
    }

    /// Adds one to a counter.
    pub fn count(&mut self, what: &str) {
        self.add(what, 1);
    }

    /// Adds to a counter.
    pub fn add(&mut self, what: &str, number: u64) {
        match self.counters.get_mut(what) {
            Some(counter) => *counter += number,
            None => {
                self.counters.insert(what.into(), number);
            }
        }
    }

    /// Writes a line. The time and the event's name come first.
    pub fn line(&mut self, event: &str, more: Value) {
        let Some(out) = &mut self.out else {
            return;
        };
        let mut line = Map::new();
        let now = (self.start.elapsed().as_secs_f64() * 1e6).round() / 1e6;
        line.insert("t".into(), json!(now));
        line.insert("event".into(), json!(event));
        if let Value::Object(more) = more {
            line.extend(more);
        }
        // A full disk must not end the guest's run.
        let _ = serde_json::to_writer(&mut *out, &Value::Object(line))
            .map_err(std::io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush());
    }

    /// Notes a violation. `command` is what the guest sent, or null.
    pub fn violation(&mut self, rule: &str, text: &str, command: Value) {
        self.count("violations");
        self.violations.push(json!({
            "t": self.now(), "rule": rule, "text": text, "command": command,
        }));
    }
}

/// A command's arguments, by the names of `linux/virtio_gpu.h`.
pub fn arguments(request: &Request<'_>) -> Map<String, Value> {
    let mut map = Map::new();
    request.command.fields(&mut |name, value| {
        let name = name.trim_start_matches("r#");
        let mut numbers = Vec::new();
        value.each(&mut |number| numbers.push(number));
        let value = match (name, &numbers[..]) {
            ("debug_name", bytes) => {
                let bytes: Vec<u8> = bytes.iter().map(|&b| b as u8).collect();
                let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
                json!(String::from_utf8_lossy(&bytes[..end]))
            }
            ("padding", _) => return,
            (_, [number]) => json!(number),
            (_, numbers) => json!(numbers),
        };
        map.insert(name.into(), value);
    });
    if let Tail::Entries(entries) = request.tail {
        map.insert("bytes".into(), json!(total(&entries)));
    }
    let header = &request.header;
    if header.flags & FLAG_FENCE != 0 {
        map.insert("fence_id".into(), json!(header.fence_id));
    }
    if header.ctx_id != 0 {
        map.insert("ctx_id".into(), json!(header.ctx_id));
    }
    if header.flags & FLAG_INFO_RING_IDX != 0 {
        map.insert("ring_idx".into(), json!(header.ring_idx));
    }
    map
}

/// The size of the memory in a list of entries, in bytes.
fn total(entries: &Entries<'_>) -> u64 {
    entries.iter().map(|entry| u64::from(entry.length)).sum()
}
