// SPDX-License-Identifier: GPL-2.0

//! The device: what the commands do, and what is wrong with them.
//!
//! Nothing here knows of vhost-user or virtqueues: a command comes in as bytes, an answer goes out
//! as bytes, and guest memory is whatever the caller has.

mod commands;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{json, Map, Value};
use virtio_gpu_protocol::{
    Command, Config, DecodeError, DisplayOne, Format, Header, Rect, Request, Response,
    ResponseType, Wire, BLOB_MEM_GUEST, EVENT_DISPLAY, FLAG_FENCE, FLAG_INFO_RING_IDX,
    F_CONTEXT_INIT, HEADER_SIZE, MAP_CACHE_CACHED, MAX_SCANOUTS,
};
use vm_memory::GuestMemoryMmap;

use crate::display::{self, Scanout};
use crate::fault::{Action, Faults};
use crate::options::{Capset, Conduct, Options};
use crate::record::{arguments, Record};
use crate::resource::{Backing, Blob, Image, Kind, Resource};

/// Where the device is between FREEZING=1 and FREEZING=0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    /// A reset loses everything.
    Awake,
    /// FREEZING=1 was answered: the next reset loses nothing.
    Promised,
    /// That reset is over, and FREEZING=0 has not come. The next reset loses everything.
    Waking {
        /// No command came yet.
        first: bool,
    },
}

/// The queue that a command came on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// Queue 0.
    Control,
    /// Queue 1.
    Cursor,
}

impl QueueKind {
    /// The queue's name in Linux.
    pub fn name(self) -> &'static str {
        match self {
            QueueKind::Control => "control",
            QueueKind::Cursor => "cursor",
        }
    }
}

/// A command as it came.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// The queue.
    pub queue: QueueKind,
    /// How many notifications there were on the queue until now.
    pub kick: u64,
    /// The bytes that the device may read.
    pub bytes: &'a [u8],
    /// How many bytes the device may write.
    pub capacity: usize,
}

/// Shared memory to map or unmap, which takes the help of the virtual machine monitor.
#[derive(Debug)]
pub struct MapWork {
    /// The memory to map, `None` to unmap.
    pub file: Option<File>,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u64,
    resource_id: u32,
}

/// A command that is done but for the answer.
#[derive(Debug)]
pub struct Unfinished {
    line: Map<String, Value>,
    header: Header,
    queue: QueueKind,
    capacity: usize,
    fault: Option<Action>,
}

/// What to do about a command.
#[derive(Debug)]
pub enum Outcome {
    /// Give it back.
    Answer(Answer),
    /// Map or unmap, then call [`Device::mapped`].
    Map(Vec<MapWork>, Unfinished),
}

/// How to give a command back.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// What to write into the guest's buffers.
    pub bytes: Vec<u8>,
    /// The length to report.
    pub used: u32,
    /// When; `None` for never.
    pub delay: Option<Duration>,
    /// How often.
    pub times: u32,
    /// Under this id, instead of its own. With `Some(None)`, any that is none.
    pub id: Option<Option<u32>>,
    /// With the chain of descriptors going on.
    pub open: bool,
    /// This is the promise to keep everything: call [`Device::promise`] when it was given.
    pub promise: bool,
}

/// Why a command was refused.
struct Refusal {
    error: ResponseType,
    rule: &'static str,
    text: String,
}

fn refuse(error: ResponseType, rule: &'static str, text: impl Into<String>) -> Refusal {
    Refusal {
        error,
        rule,
        text: text.into(),
    }
}

/// [`refuse`] with the error that says least.
fn invalid(rule: &'static str, text: impl Into<String>) -> Refusal {
    refuse(ResponseType::ErrInvalidParameter, rule, text)
}

/// What a command brought.
enum Done {
    NoData,
    /// FREEZING=1 was accepted.
    Promise,
    DisplayInfo(Box<[DisplayOne; MAX_SCANOUTS]>),
    Capset(Capset),
    CapsetData(Vec<u8>),
    Edid([u8; 128]),
    Uuid([u8; 16]),
    MapInfo(u32),
    Work(Vec<MapWork>),
}

/// The device.
pub struct Device {
    options: Options,
    /// What the guest accepted.
    features: u64,
    running: bool,
    power: Power,
    /// FREEZING=1 was the last that was heard of FREEZING.
    asked_to_keep: bool,
    events_read: u32,
    resources: BTreeMap<u32, Resource>,
    contexts: BTreeSet<u32>,
    scanouts: Vec<Scanout>,
    /// How many scanouts the configuration space claims to have, if that is a lie.
    claimed_scanouts: Option<u32>,
    /// Resources that were dropped against the promise: the guest is not to blame for using them.
    broken: BTreeSet<u32>,
    /// The promise was broken: what is left is in the way of a guest that makes everything anew.
    lied: bool,
    /// Commands so far.
    number: u64,
    /// What was found in the command at hand.
    found: Vec<(&'static str, String)>,
    /// The faults.
    pub faults: Faults,
    /// The record.
    pub record: Record,
}

impl Device {
    /// A device that was just switched on.
    pub fn new(options: Options, faults: Faults, record: Record) -> Self {
        let scanouts = options.displays.iter().map(|&d| Scanout::new(d)).collect();
        Self {
            options,
            features: 0,
            running: false,
            power: Power::Awake,
            asked_to_keep: false,
            events_read: 0,
            resources: BTreeMap::new(),
            contexts: BTreeSet::new(),
            scanouts,
            claimed_scanouts: None,
            broken: BTreeSet::new(),
            lied: false,
            number: 0,
            found: Vec::new(),
            faults,
            record,
        }
    }

    /// What the device is.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether the guest has set DRIVER_OK, and neither reset the device nor been halted since.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The configuration space.
    pub fn config(&self) -> Config {
        Config {
            events_read: self.events_read,
            events_clear: 0,
            num_scanouts: self.claimed_scanouts.unwrap_or(self.scanouts.len() as u32),
            num_capsets: self.options.capsets.len() as u32,
            blob_alignment: self.options.blob_alignment.unwrap_or(0),
        }
    }

    /// The guest wrote to the configuration space. The transport may give all of it, with what the
    /// guest did not write as it was read last.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        let mut written = Vec::new();
        self.config()
            .put(&mut |piece| written.extend_from_slice(piece));
        for (at, &byte) in bytes.iter().enumerate() {
            if let Some(place) = written.get_mut(offset + at) {
                *place = byte;
            }
        }
        let Some(written) = Config::get(&written) else {
            return;
        };
        self.record.count("config_writes");
        self.record.line(
            "config_write",
            json!({ "events_clear": written.events_clear }),
        );
        self.events_read &= !written.events_clear;
        let config = self.config();
        let read_only = |c: &Config| (c.num_scanouts, c.num_capsets, c.blob_alignment);
        if read_only(&written) != read_only(&config) {
            self.blame(
                "read-only-config",
                "a read-only field of the configuration space was written",
            );
        }
    }

    /// Plugs in a display of that size, or unplugs it. The caller tells the guest that the
    /// configuration space changed.
    pub fn hotplug(&mut self, scanout: u32, size: Option<(u32, u32)>) -> Result<(), String> {
        let place = usize::try_from(scanout)
            .ok()
            .and_then(|scanout| self.scanouts.get_mut(scanout))
            .ok_or_else(|| format!("there is no scanout {scanout}"))?;
        place.connected = size.is_some();
        place.size = size.unwrap_or((0, 0));
        self.events_read |= EVENT_DISPLAY;
        self.record.count("hotplugs");
        self.record
            .line("hotplug", json!({ "scanout": scanout, "size": size }));
        Ok(())
    }

    /// Has the configuration space claim that there are so many scanouts, or tell the truth.
    pub fn claim_scanouts(&mut self, number: Option<u32>) {
        self.claimed_scanouts = number;
    }

    /// Changes what happens when the guest freezes.
    pub fn set_conduct(&mut self, conduct: Conduct) {
        self.options.conduct = conduct;
    }

    /// A violation that no command did.
    pub fn blame(&mut self, rule: &'static str, text: &str) {
        self.record.violation(rule, text, Value::Null);
        self.record
            .line("violation", json!({ "rule": rule, "text": text }));
    }

    /// Whether the guest accepted a feature.
    fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    fn has_freezing(&self) -> bool {
        self.options.freezing.is_some_and(|bit| self.has(bit))
    }

    /// The guest set DRIVER_OK with these features, after a reset unless `resumed`, when the
    /// virtual machine was only halted meanwhile. `early` commands were on the control queue
    /// already. What must be unmapped is returned.
    pub fn start(&mut self, features: u64, resumed: bool, early: u64) -> Vec<MapWork> {
        let mut work = Vec::new();
        if !resumed {
            let asked = std::mem::take(&mut self.asked_to_keep);
            self.features = features;
            let kept = self.power == Power::Promised && self.has_freezing();
            self.lied =
                kept && matches!(self.options.conduct, Conduct::DropAll | Conduct::DropOne(_));
            if kept {
                self.power = Power::Waking { first: true };
                match self.options.conduct {
                    Conduct::DropAll => {
                        self.broken = self.resources.keys().copied().collect();
                        work = self.release_all();
                    }
                    Conduct::DropOne(id) => {
                        let last = self.resources.keys().next_back().copied();
                        if let Some(id) = id.or(last) {
                            self.broken.insert(id);
                            work.extend(self.release(id));
                        }
                    }
                    _ => {}
                }
            } else {
                // A guest that has had no answer may look whether it was given a promise.
                self.power = if asked && self.has_freezing() {
                    Power::Waking { first: true }
                } else {
                    Power::Awake
                };
                self.broken.clear();
                work = self.release_all();
            }
            self.record.count("resets");
            self.record.line(
                "reset",
                json!({ "kept": kept, "resources": self.resources.len() }),
            );
        }
        self.running = true;
        self.record.line(
            "start",
            json!({ "features": format!("{features:#x}"), "resumed": resumed }),
        );
        if early > 0 {
            self.blame(
                "before-driver-ok",
                &format!("{early} commands were queued before DRIVER_OK"),
            );
        }
        work
    }

    /// The guest reset the device, or the virtual machine was halted: the two look alike until
    /// the next start. `unseen` commands were on the queues and will not be answered.
    pub fn stop(&mut self, unseen: u64) {
        if !self.running {
            return;
        }
        self.running = false;
        self.record.line("stop", json!({ "unanswered": unseen }));
    }

    /// The promise to keep everything was given. It is none if the guest awoke meanwhile.
    pub fn promise(&mut self) {
        if self.asked_to_keep {
            self.power = Power::Promised;
        }
    }

    /// Drops one resource, and says what is to be unmapped.
    fn release(&mut self, id: u32) -> Option<MapWork> {
        let resource = self.resources.remove(&id)?;
        for scanout in &mut self.scanouts {
            if scanout.source.is_some_and(|s| s.resource_id == id) {
                scanout.disable();
            }
        }
        match resource.kind {
            Kind::Blob(Blob {
                mapped: Some(offset),
                size,
                ..
            }) => Some(MapWork {
                file: None,
                offset,
                length: size,
                resource_id: id,
            }),
            _ => None,
        }
    }

    /// Drops everything that the guest made.
    fn release_all(&mut self) -> Vec<MapWork> {
        let ids: Vec<u32> = self.resources.keys().copied().collect();
        let work = ids.into_iter().filter_map(|id| self.release(id)).collect();
        self.contexts.clear();
        for scanout in &mut self.scanouts {
            scanout.disable();
            scanout.cursor = Default::default();
        }
        work
    }

    /// Does what the guest asks for.
    pub fn receive(&mut self, mem: &GuestMemoryMmap, incoming: Incoming<'_>) -> Outcome {
        self.number += 1;
        self.found.clear();
        let decoded = Request::decode(incoming.bytes);

        let mut line = Map::new();
        line.insert("n".into(), json!(self.number));
        line.insert("queue".into(), json!(incoming.queue.name()));
        line.insert("kick".into(), json!(incoming.kick));
        line.insert("length".into(), json!(incoming.bytes.len()));
        line.insert("room".into(), json!(incoming.capacity));
        let (kind, header) = match &decoded {
            Ok((request, _)) => (request.command.kind(), request.header),
            Err(DecodeError::NoHeader) => (0, Header::default()),
            Err(
                DecodeError::UnknownType { kind, header }
                | DecodeError::TooShort { kind, header, .. },
            ) => (*kind, *header),
        };
        let name = Command::name_of(kind).map_or_else(|| format!("{kind:#x}"), str::to_owned);
        self.record.count(&name);
        line.insert("command".into(), json!(name));
        if let Ok((request, _)) = &decoded {
            let arguments = arguments(request);
            line.insert("args".into(), Value::Object(arguments));
        }

        let mut fault = self.faults.strike(kind, header.flags & FLAG_FENCE != 0);
        if let Some(action) = fault {
            line.insert("fault".into(), json!(action.to_string()));
            self.record.count("faults");
        }
        let conduct = match (&decoded, self.options.conduct) {
            (Ok((r, _)), conduct) if r.command == (Command::StatusFreezing { freezing: 1 }) => {
                match conduct {
                    Conduct::Refuse => Some(Action::Error(ResponseType::ErrUnspec as u32)),
                    Conduct::Late(delay) => Some(Action::Late(delay)),
                    Conduct::Mute => Some(Action::NoAnswer),
                    _ => None,
                }
            }
            _ => None,
        };
        if fault.is_none() {
            if let Some(action) = conduct {
                line.insert("conduct".into(), json!(action.to_string()));
            }
            fault = conduct;
        }

        let result = match decoded {
            Err(error) => Err(Self::undecodable(error)),
            Ok((request, findings)) => {
                if findings.padding {
                    self.find("padding", "padding is not zero");
                }
                if findings.flags {
                    self.find(
                        "flags",
                        format!("undefined bits in flags {:#x}", header.flags),
                    );
                }
                if findings.trailing > 0 {
                    let text = format!("{} bytes after the end of the command", findings.trailing);
                    self.find("trailing-bytes", text);
                }
                self.check_header(&request, incoming.queue);
                match fault {
                    // Not carried out.
                    Some(Action::Error(_)) => Ok(Done::NoData),
                    _ => self.execute(mem, &request),
                }
            }
        };

        let unfinished = Unfinished {
            line,
            header,
            queue: incoming.queue,
            capacity: incoming.capacity,
            fault,
        };
        match result {
            Ok(Done::Work(work)) if !work.is_empty() => Outcome::Map(work, unfinished),
            result => Outcome::Answer(self.finish(unfinished, result)),
        }
    }

    /// The mapping that a command asked for was made, or could not be made.
    pub fn mapped(&mut self, work: &[MapWork], mut unfinished: Unfinished, made: bool) -> Answer {
        self.found.clear();
        let wanted = work.iter().find(|work| work.file.is_some());
        let done = match wanted {
            Some(_) if made => Done::MapInfo(MAP_CACHE_CACHED),
            Some(wanted) => {
                if let Some(Resource {
                    kind: Kind::Blob(blob),
                    ..
                }) = self.resources.get_mut(&wanted.resource_id)
                {
                    blob.mapped = None;
                }
                self.record.count("failed_mappings");
                if unfinished.fault.is_none() {
                    // The guest is not to blame.
                    unfinished.fault = Some(Action::Error(ResponseType::ErrOutOfMemory as u32));
                }
                Done::NoData
            }
            None => Done::NoData,
        };
        self.finish(unfinished, Ok(done))
    }

    fn find(&mut self, rule: &'static str, text: impl Into<String>) {
        self.found.push((rule, text.into()));
    }

    fn undecodable(error: DecodeError) -> Refusal {
        match error {
            DecodeError::NoHeader => refuse(
                ResponseType::ErrUnspec,
                "short-command",
                "shorter than a header",
            ),
            DecodeError::UnknownType { kind, .. } => refuse(
                ResponseType::ErrUnspec,
                "unknown-command",
                format!("no command has the type {kind:#x}"),
            ),
            DecodeError::TooShort { needed, .. } => invalid(
                "short-command",
                format!("shorter than the {needed} bytes that it needs"),
            ),
        }
    }

    /// What can be said without knowing what the command does.
    fn check_header(&mut self, request: &Request<'_>, queue: QueueKind) {
        let command = &request.command;
        if command.is_cursor() != (queue == QueueKind::Cursor) {
            self.find("wrong-queue", format!("on the {} queue", queue.name()));
        }
        let ring = request.header.flags & FLAG_INFO_RING_IDX != 0;
        if ring && !self.has(F_CONTEXT_INIT) {
            self.find("ring-idx", "a ring index without CONTEXT_INIT");
        }
        if !ring && request.header.ring_idx != 0 {
            self.find("ring-idx", "a ring index without its flag");
        }
        // If the suspend was called off, the guest may look what is there before it says so.
        let draws = matches!(
            command,
            Command::TransferToHost2d { .. }
                | Command::TransferToHost3d { .. }
                | Command::ResourceFlush { .. }
                | Command::Submit3d { .. }
                | Command::UpdateCursor { .. }
                | Command::MoveCursor { .. }
        );
        if draws && self.power == Power::Promised {
            self.find(
                "drawing-while-frozen",
                "after FREEZING=1 was answered and before the reset",
            );
        }
    }

    /// Makes the answer, with whatever goes wrong, and writes the command's line.
    fn finish(&mut self, unfinished: Unfinished, result: Result<Done, Refusal>) -> Answer {
        let Unfinished {
            mut line,
            header,
            queue,
            capacity,
            fault,
        } = unfinished;

        let mut promise = false;
        let mut buffer = Vec::new();
        let response = match &result {
            _ if matches!(fault, Some(Action::Error(_))) => None,
            Ok(done) => Some(match done {
                Done::NoData | Done::Work(_) => Response::NoData,
                Done::Promise => {
                    promise = true;
                    Response::NoData
                }
                Done::DisplayInfo(displays) => Response::DisplayInfo(**displays),
                Done::Capset(set) => Response::CapsetInfo {
                    id: set.id,
                    max_version: set.max_version,
                    max_size: set.size,
                },
                Done::CapsetData(data) => Response::Capset(data),
                Done::Edid(edid) => Response::Edid(edid),
                Done::Uuid(uuid) => Response::Uuid(*uuid),
                Done::MapInfo(info) => Response::MapInfo(*info),
            }),
            Err(refusal) => {
                // A guest that wakes up may ask what is still there, and one that was lied to is
                // not to blame for believing it.
                let asked = matches!(refusal.rule, "unknown-resource" | "resource-exists")
                    && matches!(self.power, Power::Waking { .. });
                let believed = refusal.rule == "broken-promise"
                    || self.claimed_scanouts.is_some() && refusal.rule == "unknown-scanout"
                    || self.lied && matches!(refusal.rule, "resource-exists" | "backing-exists");
                if asked || believed {
                    line.insert("note".into(), json!(refusal.text));
                } else {
                    self.found.push((refusal.rule, refusal.text.clone()));
                }
                Some(Response::Error(refusal.error))
            }
        };
        if queue == QueueKind::Control {
            let answer = header.answer();
            let mut put = |piece: &[u8]| buffer.extend_from_slice(piece);
            match (response, fault) {
                (Some(response), _) => {
                    response.encode(&answer, &mut put);
                }
                (None, Some(Action::Error(kind))) => {
                    Response::NoData.encode(&answer, &mut put);
                    buffer[..4].copy_from_slice(&kind.to_le_bytes());
                }
                (None, _) => {}
            }
            if buffer.len() > capacity {
                let text = format!(
                    "an answer of {} bytes is past the {capacity} bytes of the buffer",
                    buffer.len()
                );
                self.found.push(("short-buffer", text));
                buffer.truncate(capacity);
            }
        }
        let mut answer = Answer {
            used: buffer.len() as u32,
            bytes: buffer,
            delay: Some(Duration::ZERO),
            times: 1,
            id: None,
            open: false,
            promise: promise && matches!(fault, None | Some(Action::Late(_))),
        };
        if let Some(action) = fault {
            self.spoil(&mut answer, action, capacity);
        }

        if queue == QueueKind::Control {
            let kind = <u32 as Wire>::get(&answer.bytes).unwrap_or(0);
            let name = ResponseType::from_kind(kind)
                .map_or_else(|| format!("{kind:#x}"), |kind| kind.name().to_owned());
            if kind >= ResponseType::ErrUnspec as u32 {
                self.record.count("errors");
            }
            line.insert("response".into(), json!(name));
            line.insert("used".into(), json!(answer.used));
        }
        if line.contains_key("fault") {
            let mut injected = line.clone();
            injected.shift_remove("kick");
            self.record.injected.push(Value::Object(injected));
        }
        if !self.found.is_empty() {
            let texts: Vec<&str> = self.found.iter().map(|(_, text)| text.as_str()).collect();
            let command = Value::Object(line.clone());
            line.insert("violations".into(), json!(texts));
            for (rule, text) in std::mem::take(&mut self.found) {
                self.record.violation(rule, &text, command.clone());
            }
        }
        self.record.line("command", Value::Object(line));
        answer
    }

    /// Makes a fault of an answer.
    fn spoil(&mut self, answer: &mut Answer, action: Action, capacity: usize) {
        let random = self.faults.random();
        match action {
            Action::Error(_) => {}
            Action::NoAnswer => answer.delay = None,
            Action::Late(delay) => answer.delay = Some(delay),
            Action::WrongType(kind) => {
                if let Some(place) = answer.bytes.get_mut(..4) {
                    let other = if place == (ResponseType::OkNoData as u32).to_le_bytes() {
                        ResponseType::OkDisplayInfo
                    } else {
                        ResponseType::OkNoData
                    };
                    place.copy_from_slice(&kind.unwrap_or(other as u32).to_le_bytes());
                }
            }
            Action::UsedLength(length) => {
                answer.used = length;
                answer.bytes.truncate(length as usize);
            }
            Action::WrongFence => {
                if let Some(place) = answer.bytes.get_mut(4..16) {
                    place[0] |= FLAG_FENCE as u8;
                    for byte in &mut place[4..] {
                        *byte ^= random.number() as u8 | 1;
                    }
                }
            }
            Action::Twice => answer.times = 2,
            Action::BadId(id) => answer.id = Some(id),
            Action::OpenChain => answer.open = true,
            Action::Garbage(from) => {
                answer.bytes.resize(capacity.min(65536), 0);
                for byte in answer.bytes.iter_mut().skip(from.unwrap_or(HEADER_SIZE)) {
                    *byte = random.number() as u8;
                }
                answer.used = answer.bytes.len() as u32;
            }
        }
    }

    /// Writes what each scanout shows to `DIRECTORY/scanout-N.png`, and each visible cursor to
    /// `DIRECTORY/cursor-N.png`. A scanout that shows nothing is black.
    pub fn dump(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        std::fs::create_dir_all(directory)?;
        let mut files = Vec::new();
        for (number, scanout) in self.scanouts.iter().enumerate() {
            let path = directory.join(format!("scanout-{number}.png"));
            let black;
            let screen = match &scanout.screen {
                Some(screen) => screen,
                None => {
                    let (width, height) = scanout.size;
                    black = Image::new(Format::B8G8R8X8, width.max(1), height.max(1));
                    &black
                }
            };
            display::write_png(&path, screen, true)?;
            files.push(path);
            if let Some(image) = &scanout.cursor.image {
                let path = directory.join(format!("cursor-{number}.png"));
                display::write_png(&path, image, false)?;
                files.push(path);
            }
        }
        Ok(files)
    }

    /// The state of the device, for the control socket.
    pub fn state(&self) -> Value {
        let scanouts: Vec<Value> = self
            .scanouts
            .iter()
            .map(|scanout| {
                json!({
                    "connected": scanout.connected,
                    "size": scanout.size,
                    "resource": scanout.source.map(|source| source.resource_id),
                    "rect": scanout.source.map(|source| {
                        let Rect { x, y, width, height } = source.rect;
                        [x, y, width, height]
                    }),
                    "shown": scanout.screen.as_ref().is_some_and(|screen| screen.filled),
                    "checksum": scanout.screen.as_ref().map(|screen| checksum(&screen.pixels)),
                    "cursor": {
                        "resource": scanout.cursor.resource_id,
                        "x": scanout.cursor.x,
                        "y": scanout.cursor.y,
                        "hot": scanout.cursor.hot,
                        "checksum": scanout.cursor.image.as_ref().map(|i| checksum(&i.pixels)),
                    },
                })
            })
            .collect();
        let resources: Vec<Value> = self
            .resources
            .iter()
            .map(|(id, resource)| {
                let checksum = match &resource.kind {
                    Kind::Image(image) => Some(checksum(&image.pixels)),
                    _ => None,
                };
                let (kind, mapped) = match &resource.kind {
                    Kind::Image(_) if resource.is_3d => ("3d", None),
                    Kind::Image(_) => ("2d", None),
                    Kind::Opaque => ("3d", None),
                    Kind::Blob(blob) => match blob.mem {
                        BLOB_MEM_GUEST => ("guest blob", None),
                        _ => ("host blob", blob.mapped),
                    },
                };
                json!({
                    "id": id,
                    "kind": kind,
                    "backing": resource.backing.as_ref().map(Backing::size),
                    "mapped": mapped,
                    "uuid": resource.uuid.map(|uuid| format!("{:032x}", u128::from_be_bytes(uuid))),
                    "contexts": resource.contexts,
                    "checksum": checksum,
                })
            })
            .collect();
        json!({
            "running": self.running,
            "features": format!("{:#x}", self.features),
            "power": match self.power {
                Power::Awake => "awake",
                Power::Promised => "frozen",
                Power::Waking { .. } => "waking",
            },
            "events_read": self.events_read,
            "scanouts": scanouts,
            "resources": resources,
            "contexts": self.contexts,
            "commands": self.number,
            "violations": self.record.violations.len(),
        })
    }

    /// Writes the record's last line.
    pub fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let counters = json!(self.record.counters);
        self.record.line("end", json!({ "counters": counters }));
        for violation in &self.record.violations {
            writeln!(out, "violation: {violation}")?;
        }
        Ok(())
    }
}

/// FNV-1a: enough to see whether two pictures are the same.
fn checksum(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
