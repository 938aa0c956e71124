// SPDX-License-Identifier: GPL-2.0

//! What arrived at the host, by QEMU's log or by the record of the host that keeps everything.

use std::collections::BTreeMap;

use anyhow::{
    Context,
    Result, //
};
use virtgpu_lab::host::Entry;

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

/// What the host has been told of the picture since a restore began.
#[derive(Default)]
struct Picture {
    transferred: Vec<String>,
    on_screen: Option<String>,
    kicked: Option<u64>,
}

fn count(interval: &mut Interval, span: Option<&str>, add: impl Fn(&mut Traffic)) {
    add(&mut interval.traffic);
    if let Some(span) = span {
        add(interval.spans.entry(span.to_owned()).or_default());
    }
}

/// Reads QEMU's log, with the trace and with the plugin's lines.
pub fn parse(log: &str) -> Result<Vec<Interval>> {
    let mut intervals = Vec::new();
    let mut current: Option<Interval> = None;
    let mut span: Option<String> = None;
    let mut picture: Option<Picture> = None;
    let mut mapped = Vec::new();

    for line in log.lines() {
        let words: Vec<_> = line.split(' ').collect();
        if let ["bench", what, name, clock] = words[..] {
            match what {
                "start" => current = Some(Interval::default()),
                "settled" => intervals.push(current.take().context("no start")?),
                "enter" => {
                    if name == RESTORE {
                        picture = Some(Picture::default());
                    }
                    span = Some(name.into());
                }
                "leave" => span = None,
                "point" if name == KICK => {
                    if let Some(interval) = &mut current {
                        count(interval, span.as_deref(), |traffic| traffic.kicks += 1);
                    }
                    if let Some(picture) = &mut picture {
                        picture.kicked = Some(clock.parse()?);
                    }
                }
                _ => {}
            }
            continue;
        }
        let Some(interval) = &mut current else {
            continue;
        };
        let mut count = |add: &dyn Fn(&mut Traffic)| count(interval, span.as_deref(), add);
        let event = words[0];
        if event == "virtio_notify" {
            count(&|traffic| traffic.interrupts += 1);
        } else if event == "address_space_map" {
            // as:0x5 addr 0x1000:18 write:0 attrs:0x1
            let length = words.get(3).and_then(|word| word.split(':').nth(1));
            mapped.push(u64::from_str_radix(length.context("no length")?, 16)?);
        } else if event == "virtqueue_pop" {
            // vq 0x1 elem 0x2 in_num 1 out_num 1; the command's own buffers were mapped last. Others are a resource's backing.
            let number = |index: usize| -> Result<usize> {
                Ok(words.get(index).context("no number")?.parse()?)
            };
            let buffers = number(6)? + number(8)?;
            let bytes: u64 = mapped.iter().rev().take(buffers).sum();
            mapped.clear();
            count(&|traffic| traffic.bytes += bytes);
        } else if let Some(name) = event.strip_prefix("virtio_gpu_cmd_") {
            count(&|traffic| *traffic.commands.entry(name.into()).or_default() += 1);
            if let Some(picture) = &mut picture
                && interval.first_frame.is_none()
            {
                let resource = words
                    .iter()
                    .position(|word| *word == "res")
                    .and_then(|position| words.get(position + 1))
                    .map(|word| word.trim_end_matches(',').to_owned());
                match (name, resource) {
                    ("res_xfer_toh_2d", Some(resource)) => picture.transferred.push(resource),
                    ("set_scanout", resource) => picture.on_screen = resource,
                    ("res_flush", resource)
                        if resource == picture.on_screen
                            && resource
                                .as_ref()
                                .is_some_and(|it| picture.transferred.contains(it)) =>
                    {
                        interval.first_frame = picture.kicked;
                    }
                    _ => {}
                }
            }
        } else if event == "virtio_gpu_update_cursor" {
            count(&|traffic| *traffic.commands.entry("cursor".into()).or_default() += 1);
        }
    }
    Ok(intervals)
}

/// Adds to `interval` what has arrived by the record of a reference host.
pub fn add_record(record: &[Entry], interval: &mut Interval) {
    let mut phase = FREEZE;
    for entry in record {
        let span = interval.spans.entry(phase.to_string()).or_default();
        let all = &mut interval.traffic;
        match entry.event.as_str() {
            "stop" => phase = RESTORE,
            "interrupt" => {
                span.interrupts += 1;
                all.interrupts += 1;
            }
            "command" => {
                for traffic in [span, all] {
                    let name = entry.command.to_lowercase();
                    *traffic.commands.entry(name).or_default() += 1;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_needs_content_and_a_scanout() {
        let log = "bench start - 1\n\
                   bench enter restore 2\n\
                   bench point kick 10\n\
                   address_space_map as:0x5 addr 0x1000:18 write:0 attrs:0x1\n\
                   address_space_map as:0x5 addr 0x1000:8 write:1 attrs:0x1\n\
                   virtqueue_pop vq 0x1 elem 0x2 in_num 1 out_num 1\n\
                   virtio_gpu_cmd_res_flush res 0x2, w 1, h 1, x 0, y 0\n\
                   virtio_gpu_cmd_res_xfer_toh_2d res 0x2\n\
                   virtio_gpu_cmd_set_scanout id 0, res 0x2, w 1, h 1, x 0, y 0\n\
                   bench leave restore 15\n\
                   bench point kick 20\n\
                   virtio_gpu_cmd_res_flush res 0x2, w 1, h 1, x 0, y 0\n\
                   bench stop - 30\n\
                   virtio_notify vdev 0x1 vq 0x2\n\
                   bench settled - 40\n";
        let intervals = parse(log).expect("it is well formed");
        assert_eq!(intervals.len(), 1);
        let interval = &intervals[0];
        assert_eq!(interval.first_frame, Some(20));
        assert_eq!(interval.traffic.commands(), 4);
        assert_eq!(interval.traffic.bytes, 0x20);
        assert_eq!(interval.traffic.interrupts, 1);
        assert_eq!(interval.traffic.kicks, 2);
        assert_eq!(interval.spans[RESTORE].kicks, 1);
        assert_eq!(interval.spans[RESTORE].commands(), 3);
    }
}
