// SPDX-License-Identifier: GPL-2.0

//! The device: what the commands do, and what is wrong with them.
//!
//! Nothing here knows of vhost-user or virtqueues: a command comes in as bytes, an answer goes out
//! as bytes, and guest memory is whatever the caller has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::{json, Map, Value};
use virtio_gpu_protocol::{
    Command, Config, DecodeError, DisplayOne, Format, Header, Rect, Request, Response,
    ResponseType, Tail, Wire, BLOB_FLAG_USE_CROSS_DEVICE, BLOB_FLAG_USE_MAPPABLE,
    BLOB_FLAG_USE_SHAREABLE, BLOB_MEM_GUEST, BLOB_MEM_HOST3D, BLOB_MEM_HOST3D_GUEST, EVENT_DISPLAY,
    FLAG_FENCE, FLAG_INFO_RING_IDX, F_BLOB_ALIGNMENT, F_CONTEXT_INIT, F_EDID, F_RESOURCE_BLOB,
    F_RESOURCE_UUID, F_VIRGL, HEADER_SIZE, MAP_CACHE_CACHED, MAX_SCANOUTS,
};
use vm_memory::GuestMemoryMmap;

use crate::display::{self, BlobLayout, Scanout, Source};
use crate::fault::{duration, number, number32, Action, Faults};
use crate::record::{arguments, Record};
use crate::resource::{Backing, Blob, Image, Kind, Resource};
use crate::sys;

/// The most memory that all resources together may take on the host, in bytes.
const MAX_HOST_MEMORY: u64 = 1 << 30;
/// The guest's pages, in bytes.
const PAGE_SIZE: u64 = 4096;
/// Width and height of a cursor, in pixels.
const CURSOR_SIZE: u32 = 64;

/// A capability set: there is no renderer behind it, and its contents mean nothing.
#[derive(Clone, Copy, Debug)]
pub struct Capset {
    /// The set's id.
    pub id: u32,
    /// Its highest version.
    pub max_version: u32,
    /// Bytes.
    pub size: u32,
}

impl FromStr for Capset {
    type Err = String;

    /// `ID:VERSION:SIZE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let [id, max_version, size] = parts[..] else {
            return Err(format!("`{text}` is not ID:VERSION:SIZE"));
        };
        let size = number32(size)?;
        if size > 65536 {
            return Err("a capability set has at most 65536 bytes here".into());
        }
        Ok(Self {
            id: number32(id)?,
            max_version: number32(max_version)?,
            size,
        })
    }
}

/// What the device does when it is asked to keep everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// Promises, and keeps the promise.
    Honest,
    /// Answers with an error.
    Refuse,
    /// Promises, but late.
    Late(Duration),
    /// Never answers.
    Mute,
    /// Promises, and drops everything.
    DropAll,
    /// Promises, and drops one resource: this one, or the one with the highest id.
    DropOne(Option<u32>),
}

impl FromStr for Conduct {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None => match text {
                "honest" => Ok(Conduct::Honest),
                "refuse" => Ok(Conduct::Refuse),
                "mute" => Ok(Conduct::Mute),
                "drop-all" => Ok(Conduct::DropAll),
                "drop-one" => Ok(Conduct::DropOne(None)),
                _ => Err(format!("`{text}` is no conduct")),
            },
            Some(("late", time)) => duration(time).map(Conduct::Late),
            Some(("drop-one", id)) => number32(id).map(|id| Conduct::DropOne(Some(id))),
            _ => Err(format!("`{text}` is no conduct")),
        }
    }
}

/// A display: its size, or `None` for a scanout without one.
pub fn display(text: &str) -> Result<Option<(u32, u32)>, String> {
    if text == "off" {
        return Ok(None);
    }
    let (width, height) = text
        .split_once('x')
        .ok_or_else(|| format!("`{text}` is not WIDTHxHEIGHT or `off`"))?;
    Ok(Some((number32(width)?, number32(height)?)))
}

/// What the device is.
#[derive(Clone, Debug)]
pub struct Options {
    /// The scanouts.
    pub displays: Vec<Option<(u32, u32)>>,
    /// Offer EDID.
    pub edid: bool,
    /// Offer RESOURCE_UUID.
    pub uuid: bool,
    /// Offer RESOURCE_BLOB.
    pub blob: bool,
    /// Offer BLOB_ALIGNMENT, with this alignment in bytes.
    pub blob_alignment: Option<u32>,
    /// Offer VIRGL. There is no renderer: what a context submits is accepted and forgotten.
    pub virgl: bool,
    /// Offer CONTEXT_INIT.
    pub context_init: bool,
    /// The capability sets.
    pub capsets: Vec<Capset>,
    /// The size of the host-visible memory in bytes, 0 for none.
    pub host_visible: u64,
    /// Offer FREEZING on this bit.
    pub freezing: Option<u32>,
    /// What happens when the guest freezes.
    pub conduct: Conduct,
    /// Keep the resources when FREEZING=0 is the first command after a reset.
    pub lenient_thaw: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            displays: vec![Some((1024, 768))],
            edid: true,
            uuid: false,
            blob: false,
            blob_alignment: None,
            virgl: false,
            context_init: false,
            capsets: Vec::new(),
            host_visible: 0,
            freezing: Some(virtio_gpu_protocol::F_FREEZING),
            conduct: Conduct::Honest,
            lenient_thaw: false,
        }
    }
}

impl Options {
    /// Says what cannot be together.
    pub fn check(&self) -> Result<(), String> {
        if self.displays.len() > MAX_SCANOUTS {
            return Err(format!("more than {MAX_SCANOUTS} scanouts"));
        }
        if let Some(bit) = self.freezing {
            let taken = bit < F_BLOB_ALIGNMENT
                || bit >= 24
                || (bit == F_BLOB_ALIGNMENT && self.blob_alignment.is_some());
            if taken {
                return Err(format!(
                    "feature bit {bit} is taken: FREEZING needs another"
                ));
            }
        }
        if self.blob_alignment.is_some() && !self.blob {
            return Err("a blob alignment without blobs".into());
        }
        Ok(())
    }

    /// The feature bits of a GPU that are offered.
    pub fn features(&self) -> u64 {
        let mut features = 0;
        let mut offer = |bit: u32, offered: bool| features |= u64::from(offered) << bit;
        offer(F_VIRGL, self.virgl);
        offer(F_EDID, self.edid);
        offer(F_RESOURCE_UUID, self.uuid);
        offer(F_RESOURCE_BLOB, self.blob);
        offer(F_CONTEXT_INIT, self.context_init);
        offer(F_BLOB_ALIGNMENT, self.blob_alignment.is_some());
        if let Some(bit) = self.freezing {
            offer(bit, true);
        }
        features
    }
}

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
    DisplayInfo([DisplayOne; MAX_SCANOUTS]),
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
    events_read: u32,
    resources: BTreeMap<u32, Resource>,
    contexts: BTreeSet<u32>,
    scanouts: Vec<Scanout>,
    /// Resources that were dropped against the promise: the guest is not to blame for using them.
    broken: BTreeSet<u32>,
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
            events_read: 0,
            resources: BTreeMap::new(),
            contexts: BTreeSet::new(),
            scanouts,
            broken: BTreeSet::new(),
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

    /// The configuration space.
    pub fn config(&self) -> Config {
        Config {
            events_read: self.events_read,
            events_clear: 0,
            num_scanouts: self.scanouts.len() as u32,
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
            self.features = features;
            let kept = self.power == Power::Promised && self.has_freezing();
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
                self.power = Power::Awake;
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

    /// The promise to keep everything was given.
    pub fn promise(&mut self) {
        self.power = Power::Promised;
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
        let freezing = matches!(command, Command::StatusFreezing { .. });
        if self.power == Power::Promised && !freezing {
            self.find(
                "command-while-frozen",
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
                Done::DisplayInfo(displays) => Response::DisplayInfo(*displays),
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
                if asked || refusal.rule == "broken-promise" {
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
                        *byte ^= random.next() as u8 | 1;
                    }
                }
            }
            Action::Twice => answer.times = 2,
            Action::BadId(id) => answer.id = Some(id),
            Action::Garbage => {
                answer.bytes.resize(capacity.min(65536), 0);
                for byte in answer.bytes.iter_mut().skip(HEADER_SIZE) {
                    *byte = random.next() as u8;
                }
                answer.used = answer.bytes.len() as u32;
            }
        }
    }

    fn resource(&mut self, id: u32) -> Result<&mut Resource, Refusal> {
        let broken = self.broken.contains(&id);
        self.resources.get_mut(&id).ok_or_else(|| {
            let rule = if broken {
                "broken-promise"
            } else {
                "unknown-resource"
            };
            refuse(
                ResponseType::ErrInvalidResourceId,
                rule,
                format!("resource {id} does not exist"),
            )
        })
    }

    fn scanout(&mut self, id: u32) -> Result<&mut Scanout, Refusal> {
        usize::try_from(id)
            .ok()
            .and_then(|id| self.scanouts.get_mut(id))
            .ok_or_else(|| {
                refuse(
                    ResponseType::ErrInvalidScanoutId,
                    "unknown-scanout",
                    format!("scanout {id} does not exist"),
                )
            })
    }

    fn need(&self, bit: u32, name: &str) -> Result<(), Refusal> {
        if self.has(bit) {
            return Ok(());
        }
        Err(refuse(
            ResponseType::ErrUnspec,
            "feature",
            format!("{name} was not negotiated"),
        ))
    }

    fn context(&self, header: &Header) -> Result<(), Refusal> {
        self.need(F_VIRGL, "VIRGL")?;
        if self.contexts.contains(&header.ctx_id) {
            return Ok(());
        }
        Err(refuse(
            ResponseType::ErrInvalidContextId,
            "unknown-context",
            format!("context {} does not exist", header.ctx_id),
        ))
    }

    /// Whether a resource with this id and so many bytes can be made.
    fn check_new(&self, id: u32, size: u64) -> Result<(), Refusal> {
        if id == 0 {
            return Err(refuse(
                ResponseType::ErrInvalidResourceId,
                "resource-zero",
                "resource 0 is none",
            ));
        }
        if self.resources.contains_key(&id) {
            return Err(refuse(
                ResponseType::ErrInvalidResourceId,
                "resource-exists",
                format!("resource {id} exists"),
            ));
        }
        let taken: u64 = self.resources.values().map(Resource::host_size).sum();
        if size.saturating_add(taken) > MAX_HOST_MEMORY {
            return Err(refuse(
                ResponseType::ErrOutOfMemory,
                "host-memory",
                format!("{size} bytes are more than is left of {MAX_HOST_MEMORY}"),
            ));
        }
        Ok(())
    }

    fn insert(&mut self, id: u32, resource: Resource) {
        self.broken.remove(&id);
        self.resources.insert(id, resource);
        let most = self.resources.len() as u64;
        let counter = self.record.counters.entry("most_resources".into());
        let counter = counter.or_insert(0);
        *counter = most.max(*counter);
    }

    fn execute(&mut self, mem: &GuestMemoryMmap, request: &Request<'_>) -> Result<Done, Refusal> {
        let header = &request.header;
        let first = self.power == Power::Waking { first: true };
        if first && !matches!(request.command, Command::StatusFreezing { .. }) {
            self.power = Power::Waking { first: false };
        }
        match request.command {
            Command::GetDisplayInfo {} => {
                let mut displays = [DisplayOne::default(); MAX_SCANOUTS];
                let mut left = 0;
                for (display, scanout) in displays.iter_mut().zip(&self.scanouts) {
                    *display = scanout.info(left);
                    // Displays may be as absurd as a test wants them.
                    left = left.wrapping_add(scanout.size.0);
                }
                Ok(Done::DisplayInfo(displays))
            }
            Command::GetEdid { scanout } => {
                self.need(F_EDID, "EDID")?;
                let size = self.scanout(scanout)?.size;
                Ok(Done::Edid(display::edid(scanout, size)))
            }
            Command::ResourceCreate2d {
                resource_id,
                format,
                width,
                height,
            } => {
                let format = known_format(format)?;
                if width == 0 || height == 0 {
                    return Err(invalid("empty-resource", "the resource has no pixels"));
                }
                let size = pixels_size(width, height);
                self.check_new(resource_id, size)?;
                let image = Image::new(format, width, height);
                self.insert(resource_id, Resource::new(Kind::Image(image)));
                Ok(Done::NoData)
            }
            Command::ResourceUnref { resource_id } => {
                self.resource(resource_id)?;
                Ok(Done::Work(self.release(resource_id).into_iter().collect()))
            }
            Command::ResourceAttachBacking { resource_id, .. } => {
                let resource = self.resource(resource_id)?;
                if resource.backing.is_some() {
                    return Err(invalid("backing-exists", "there is backing already"));
                }
                resource.backing = Some(backing(mem, &request.tail)?);
                Ok(Done::NoData)
            }
            Command::ResourceDetachBacking { resource_id } => {
                let resource = self.resource(resource_id)?;
                if resource.backing.take().is_none() {
                    return Err(invalid("no-backing", "there is no backing"));
                }
                Ok(Done::NoData)
            }
            Command::TransferToHost2d {
                r,
                offset,
                resource_id,
            } => self.transfer_2d(mem, r, offset, resource_id),
            Command::SetScanout {
                r,
                scanout_id,
                resource_id,
            } => self.set_scanout(r, scanout_id, resource_id),
            Command::SetScanoutBlob { .. } => self.set_scanout_blob(&request.command),
            Command::ResourceFlush { r, resource_id } => self.flush(mem, r, resource_id),
            Command::ResourceAssignUuid { resource_id } => {
                self.need(F_RESOURCE_UUID, "RESOURCE_UUID")?;
                let number = self.number;
                let resource = self.resource(resource_id)?;
                let uuid = *resource
                    .uuid
                    .get_or_insert_with(|| uuid(resource_id, number));
                Ok(Done::Uuid(uuid))
            }
            Command::UpdateCursor {
                scanout_id,
                x,
                y,
                resource_id,
                hot_x,
                hot_y,
                ..
            } => {
                let image = match resource_id {
                    0 => None,
                    id => Some(self.cursor_image(mem, id)?),
                };
                let cursor = &mut self.scanout(scanout_id)?.cursor;
                cursor.resource_id = resource_id;
                (cursor.x, cursor.y) = (x, y);
                cursor.hot = (hot_x, hot_y);
                cursor.image = image;
                Ok(Done::NoData)
            }
            Command::MoveCursor {
                scanout_id, x, y, ..
            } => {
                let cursor = &mut self.scanout(scanout_id)?.cursor;
                (cursor.x, cursor.y) = (x, y);
                Ok(Done::NoData)
            }
            Command::GetCapsetInfo { capset_index } => usize::try_from(capset_index)
                .ok()
                .and_then(|index| self.options.capsets.get(index))
                .map(|&set| Done::Capset(set))
                .ok_or_else(|| {
                    invalid(
                        "unknown-capset",
                        format!("there is no capability set {capset_index}"),
                    )
                }),
            Command::GetCapset {
                capset_id,
                capset_version,
            } => self
                .options
                .capsets
                .iter()
                .find(|set| set.id == capset_id && capset_version <= set.max_version)
                .map(|set| Done::CapsetData((0..set.size).map(|i| (i ^ set.id) as u8).collect()))
                .ok_or_else(|| {
                    invalid(
                        "unknown-capset",
                        format!("there is no capability set {capset_id} version {capset_version}"),
                    )
                }),
            Command::ResourceCreateBlob { .. } => {
                self.create_blob(mem, header, &request.command, &request.tail)
            }
            Command::ResourceMapBlob {
                resource_id,
                offset,
                ..
            } => self.map_blob(resource_id, offset),
            Command::ResourceUnmapBlob { resource_id } => {
                self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
                match &mut self.resource(resource_id)?.kind {
                    Kind::Blob(blob) if blob.mapped.is_some() => Ok(Done::Work(vec![MapWork {
                        file: None,
                        offset: blob.mapped.take().unwrap_or(0),
                        length: blob.size,
                        resource_id,
                    }])),
                    _ => Err(invalid("not-mapped", "the resource is not mapped")),
                }
            }
            Command::CtxCreate {
                nlen, context_init, ..
            } => {
                self.need(F_VIRGL, "VIRGL")?;
                if nlen > 64 {
                    self.find("context-name", format!("a name of {nlen} bytes"));
                }
                if context_init != 0 {
                    self.need(F_CONTEXT_INIT, "CONTEXT_INIT")?;
                    let set = context_init & 0xff;
                    if !self.options.capsets.iter().any(|known| known.id == set) {
                        let text = format!("there is no capability set {set}");
                        return Err(invalid("unknown-capset", text));
                    }
                }
                if header.ctx_id == 0 || !self.contexts.insert(header.ctx_id) {
                    return Err(refuse(
                        ResponseType::ErrInvalidContextId,
                        "context-exists",
                        format!("context {} exists, or is none", header.ctx_id),
                    ));
                }
                Ok(Done::NoData)
            }
            Command::CtxDestroy {} => {
                self.context(header)?;
                self.contexts.remove(&header.ctx_id);
                for resource in self.resources.values_mut() {
                    resource.contexts.remove(&header.ctx_id);
                }
                Ok(Done::NoData)
            }
            Command::CtxAttachResource { resource_id } => {
                self.context(header)?;
                self.resource(resource_id)?.contexts.insert(header.ctx_id);
                Ok(Done::NoData)
            }
            Command::CtxDetachResource { resource_id } => {
                self.context(header)?;
                if !self.resource(resource_id)?.contexts.remove(&header.ctx_id) {
                    return Err(invalid(
                        "not-attached",
                        "the resource is not attached to the context",
                    ));
                }
                Ok(Done::NoData)
            }
            Command::ResourceCreate3d {
                resource_id,
                format,
                width,
                height,
                depth,
                array_size,
                ..
            } => {
                self.need(F_VIRGL, "VIRGL")?;
                if width == 0 || height == 0 || depth == 0 || array_size == 0 {
                    return Err(invalid("empty-resource", "the resource has no pixels"));
                }
                let size = pixels_size(width, height);
                let (kind, size) = match Format::from_wire(format) {
                    Some(format) if depth == 1 && array_size == 1 => (Some(format), size),
                    _ => (None, 0),
                };
                self.check_new(resource_id, size)?;
                let mut resource = Resource::new(kind.map_or(Kind::Opaque, |format| {
                    Kind::Image(Image::new(format, width, height))
                }));
                resource.is_3d = true;
                self.insert(resource_id, resource);
                Ok(Done::NoData)
            }
            Command::TransferToHost3d { .. } | Command::TransferFromHost3d { .. } => {
                self.context(header)?;
                self.transfer_3d(mem, &request.command)
            }
            Command::Submit3d { .. } => {
                self.context(header)?;
                Ok(Done::NoData)
            }
            Command::StatusFreezing { freezing } => self.set_freezing(freezing),
        }
    }

    fn set_freezing(&mut self, freezing: u32) -> Result<Done, Refusal> {
        if !self.has_freezing() {
            return Err(refuse(
                ResponseType::ErrUnspec,
                "feature",
                "FREEZING was not negotiated",
            ));
        }
        match freezing {
            0 => {
                if self.power == (Power::Waking { first: true }) && !self.options.lenient_thaw {
                    // Not the guest that was frozen: that one would have looked what is left.
                    let stale = self.resources.len();
                    let work = self.release_all();
                    self.broken.clear();
                    self.power = Power::Awake;
                    self.record.line("released", json!({ "resources": stale }));
                    return Ok(Done::Work(work));
                }
                self.power = Power::Awake;
                Ok(Done::NoData)
            }
            1 => Ok(Done::Promise),
            other => Err(invalid("freezing", format!("freezing is {other}"))),
        }
    }

    fn transfer_2d(
        &mut self,
        mem: &GuestMemoryMmap,
        r: Rect,
        offset: u64,
        id: u32,
    ) -> Result<Done, Refusal> {
        let resource = self.resource(id)?;
        match &mut resource.kind {
            // The memory of a blob is the resource: there is nothing to copy.
            Kind::Blob(_) | Kind::Opaque => Ok(Done::NoData),
            Kind::Image(image) => {
                within(&r, image.width, image.height)?;
                let Some(backing) = &resource.backing else {
                    return Err(invalid("no-backing", "there is no backing"));
                };
                let stride = image.stride();
                image
                    .fill(&r, offset, stride, |at, to| backing.read(mem, at, to))
                    .map_err(|text| invalid("past-backing", text))?;
                Ok(Done::NoData)
            }
        }
    }

    fn transfer_3d(&mut self, mem: &GuestMemoryMmap, command: &Command) -> Result<Done, Refusal> {
        let (Command::TransferToHost3d {
            r#box,
            offset,
            resource_id,
            level,
            stride,
            ..
        }
        | Command::TransferFromHost3d {
            r#box,
            offset,
            resource_id,
            level,
            stride,
            ..
        }) = *command
        else {
            return Ok(Done::NoData);
        };
        let resource = self.resource(resource_id)?;
        let Kind::Image(image) = &mut resource.kind else {
            return Ok(Done::NoData);
        };
        if level != 0 || r#box.z != 0 || r#box.d != 1 {
            return Err(invalid("outside", "a level or layer that does not exist"));
        }
        let r = Rect {
            x: r#box.x,
            y: r#box.y,
            width: r#box.w,
            height: r#box.h,
        };
        within(&r, image.width, image.height)?;
        let Some(backing) = &resource.backing else {
            return Err(invalid("no-backing", "there is no backing"));
        };
        let stride = match stride {
            0 => image.stride(),
            stride => stride.into(),
        };
        if matches!(command, Command::TransferToHost3d { .. }) {
            image.fill(&r, offset, stride, |at, to| backing.read(mem, at, to))
        } else {
            image.drain(&r, offset, stride, |at, from| backing.write(mem, at, from))
        }
        .map_err(|text| invalid("past-backing", text))?;
        Ok(Done::NoData)
    }

    fn set_scanout(&mut self, r: Rect, scanout_id: u32, id: u32) -> Result<Done, Refusal> {
        if id == 0 {
            self.scanout(scanout_id)?.disable();
            return Ok(Done::NoData);
        }
        self.scanout(scanout_id)?;
        let format = match &self.resource(id)?.kind {
            Kind::Image(image) => {
                within(&r, image.width, image.height)?;
                image.format
            }
            // Accepted, as everything else about it, and nothing is shown.
            Kind::Opaque => {
                self.scanout(scanout_id)?.disable();
                return Ok(Done::NoData);
            }
            Kind::Blob(_) => return Err(invalid("blob", "a blob needs SET_SCANOUT_BLOB")),
        };
        self.show(
            scanout_id,
            format,
            Source {
                resource_id: id,
                rect: r,
                blob: None,
            },
        )
    }

    fn set_scanout_blob(&mut self, command: &Command) -> Result<Done, Refusal> {
        let Command::SetScanoutBlob {
            r,
            scanout_id,
            resource_id,
            width,
            height,
            format,
            strides,
            offsets,
            ..
        } = *command
        else {
            return Ok(Done::NoData);
        };
        self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
        let scanout = self.scanout(scanout_id)?;
        if resource_id == 0 {
            scanout.disable();
            return Ok(Done::NoData);
        }
        let Kind::Blob(blob) = &self.resource(resource_id)?.kind else {
            return Err(invalid("not-a-blob", "SET_SCANOUT_BLOB needs a blob"));
        };
        let size = blob.size;
        let format = known_format(format)?;
        within(&r, width, height)?;
        let line = u64::from(width) * u64::from(Format::BYTES);
        if u64::from(strides[0]) < line {
            let text = format!("a stride of {} bytes for {width} pixels", strides[0]);
            return Err(invalid("stride", text));
        }
        let end = u64::from(strides[0])
            .saturating_mul(u64::from(height) - 1)
            .saturating_add(line + u64::from(offsets[0]));
        if end > size {
            let text = format!("the framebuffer ends at {end}, the blob at {size}");
            return Err(invalid("past-backing", text));
        }
        self.show(
            scanout_id,
            format,
            Source {
                resource_id,
                rect: r,
                blob: Some(BlobLayout {
                    format,
                    stride: strides[0],
                    offset: offsets[0],
                }),
            },
        )
    }

    fn show(&mut self, scanout: u32, format: Format, source: Source) -> Result<Done, Refusal> {
        let Rect { width, height, .. } = source.rect;
        // A blob may have the same memory many times over.
        let size = pixels_size(width, height);
        if size > MAX_HOST_MEMORY {
            let text = format!("a display of {size} bytes");
            return Err(refuse(ResponseType::ErrOutOfMemory, "host-memory", text));
        }
        let scanout = self.scanout(scanout)?;
        let fits = scanout
            .screen
            .as_ref()
            .is_some_and(|s| (s.format, s.width, s.height) == (format, width, height));
        if !fits {
            scanout.screen = Some(Image::new(format, width, height));
        }
        scanout.source = Some(source);
        scanout.stale = true;
        Ok(Done::NoData)
    }

    fn flush(&mut self, mem: &GuestMemoryMmap, r: Rect, id: u32) -> Result<Done, Refusal> {
        if let Kind::Image(image) = &self.resource(id)?.kind {
            within(&r, image.width, image.height)?;
        }
        let Some(resource) = self.resources.get(&id) else {
            return Ok(Done::NoData);
        };
        for scanout in &mut self.scanouts {
            let (Some(source), Some(screen)) = (scanout.source, &mut scanout.screen) else {
                continue;
            };
            if source.resource_id != id {
                continue;
            }
            let part = if scanout.stale {
                source.rect
            } else {
                match r.intersect(&source.rect) {
                    Some(part) => part,
                    None => continue,
                }
            };
            let target = Rect {
                x: part.x - source.rect.x,
                y: part.y - source.rect.y,
                ..part
            };
            let copied = match (&resource.kind, source.blob) {
                (Kind::Image(image), _) => {
                    let stride = image.stride();
                    let start = u64::from(part.y) * stride + u64::from(part.x) * 4;
                    screen.fill(&target, start, stride, |at, to| {
                        let at = at as usize;
                        to.copy_from_slice(&image.pixels[at..at + to.len()]);
                        Ok(())
                    })
                }
                (Kind::Blob(_), Some(layout)) => {
                    let stride = u64::from(layout.stride);
                    let start = u64::from(layout.offset)
                        + u64::from(part.y) * stride
                        + u64::from(part.x) * 4;
                    screen.fill(&target, start, stride, |at, to| {
                        resource.read_blob(mem, at, to)
                    })
                }
                _ => Ok(()),
            };
            copied.map_err(|text| invalid("past-backing", text))?;
            scanout.stale = false;
        }
        Ok(Done::NoData)
    }

    fn cursor_image(&mut self, mem: &GuestMemoryMmap, id: u32) -> Result<Image, Refusal> {
        let resource = self.resource(id)?;
        match &resource.kind {
            Kind::Image(image) => {
                if !image.filled {
                    return Err(invalid(
                        "cursor-never-filled",
                        "the cursor was never filled",
                    ));
                }
                if (image.width, image.height) != (CURSOR_SIZE, CURSOR_SIZE) {
                    return Err(invalid(
                        "cursor-size",
                        format!("a cursor of {}x{} pixels", image.width, image.height),
                    ));
                }
                Ok(image.clone())
            }
            Kind::Blob(_) => {
                let mut image = Image::new(Format::B8G8R8A8, CURSOR_SIZE, CURSOR_SIZE);
                resource
                    .read_blob(mem, 0, &mut image.pixels)
                    .map_err(|text| invalid("past-backing", text))?;
                Ok(image)
            }
            Kind::Opaque => Err(invalid("cursor-size", "the cursor has no pixels")),
        }
    }

    fn check_alignment(&mut self, what: &str, number: u64) {
        if let Some(alignment) = self.options.blob_alignment {
            if self.has(F_BLOB_ALIGNMENT) && number % u64::from(alignment) != 0 {
                let text = format!("the {what} {number:#x} is not aligned to {alignment:#x}");
                self.find("blob-alignment", text);
            }
        }
    }

    fn create_blob(
        &mut self,
        mem: &GuestMemoryMmap,
        header: &Header,
        command: &Command,
        tail: &Tail<'_>,
    ) -> Result<Done, Refusal> {
        let Command::ResourceCreateBlob {
            resource_id,
            blob_mem,
            blob_flags,
            nr_entries,
            blob_id,
            size,
        } = *command
        else {
            return Ok(Done::NoData);
        };
        self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
        let known = BLOB_FLAG_USE_MAPPABLE | BLOB_FLAG_USE_SHAREABLE | BLOB_FLAG_USE_CROSS_DEVICE;
        if blob_flags & !known != 0 {
            self.find("flags", format!("undefined blob flags {blob_flags:#x}"));
        }
        if size == 0 {
            return Err(invalid("empty-resource", "the blob has no bytes"));
        }
        self.check_alignment("size", size);
        let host = matches!(blob_mem, BLOB_MEM_HOST3D | BLOB_MEM_HOST3D_GUEST);
        let guest = matches!(blob_mem, BLOB_MEM_GUEST | BLOB_MEM_HOST3D_GUEST);
        if !host && !guest {
            return Err(invalid("blob-mem", format!("blob memory {blob_mem}")));
        }
        if host {
            self.context(header)?;
        }
        if blob_mem == BLOB_MEM_GUEST && blob_id != 0 {
            self.find("blob-id", "a blob of guest memory has no id");
        }
        if guest == (nr_entries == 0) {
            return Err(invalid("blob-entries", format!("{nr_entries} entries")));
        }
        self.check_new(resource_id, if host { size } else { 0 })?;
        let backing = if guest {
            let backing = backing(mem, tail)?;
            if backing.size() < size {
                let text = format!("{} bytes of memory for a blob of {size}", backing.size());
                return Err(invalid("past-backing", text));
            }
            Some(backing)
        } else {
            None
        };
        let file = if host {
            let file = sys::memory_file(size).map_err(|error| {
                refuse(
                    ResponseType::ErrOutOfMemory,
                    "host-memory",
                    error.to_string(),
                )
            })?;
            Some(file)
        } else {
            None
        };
        let mut resource = Resource::new(Kind::Blob(Blob {
            mem: blob_mem,
            flags: blob_flags,
            size,
            host: file,
            mapped: None,
        }));
        resource.backing = backing;
        self.insert(resource_id, resource);
        Ok(Done::NoData)
    }

    fn map_blob(&mut self, resource_id: u32, offset: u64) -> Result<Done, Refusal> {
        self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
        self.check_alignment("offset", offset);
        let region = self.options.host_visible;
        let taken: Vec<_> = self
            .resources
            .values()
            .filter_map(|resource| match &resource.kind {
                Kind::Blob(blob) => blob.mapped.map(|at| (at, at + blob.size)),
                _ => None,
            })
            .collect();
        let Kind::Blob(blob) = &mut self.resource(resource_id)?.kind else {
            return Err(invalid("not-a-blob", "only a blob can be mapped"));
        };
        if blob.flags & BLOB_FLAG_USE_MAPPABLE == 0 {
            return Err(invalid("not-mappable", "the blob is not mappable"));
        }
        if blob.mapped.is_some() {
            return Err(invalid("mapped-twice", "the blob is mapped already"));
        }
        let end = offset.checked_add(blob.size).filter(|&end| end <= region);
        let Some(end) = end.filter(|_| offset % PAGE_SIZE == 0) else {
            let text = format!("{:#x} bytes at {offset:#x} of {region:#x}", blob.size);
            return Err(invalid("outside", text));
        };
        if taken.iter().any(|&(from, to)| offset < to && from < end) {
            return Err(invalid("overlap", "another blob is mapped there"));
        }
        let Some(Ok(file)) = blob.host.as_ref().map(File::try_clone) else {
            return Err(invalid(
                "not-mappable",
                "the blob has no memory on the host",
            ));
        };
        blob.mapped = Some(offset);
        Ok(Done::Work(vec![MapWork {
            file: Some(file),
            offset,
            length: blob.size,
            resource_id,
        }]))
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

/// The size of so many pixels in bytes, or as much as there is not.
fn pixels_size(width: u32, height: u32) -> u64 {
    (u64::from(width) * u64::from(height)).saturating_mul(Format::BYTES.into())
}

fn known_format(format: u32) -> Result<Format, Refusal> {
    Format::from_wire(format).ok_or_else(|| {
        invalid(
            "unknown-format",
            format!("no format has the number {format}"),
        )
    })
}

fn within(r: &Rect, width: u32, height: u32) -> Result<(), Refusal> {
    if r.is_empty() {
        return Err(invalid("empty-rectangle", "the rectangle has no pixels"));
    }
    if !r.is_within(width, height) {
        let text = format!(
            "{}x{}+{}+{} is outside {width}x{height}",
            r.width, r.height, r.x, r.y
        );
        return Err(invalid("outside", text));
    }
    Ok(())
}

fn backing(mem: &GuestMemoryMmap, tail: &Tail<'_>) -> Result<Backing, Refusal> {
    let Tail::Entries(entries) = tail else {
        return Err(invalid("no-backing", "there are no entries"));
    };
    if entries.is_empty() {
        return Err(invalid("no-backing", "there are no entries"));
    }
    Backing::new(mem, entries.iter()).map_err(|text| invalid("backing-outside-memory", text))
}

/// A UUID that no other resource has, the same in every run (version 8: made as one likes).
fn uuid(resource_id: u32, number: u64) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid[..4].copy_from_slice(&resource_id.to_be_bytes());
    uuid[8..].copy_from_slice(&number.to_be_bytes());
    uuid[6] = 0x80;
    uuid[8] = 0x80;
    uuid
}

/// FNV-1a: enough to see whether two pictures are the same.
fn checksum(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// The size of the host-visible memory: bytes, or with `K`, `M` or `G`.
pub fn memory_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 10),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (text, 0),
    };
    number(digits)?
        .checked_mul(1 << shift)
        .filter(|size| size % PAGE_SIZE == 0)
        .ok_or_else(|| format!("`{text}` is no number of pages"))
}
