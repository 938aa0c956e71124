// SPDX-License-Identifier: GPL-2.0

//! What arrived at the host, by QEMU's log or by the record of the host that keeps everything.

use std::collections::BTreeMap;

use anyhow::{
    Context,
    Result,
    ensure, //
};
use virtgpu_lab::host::{
    Entry,
    after_mark,
    commands, //
};

/// QEMU's trace events that are counted.
pub const EVENTS: &[&str] = &["virtio_notify", "virtqueue_pop", "address_space_map"];

/// What arrived at the host in a measurement or a span of it.
#[derive(Debug, Default, Clone)]
pub struct Traffic {
    /// Commands by QEMU's names for them.
    pub commands: BTreeMap<String, u64>,
    /// Times that the guest notified the host.
    pub kicks: u64,
    /// Times that the host interrupted the guest.
    pub interrupts: u64,
    /// Bytes of the commands and of the room for their answers.
    pub bytes: u64,
}

impl Traffic {
    /// Number of commands.
    pub fn commands(&self) -> u64 {
        self.commands.values().sum()
    }
}

/// From a start mark until everything has settled.
#[derive(Debug, Default, Clone)]
pub struct Interval {
    pub traffic: Traffic,
    pub spans: BTreeMap<String, Traffic>,
    /// The guest's clock, in nanoseconds, when after a span [`RESTORE`] had begun the host had been told to show something that it
    /// had been given before.
    pub first_frame: Option<u64>,
}

/// The span in which a device comes back.
pub const RESTORE: &str = "restore";

/// The span in which a device goes down.
pub const FREEZE: &str = "freeze";

/// The point in the guest's kernel where it notifies the host.
pub const KICK: &str = "kick";

/// Mark in the record of a reference host: everything before has been answered.
pub const BEGIN: &str = "begin";

/// What the host has been told of the picture since a restore began.
#[derive(Default)]
struct Picture {
    transferred: Vec<u64>,
    on_screen: Option<u64>,
    kicked: Option<u64>,
}

/// Reads what QEMU's log has and, if the GPU was not QEMU's, the record of the reference host.
#[derive(Default)]
struct Reader<'a> {
    /// What is not read yet of the record.
    record: &'a [Entry],
    /// How often the guest has notified that host, which numbers its commands with it.
    kicks: u64,
    intervals: Vec<Interval>,
    current: Option<Interval>,
    /// The span that the guest is in, and the one in which it notified the host last: what the host does is for that one.
    inside: Option<String>,
    notified: Option<String>,
    picture: Option<Picture>,
    /// Lengths of what the host has mapped for the next command.
    mapped: Vec<u64>,
}

impl Reader<'_> {
    fn count(&mut self, add: impl Fn(&mut Traffic)) {
        if let Some(interval) = &mut self.current {
            add(&mut interval.traffic);
            if let Some(span) = &self.notified {
                add(interval.spans.entry(span.clone()).or_default());
            }
        }
    }

    /// A mark, or a place in the guest's code.
    fn place(&mut self, what: &str, name: &str, clock: &str) -> Result<()> {
        match what {
            "start" => {
                self.current = Some(Interval::default());
                self.picture = None;
            }
            "settled" => self
                .intervals
                .push(self.current.take().context("no start")?),
            "enter" => {
                if name == RESTORE {
                    self.picture.get_or_insert_default();
                }
                self.inside = Some(name.into());
            }
            "leave" => self.inside = None,
            "point" if name == KICK => {
                self.notified.clone_from(&self.inside);
                self.count(|traffic| traffic.kicks += 1);
                if let Some(picture) = &mut self.picture {
                    picture.kicked = Some(clock.parse()?);
                }
                if self.current.is_some() {
                    self.kicks += 1;
                    self.answers();
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What a reference host did until it was notified once more.
    fn answers(&mut self) {
        while let Some((entry, rest)) = self.record.split_first() {
            match entry.event.as_str() {
                "command" if entry.kick > self.kicks => break,
                "command" => {
                    let resource = entry.args["resource_id"].as_u64();
                    self.count(|traffic| traffic.bytes += entry.length + entry.room);
                    self.command(&entry.command.to_lowercase(), resource);
                }
                "interrupt" => self.count(|traffic| traffic.interrupts += 1),
                _ => {}
            }
            self.record = rest;
        }
    }

    /// One of QEMU's trace events.
    fn event(&mut self, words: &[&str]) -> Result<()> {
        if words[0] == "virtio_notify" {
            self.count(|traffic| traffic.interrupts += 1);
        } else if words[0] == "address_space_map" {
            // as:0x5 addr 0x1000:18 write:0 attrs:0x1
            let length = words.get(3).and_then(|word| word.split(':').nth(1));
            let length = u64::from_str_radix(length.context("no length")?, 16)?;
            self.mapped.push(length);
        } else if words[0] == "virtqueue_pop" {
            // vq 0x1 elem 0x2 in_num 1 out_num 1; the command's own buffers were mapped last. Others are a resource's backing.
            let number = |index: usize| -> Result<usize> {
                Ok(words.get(index).context("no number")?.parse()?)
            };
            let buffers = number(6)? + number(8)?;
            let bytes: u64 = self.mapped.iter().rev().take(buffers).sum();
            self.mapped.clear();
            self.count(|traffic| traffic.bytes += bytes);
        } else if let Some(name) = words[0].strip_prefix("virtio_gpu_cmd_") {
            let resource = words
                .iter()
                .position(|word| *word == "res")
                .and_then(|position| words.get(position + 1))
                .map(|word| word.trim_end_matches(',').trim_start_matches("0x"))
                .map(|word| u64::from_str_radix(word, 16))
                .transpose()?;
            self.command(name, resource);
        } else if words[0] == "virtio_gpu_update_cursor" {
            self.command("cursor", None);
        }
        Ok(())
    }

    fn command(&mut self, name: &str, resource: Option<u64>) {
        self.count(|traffic| *traffic.commands.entry(name.to_owned()).or_default() += 1);

        let (Some(interval), Some(picture)) = (&mut self.current, &mut self.picture) else {
            return;
        };
        match (name, resource) {
            ("res_xfer_toh_2d" | "transfer_to_host_2d", Some(resource)) => {
                picture.transferred.push(resource);
            }
            ("set_scanout", resource) => picture.on_screen = resource,
            ("res_flush" | "resource_flush", Some(resource))
                if interval.first_frame.is_none()
                    && picture.on_screen == Some(resource)
                    && picture.transferred.contains(&resource) =>
            {
                interval.first_frame = picture.kicked;
            }
            _ => {}
        }
    }
}

/// Renumbers a record. QEMU itself notifies the reference host when it starts the queue, and if the guest has put in a command by
/// then, the host takes that for the guest's notification: the guest's own comes after it, has nothing left, and is one too many. The
/// guest waits for the answer to what it says first, so that no number is left out after that otherwise.
fn by_notifications_of_the_guest(record: &[Entry]) -> Vec<Entry> {
    let mut of_qemu = 0;
    let mut first = None;
    let mut begins = false;
    let mut record = record.to_vec();
    for entry in &mut record {
        match entry.event.as_str() {
            "start" => (begins, first) = (true, None),
            "command" => {
                let kick = entry.kick;
                if begins {
                    (begins, first) = (false, Some(kick));
                } else if let Some(taken) = first.filter(|first| kick != *first) {
                    of_qemu += u64::from(kick == taken + 2);
                    first = None;
                }
                entry.kick -= of_qemu;
            }
            _ => {}
        }
    }
    record
}

/// Reads QEMU's log, with the trace and with the plugin's lines. Commands that a reference host recorded, after the mark [`BEGIN`],
/// count where the guest notified it of them.
pub fn parse(log: &str, record: Option<&[Entry]>) -> Result<Vec<Interval>> {
    let mut reader = Reader::default();
    let record = record.map(by_notifications_of_the_guest);
    if let Some(record) = &record {
        reader.record = after_mark(record, BEGIN)?;
        let before = &record[..record.len() - reader.record.len()];
        reader.kicks = before.iter().map(|entry| entry.kick).max().unwrap_or(0);
    }
    for line in log.lines() {
        let words: Vec<_> = line.split(' ').collect();
        if let ["bench", what, name, clock] = words[..] {
            reader.place(what, name, clock)?;
        } else if reader.current.is_some() {
            reader.event(&words)?;
        }
    }
    ensure!(
        commands(reader.record).next().is_none(),
        "the host had commands that it was not notified of"
    );
    Ok(reader.intervals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_needs_content_and_a_scanout() {
        let log = "bench start - 1\n\
                   bench enter restore 2\n\
                   bench point kick 10\n\
                   bench leave restore 12\n\
                   address_space_map as:0x5 addr 0x1000:18 write:0 attrs:0x1\n\
                   address_space_map as:0x5 addr 0x1000:8 write:1 attrs:0x1\n\
                   virtqueue_pop vq 0x1 elem 0x2 in_num 1 out_num 1\n\
                   virtio_gpu_cmd_res_flush res 0x2, w 1, h 1, x 0, y 0\n\
                   virtio_gpu_cmd_res_xfer_toh_2d res 0x2\n\
                   virtio_gpu_cmd_set_scanout id 0, res 0x2, w 1, h 1, x 0, y 0\n\
                   bench enter restore 16\n\
                   bench point kick 20\n\
                   virtio_gpu_cmd_res_flush res 0x2, w 1, h 1, x 0, y 0\n\
                   bench leave restore 25\n\
                   bench point kick 27\n\
                   bench stop - 30\n\
                   virtio_notify vdev 0x1 vq 0x2\n\
                   bench settled - 40\n";
        let intervals = parse(log, None).expect("it is well formed");
        assert_eq!(intervals.len(), 1);
        let interval = &intervals[0];
        assert_eq!(interval.first_frame, Some(20));
        assert_eq!(interval.traffic.commands(), 4);
        assert_eq!(interval.traffic.bytes, 0x20);
        assert_eq!(interval.traffic.interrupts, 1);
        assert_eq!(interval.traffic.kicks, 3);
        assert_eq!(interval.spans[RESTORE].interrupts, 0);
        assert_eq!(interval.spans[RESTORE].kicks, 2);
        assert_eq!(interval.spans[RESTORE].commands(), 4);
    }

    #[test]
    fn commands_of_a_record_count_where_the_host_was_notified_of_them() {
        let record: Vec<Entry> = [
            r#"{"event":"command","kick":6,"command":"RESOURCE_FLUSH","args":{"resource_id":2}}"#,
            r#"{"event":"mark","text":"begin"}"#,
            r#"{"event":"command","kick":7,"length":48,"room":24,"command":"SET_SCANOUT","args":{"resource_id":0}}"#,
            r#"{"event":"interrupt","queue":"control"}"#,
            r#"{"event":"stop"}"#,
            r#"{"event":"command","kick":8,"command":"TRANSFER_TO_HOST_2D","args":{"resource_id":2}}"#,
            r#"{"event":"command","kick":8,"command":"SET_SCANOUT","args":{"resource_id":2}}"#,
            r#"{"event":"command","kick":8,"command":"RESOURCE_FLUSH","args":{"resource_id":2}}"#,
        ]
        .map(|line| serde_json::from_str(line).expect("it is well formed"))
        .into();
        let parse = |points: &[&str]| {
            let log = format!(
                "bench point kick 0\nbench start - 1\n{}\nbench settled - 9\n",
                points.join("\n")
            );
            parse(&log, Some(&record))
        };
        let outside = "bench point kick 2";
        let inside = [
            "bench enter restore 3",
            "bench point kick 4",
            "bench leave restore 5",
        ];
        let intervals = parse(&[&[outside], &inside[..]].concat()).expect("it is well formed");
        let interval = &intervals[0];
        assert_eq!(interval.traffic.commands(), 4);
        assert_eq!(interval.traffic.bytes, 72);
        assert_eq!(interval.traffic.interrupts, 1);
        assert_eq!(interval.spans[RESTORE].commands(), 3);
        assert_eq!(interval.spans[RESTORE].kicks, 1);
        assert_eq!(interval.spans[RESTORE].interrupts, 0);
        assert_eq!(interval.first_frame, Some(4));
        assert!(parse(&inside).is_err());
    }

    #[test]
    fn a_notification_by_qemu_is_not_the_guests() {
        let kicks = |numbers: &[u64]| {
            let start = r#"{"event":"start"}"#.to_string();
            let lines = numbers
                .iter()
                .map(|kick| format!(r#"{{"event":"command","kick":{kick},"command":"GET_EDID"}}"#));
            let record: Vec<Entry> = [start]
                .into_iter()
                .chain(lines)
                .map(|line| serde_json::from_str(&line).expect("it is well formed"))
                .collect();
            let record = by_notifications_of_the_guest(&record);
            let kicks: Vec<_> = commands(&record).map(|entry| entry.kick).collect();
            kicks
        };
        assert_eq!(kicks(&[3, 3, 4, 5, 7]), [3, 3, 4, 5, 7]);
        assert_eq!(kicks(&[3, 3, 5, 6, 8]), [3, 3, 4, 5, 7]);
    }
}
