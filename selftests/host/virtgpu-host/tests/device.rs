// SPDX-License-Identifier: GPL-2.0

//! The device model, driven with commands and memory of the test's own.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use virtgpu_host::device::{Answer, Device, Incoming, Outcome, QueueKind};
use virtgpu_host::fault::Faults;
use virtgpu_host::options::{Capset, Conduct, Options};
use virtgpu_host::record::Record;
use virtio_gpu_protocol::{
    Command, Entries, Header, MemEntry, Rect, Request, Response, ResponseType, Tail, Wire,
    BLOB_FLAG_USE_MAPPABLE, BLOB_MEM_GUEST, BLOB_MEM_HOST3D, EVENT_DISPLAY, FLAG_FENCE,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 4 << 20;
const BGRX: u32 = 2;

/// A place for the record.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest without a kernel.
struct Guest {
    device: Device,
    mem: GuestMemoryMmap,
    lines: Lines,
}

impl Guest {
    fn with(options: Options) -> Self {
        options.check().unwrap();
        let lines = Lines::default();
        let record = Record::new(Some(Box::new(lines.clone())));
        let mut device = Device::new(options, Faults::new(Vec::new(), None), record);
        let features = device.options().features();
        device.start(features, false, 0);
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        Self { device, mem, lines }
    }

    fn new() -> Self {
        Self::with(Options::default())
    }

    fn raw(&mut self, queue: QueueKind, bytes: &[u8], capacity: usize) -> Outcome {
        self.device.receive(
            &self.mem,
            Incoming {
                queue,
                kick: 1,
                bytes,
                capacity,
            },
        )
    }

    fn outcome(&mut self, header: Header, command: Command, tail: Tail<'_>) -> Outcome {
        let request = Request {
            header,
            command,
            tail,
        };
        let mut bytes = Vec::new();
        request.encode(&mut |piece| bytes.extend_from_slice(piece));
        let queue = match command {
            Command::UpdateCursor { .. } | Command::MoveCursor { .. } => QueueKind::Cursor,
            _ => QueueKind::Control,
        };
        self.raw(queue, &bytes, 2048)
    }

    fn answer(&mut self, command: Command) -> Answer {
        match self.outcome(Header::default(), command, Tail::None) {
            Outcome::Answer(answer) => answer,
            Outcome::Map(work, _) => panic!("wants to map {work:?}"),
        }
    }

    /// The type of the answer; the promise is taken as given.
    fn send(&mut self, command: Command) -> ResponseType {
        let answer = self.answer(command);
        if answer.promise && answer.delay == Some(Duration::ZERO) {
            self.device.promise();
        }
        kind(&answer)
    }

    /// The same in a context, or with a fence.
    fn send_with(&mut self, header: Header, command: Command) -> ResponseType {
        match self.outcome(header, command, Tail::None) {
            Outcome::Answer(answer) => kind(&answer),
            Outcome::Map(work, _) => panic!("wants to map {work:?}"),
        }
    }

    fn attach(&mut self, resource_id: u32, entries: &[(u64, u32)]) -> ResponseType {
        let bytes = wire(entries);
        let command = Command::ResourceAttachBacking {
            resource_id,
            nr_entries: entries.len() as u32,
        };
        match self.outcome(
            Header::default(),
            command,
            Tail::Entries(Entries::new(&bytes)),
        ) {
            Outcome::Answer(answer) => kind(&answer),
            Outcome::Map(..) => panic!(),
        }
    }

    fn create(&mut self, resource_id: u32, width: u32, height: u32) {
        let created = self.send(Command::ResourceCreate2d {
            resource_id,
            format: BGRX,
            width,
            height,
        });
        assert_eq!(created, ResponseType::OkNoData);
    }

    fn blob(&mut self, resource_id: u32, size: u64, entries: &[(u64, u32)]) -> ResponseType {
        let bytes = wire(entries);
        let command = Command::ResourceCreateBlob {
            resource_id,
            blob_mem: BLOB_MEM_GUEST,
            blob_flags: 0,
            nr_entries: entries.len() as u32,
            blob_id: 0,
            size,
        };
        match self.outcome(
            Header::default(),
            command,
            Tail::Entries(Entries::new(&bytes)),
        ) {
            Outcome::Answer(answer) => kind(&answer),
            Outcome::Map(..) => panic!(),
        }
    }

    /// Shows a 4x2 picture of resource 1 on scanout 0, its memory at 0x1000 and 0x3000.
    fn show_picture(&mut self) {
        self.create(1, 4, 2);
        assert_eq!(self.attach(1, &[(0x1000, 20), (0x3000, 12)]), OK);
        let picture: Vec<u8> = (0..32).collect();
        self.mem
            .write_slice(&picture[..20], GuestAddress(0x1000))
            .unwrap();
        self.mem
            .write_slice(&picture[20..], GuestAddress(0x3000))
            .unwrap();
        let r = rect(0, 0, 4, 2);
        assert_eq!(self.send(transfer(1, r, 0)), OK);
        assert_eq!(self.send(scanout(0, 1, r)), OK);
        assert_eq!(self.send(flush(1, r)), OK);
    }

    /// A reset that the guest made, and its DRIVER_OK.
    fn reset(&mut self) {
        let features = self.device.options().features();
        self.device.stop(0);
        self.device.start(features, false, 0);
    }

    fn rules(&self) -> Vec<String> {
        let rule = |violation: &Value| violation["rule"].as_str().unwrap().to_owned();
        self.device.record.violations.iter().map(rule).collect()
    }

    fn ids(&self) -> Vec<u64> {
        let state = self.device.state();
        let resources = state["resources"].as_array().unwrap();
        resources
            .iter()
            .map(|resource| resource["id"].as_u64().unwrap())
            .collect()
    }
}

const OK: ResponseType = ResponseType::OkNoData;

fn kind(answer: &Answer) -> ResponseType {
    ResponseType::from_kind(Wire::get(&answer.bytes).unwrap()).unwrap()
}

fn wire(entries: &[(u64, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &(addr, length) in entries {
        let entry = MemEntry {
            addr,
            length,
            padding: 0,
        };
        entry.put(&mut |piece| bytes.extend_from_slice(piece));
    }
    bytes
}

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect {
        x,
        y,
        width,
        height,
    }
}

fn transfer(resource_id: u32, r: Rect, offset: u64) -> Command {
    Command::TransferToHost2d {
        r,
        offset,
        resource_id,
    }
}

fn scanout(scanout_id: u32, resource_id: u32, r: Rect) -> Command {
    Command::SetScanout {
        r,
        scanout_id,
        resource_id,
    }
}

fn flush(resource_id: u32, r: Rect) -> Command {
    Command::ResourceFlush { r, resource_id }
}

fn cursor(scanout_id: u32, resource_id: u32) -> Command {
    Command::UpdateCursor {
        scanout_id,
        x: 5,
        y: 6,
        padding: 0,
        resource_id,
        hot_x: 1,
        hot_y: 2,
    }
}

fn freezing(freezing: u32) -> Command {
    Command::StatusFreezing { freezing }
}

fn unref(resource_id: u32) -> Command {
    Command::ResourceUnref { resource_id }
}

/// A picture goes from two pieces of guest memory to a PNG file.
#[test]
fn picture_to_png() {
    let mut guest = Guest::new();
    guest.show_picture();
    let directory = std::env::temp_dir().join(format!("virtgpu-host-{}", std::process::id()));
    let files = guest.device.dump(&directory).unwrap();
    assert_eq!(files, [directory.join("scanout-0.png")]);

    let decoder = png::Decoder::new(std::fs::File::open(&files[0]).unwrap());
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height), (4, 2));
    // Blue, green, red, unused become red, green, blue, opaque.
    let expected: Vec<u8> = (0..8u8)
        .flat_map(|pixel| [pixel * 4 + 2, pixel * 4 + 1, pixel * 4, 255])
        .collect();
    assert_eq!(pixels, expected);
    std::fs::remove_dir_all(directory).unwrap();
    assert!(guest.rules().is_empty());
}

/// What was not flushed is not shown, and a flush shows its rectangle only.
#[test]
fn a_flush_shows_its_rectangle() {
    let mut guest = Guest::new();
    guest.show_picture();
    let shown = |guest: &Guest| guest.device.state()["scanouts"][0]["checksum"].clone();
    let before = shown(&guest);
    guest
        .mem
        .write_slice(&[0xff; 20], GuestAddress(0x1000))
        .unwrap();
    guest.send(transfer(1, rect(1, 0, 1, 1), 4));
    assert_eq!(shown(&guest), before);
    guest.send(flush(1, rect(2, 0, 2, 2)));
    assert_eq!(shown(&guest), before);
    guest.send(flush(1, rect(1, 0, 1, 1)));
    assert_ne!(shown(&guest), before);
    assert!(guest.rules().is_empty());
}

/// Everything that is wrong has a name, and an error where the command has an answer.
#[test]
fn violations() {
    use ResponseType::{
        ErrInvalidParameter as Parameter, ErrInvalidResourceId as Resource,
        ErrInvalidScanoutId as Scanout, ErrOutOfMemory as Memory, ErrUnspec as Unspec,
    };
    let create = |resource_id, format, width, height| Command::ResourceCreate2d {
        resource_id,
        format,
        width,
        height,
    };
    let cases = [
        (create(0, BGRX, 1, 1), Resource, "resource-zero"),
        (create(1, BGRX, 1, 1), Resource, "resource-exists"),
        (create(9, 5, 1, 1), Parameter, "unknown-format"),
        (create(9, BGRX, 0, 1), Parameter, "empty-resource"),
        (create(9, BGRX, u32::MAX, u32::MAX), Memory, "host-memory"),
        (unref(9), Resource, "unknown-resource"),
        (scanout(1, 1, rect(0, 0, 4, 2)), Scanout, "unknown-scanout"),
        (
            scanout(0, 9, rect(0, 0, 4, 2)),
            Resource,
            "unknown-resource",
        ),
        (scanout(0, 1, rect(0, 1, 4, 2)), Parameter, "outside"),
        (flush(1, rect(1, 0, 4, 2)), Parameter, "outside"),
        (flush(1, rect(0, 0, 0, 2)), Parameter, "empty-rectangle"),
        (
            transfer(1, rect(u32::MAX, 0, 2, 1), 0),
            Parameter,
            "outside",
        ),
        (transfer(1, rect(0, 0, 4, 2), 1), Parameter, "past-backing"),
        (transfer(1, rect(0, 0, 1, 2), 13), Parameter, "past-backing"),
        (
            transfer(1, rect(0, 0, 1, 2), u64::MAX),
            Parameter,
            "past-backing",
        ),
        (transfer(2, rect(0, 0, 1, 1), 0), Parameter, "no-backing"),
        (
            Command::ResourceDetachBacking { resource_id: 2 },
            Parameter,
            "no-backing",
        ),
        (Command::GetEdid { scanout: 1 }, Scanout, "unknown-scanout"),
        (
            Command::GetCapsetInfo { capset_index: 0 },
            Parameter,
            "unknown-capset",
        ),
        (
            Command::ResourceAssignUuid { resource_id: 1 },
            Unspec,
            "feature",
        ),
        (
            Command::ResourceUnmapBlob { resource_id: 1 },
            Unspec,
            "feature",
        ),
        (Command::CtxDestroy {}, Unspec, "feature"),
        (freezing(2), Parameter, "freezing"),
    ];
    let mut guest = Guest::new();
    guest.show_picture();
    guest.create(2, 1, 1);
    for (command, error, rule) in cases {
        guest.device.record.violations.clear();
        assert_eq!(guest.send(command), error, "{command:?}");
        assert_eq!(guest.rules(), [rule], "{command:?}");
        let violation = &guest.device.record.violations[0];
        assert_eq!(violation["command"]["command"], command.name());
    }
    for (entries, rule) in [
        (&[][..], "no-backing"),
        (&[(MEMORY as u64 - 4, 8)], "backing-outside-memory"),
        (&[(u64::MAX, 8)], "backing-outside-memory"),
        (&[(0, 0)], "backing-outside-memory"),
    ] {
        guest.device.record.violations.clear();
        assert_eq!(guest.attach(2, entries), Parameter);
        assert_eq!(guest.rules(), [rule]);
    }
    guest.device.record.violations.clear();
    assert_eq!(guest.attach(1, &[(0, 32)]), Parameter);
    assert_eq!(guest.rules(), ["backing-exists"]);
    // The picture survived all of that.
    assert_eq!(guest.send(flush(1, rect(0, 0, 4, 2))), OK);
}

/// All resources together have a limit, and what is destroyed makes room. Nothing touches this memory.
#[test]
fn resources_are_limited() {
    let gibibyte = |resource_id| Command::ResourceCreate2d {
        resource_id,
        format: BGRX,
        width: 16384,
        height: 16384,
    };
    let mut guest = Guest::new();
    assert_eq!(guest.send(gibibyte(1)), OK);
    assert_eq!(guest.send(gibibyte(2)), OK);
    assert_eq!(guest.rules(), [""; 0]);
    assert_eq!(guest.send(gibibyte(3)), ResponseType::ErrOutOfMemory);
    assert_eq!(guest.rules(), ["host-memory"]);
    assert_eq!(guest.send(unref(1)), OK);
    assert_eq!(guest.send(gibibyte(3)), OK);
}

/// What is wrong with the bytes, whatever the command.
#[test]
fn malformed() {
    let mut guest = Guest::new();
    let mut expect = |queue, bytes: &[u8], capacity, rule: &str| {
        guest.device.record.violations.clear();
        let answer = match guest.raw(queue, bytes, capacity) {
            Outcome::Answer(answer) => answer,
            Outcome::Map(..) => panic!(),
        };
        assert!(answer.bytes.len() <= capacity);
        assert_eq!(guest.rules(), [rule], "{bytes:x?}");
    };
    let control = QueueKind::Control;
    let mut info = [0; 24];
    info[1] = 1;
    expect(control, &[], 24, "short-command");
    expect(control, &[0; 24], 24, "unknown-command");
    expect(control, &info, 407, "short-buffer");
    expect(QueueKind::Cursor, &info, 0, "wrong-queue");
    let mut dirty = info;
    dirty[23] = 1;
    expect(control, &dirty, 408, "padding");
    let mut flags = info;
    flags[7] = 0x80;
    expect(control, &flags, 408, "flags");
    let mut ring = info;
    ring[4] = 2;
    expect(control, &ring, 408, "ring-idx");
    let mut longer = info.to_vec();
    longer.push(0);
    expect(control, &longer, 408, "trailing-bytes");
    let mut short = info;
    short[0] = 1;
    expect(control, &short, 24, "short-command");
}

#[test]
fn cursor_is_strict() {
    let mut guest = Guest::new();
    guest.create(1, 64, 64);
    guest.create(2, 32, 32);
    guest.answer(cursor(0, 1));
    assert_eq!(guest.rules(), ["cursor-never-filled"]);
    guest.device.record.violations.clear();

    assert_eq!(guest.attach(1, &[(0, 64 * 64 * 4)]), OK);
    assert_eq!(guest.attach(2, &[(0, 32 * 32 * 4)]), OK);
    guest.send(transfer(1, rect(0, 0, 64, 64), 0));
    guest.send(transfer(2, rect(0, 0, 32, 32), 0));
    // The cursor queue is never answered.
    assert!(guest.answer(cursor(0, 1)).bytes.is_empty());
    assert!(guest.rules().is_empty());
    let state = guest.device.state()["scanouts"][0]["cursor"].clone();
    assert_eq!((&state["resource"], &state["x"]), (&1.into(), &5.into()));
    guest.answer(cursor(0, 2));
    assert_eq!(guest.rules(), ["cursor-size"]);
    guest.device.record.violations.clear();
    guest.answer(cursor(1, 1));
    assert_eq!(guest.rules(), ["unknown-scanout"]);
    guest.answer(cursor(0, 0));
    assert_eq!(
        guest.device.state()["scanouts"][0]["cursor"]["checksum"],
        Value::Null
    );
}

#[test]
fn displays_and_hotplug() {
    let mut guest = Guest::with(Options {
        displays: vec![Some((800, 600)), None],
        ..Options::default()
    });
    let info = |guest: &mut Guest| {
        let answer = guest.answer(Command::GetDisplayInfo {});
        match Response::decode(&answer.bytes) {
            Some((_, Response::DisplayInfo(displays))) => displays,
            other => panic!("{other:?}"),
        }
    };
    let displays = info(&mut guest);
    assert_eq!(displays[0].r, rect(0, 0, 800, 600));
    assert_eq!((displays[0].enabled, displays[1].enabled), (1, 0));
    assert_eq!(guest.device.config().num_scanouts, 2);

    guest.device.hotplug(1, Some((640, 480))).unwrap();
    assert!(guest.device.hotplug(2, None).is_err());
    assert_eq!(guest.device.config().events_read, EVENT_DISPLAY);
    assert_eq!(info(&mut guest)[1].r, rect(800, 0, 640, 480));
    // As the transport writes it: all of the space, with one field changed.
    let mut config = guest.device.config();
    config.events_clear = EVENT_DISPLAY;
    let mut bytes = Vec::new();
    config.put(&mut |piece| bytes.extend_from_slice(piece));
    guest.device.write_config(0, &bytes);
    assert_eq!(guest.device.config().events_read, 0);
    assert!(guest.rules().is_empty());
    guest.device.write_config(8, &[9]);
    assert_eq!(guest.rules(), ["read-only-config"]);
}

#[test]
fn edid_is_well_formed() {
    let mut guest = Guest::with(Options {
        displays: vec![Some((1920, 1080)), Some((8192, 4320)), None],
        ..Options::default()
    });
    for scanout in 0..3 {
        let answer = guest.answer(Command::GetEdid { scanout });
        let Some((_, Response::Edid(edid))) = Response::decode(&answer.bytes) else {
            panic!("no EDID");
        };
        assert_eq!(edid.len(), 128);
        assert_eq!(edid.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)), 0);
        if scanout == 0 {
            let width = u32::from(edid[56]) | u32::from(edid[58] >> 4) << 8;
            let height = u32::from(edid[59]) | u32::from(edid[61] >> 4) << 8;
            assert_eq!((width, height), (1920, 1080));
            // 1920 pixels at 96 dots an inch: 508 millimetres.
            assert_eq!(edid[21], 50);
        } else {
            // Too large for a detailed timing, or no display.
            assert_eq!(edid[54..57], [0; 3]);
        }
    }
}

#[test]
fn fences_are_echoed() {
    let mut guest = Guest::new();
    let header = Header {
        flags: FLAG_FENCE,
        fence_id: 77,
        ctx_id: 3,
        ring_idx: 0,
    };
    let Outcome::Answer(answer) = guest.outcome(header, unref(1), Tail::None) else {
        panic!();
    };
    let (answered, response) = Response::decode(&answer.bytes).unwrap();
    assert_eq!(answered, header);
    assert_eq!(
        response,
        Response::Error(ResponseType::ErrInvalidResourceId)
    );
}

#[test]
fn uuids() {
    let mut guest = Guest::with(Options {
        uuid: true,
        ..Options::default()
    });
    guest.create(1, 1, 1);
    guest.create(2, 1, 1);
    let mut uuid = |resource_id| {
        let answer = guest.answer(Command::ResourceAssignUuid { resource_id });
        match Response::decode(&answer.bytes) {
            Some((_, Response::Uuid(uuid))) => uuid,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(uuid(1), uuid(1));
    assert_ne!(uuid(1), uuid(2));
}

#[test]
fn guest_blobs() {
    let mut guest = Guest::with(Options {
        blob: true,
        blob_alignment: Some(4096),
        freezing: Some(6),
        ..Options::default()
    });
    assert_eq!(guest.device.config().blob_alignment, 4096);
    assert_eq!(guest.blob(1, 4096, &[(0x1000, 4096)]), OK);
    let show = |width, height, stride, offset| Command::SetScanoutBlob {
        r: rect(0, 0, width, height),
        scanout_id: 0,
        resource_id: 1,
        width,
        height,
        format: BGRX,
        padding: 0,
        strides: [stride, 0, 0, 0],
        offsets: [offset, 0, 0, 0],
    };
    assert_eq!(guest.send(show(16, 16, 256, 0)), OK);
    assert_eq!(guest.send(show(16, 16, 128, 0)), OK);
    let shown = |guest: &Guest| guest.device.state()["scanouts"][0]["checksum"].clone();
    let before = shown(&guest);
    // No transfer: the guest's memory is the resource.
    guest
        .mem
        .write_slice(&[0x55; 4096], GuestAddress(0x1000))
        .unwrap();
    assert_eq!(guest.send(flush(1, rect(0, 0, 16, 16))), OK);
    assert_ne!(shown(&guest), before);
    assert!(guest.rules().is_empty());

    for (command, rule) in [
        (show(16, 16, 60, 0), "stride"),
        (show(16, 16, 256, 256), "past-backing"),
        (show(16, 16, u32::MAX, u32::MAX), "past-backing"),
        (show(16, 0, 256, 0), "empty-rectangle"),
        (scanout(0, 1, rect(0, 0, 1, 1)), "blob"),
    ] {
        guest.device.record.violations.clear();
        assert_eq!(guest.send(command), ResponseType::ErrInvalidParameter);
        assert_eq!(guest.rules(), [rule]);
    }
    guest.device.record.violations.clear();
    guest.blob(2, 4097, &[(0x1000, 4097)]);
    guest.blob(3, 8192, &[(0x1000, 4096)]);
    guest.blob(4, 4096, &[]);
    assert_eq!(
        guest.rules(),
        ["blob-alignment", "past-backing", "blob-entries"]
    );
}

#[test]
fn host_visible_blobs() {
    let mut guest = Guest::with(Options {
        blob: true,
        virgl: true,
        context_init: true,
        capsets: vec!["4:0:160".parse::<Capset>().unwrap()],
        host_visible: 1 << 20,
        ..Options::default()
    });
    let header = Header {
        ctx_id: 1,
        ..Header::default()
    };
    let context = |context_init| Command::CtxCreate {
        nlen: 0,
        context_init,
        debug_name: [0; 64],
    };
    assert_eq!(guest.send_with(header, context(4)), OK);
    assert_eq!(
        guest.send_with(header, context(4)),
        ResponseType::ErrInvalidContextId
    );
    let create = |resource_id| Command::ResourceCreateBlob {
        resource_id,
        blob_mem: BLOB_MEM_HOST3D,
        blob_flags: BLOB_FLAG_USE_MAPPABLE,
        nr_entries: 0,
        blob_id: 1,
        size: 0x10000,
    };
    assert_eq!(guest.send_with(header, create(1)), OK);
    assert_eq!(guest.send_with(header, create(2)), OK);
    assert_eq!(guest.send(create(3)), ResponseType::ErrInvalidContextId);
    guest.device.record.violations.clear();

    let map = |resource_id, offset| Command::ResourceMapBlob {
        resource_id,
        padding: 0,
        offset,
    };
    let Outcome::Map(work, unfinished) = guest.outcome(header, map(1, 0x8000), Tail::None) else {
        panic!("not mapped");
    };
    assert_eq!((work[0].offset, work[0].length), (0x8000, 0x10000));
    assert!(work[0].file.is_some());
    let answer = guest.device.mapped(&work, unfinished, true);
    assert_eq!(
        Response::decode(&answer.bytes).unwrap().1,
        Response::MapInfo(1)
    );
    for (command, rule) in [
        (map(1, 0), "mapped-twice"),
        (map(2, 0x10000), "overlap"),
        (map(2, 0xf1000), "outside"),
        (map(2, 1), "outside"),
        (map(2, u64::MAX - 4095), "outside"),
    ] {
        guest.device.record.violations.clear();
        assert_eq!(guest.send(command), ResponseType::ErrInvalidParameter);
        assert_eq!(guest.rules(), [rule]);
    }
    // A reset unmaps.
    guest.device.stop(0);
    let work = guest.device.start(0, false, 0);
    assert_eq!(work.len(), 1);
    assert!(work[0].file.is_none());
}

/// A reset loses everything; FREEZING keeps everything until FREEZING=0.
#[test]
fn freezing_keeps() {
    let mut guest = Guest::new();
    guest.show_picture();
    let picture = guest.device.state()["scanouts"][0].clone();
    guest.send(freezing(1));
    assert_eq!(guest.device.state()["power"], "frozen");
    guest.reset();
    assert_eq!(guest.device.state()["power"], "waking");
    assert_eq!(guest.device.state()["scanouts"][0], picture);
    // The guest may look what is left, in any way.
    guest.create_again(1);
    guest.send(unref(9));
    assert!(guest.rules().is_empty());
    assert_eq!(guest.send(freezing(0)), OK);
    assert_eq!(guest.device.state()["power"], "awake");
    assert_eq!(guest.ids(), [1]);
    guest.send(unref(9));
    assert_eq!(guest.rules(), ["unknown-resource"]);
    guest.reset();
    assert!(guest.ids().is_empty());
}

impl Guest {
    fn create_again(&mut self, resource_id: u32) {
        let answer = self.send(Command::ResourceCreate2d {
            resource_id,
            format: BGRX,
            width: 1,
            height: 1,
        });
        assert_eq!(answer, ResponseType::ErrInvalidResourceId);
    }
}

/// Any reset but the one of the suspend ends it.
#[test]
fn freezing_is_forgotten() {
    // A second reset before FREEZING=0.
    let mut guest = Guest::new();
    guest.show_picture();
    guest.send(freezing(1));
    guest.reset();
    guest.reset();
    assert_eq!(guest.device.state()["power"], "awake");
    assert!(guest.ids().is_empty());

    // A guest that does not know FREEZING.
    guest.show_picture();
    guest.send(freezing(1));
    guest.device.stop(0);
    guest.device.start(0, false, 0);
    assert!(guest.ids().is_empty());

    // A guest that does not know of anything to keep: FREEZING=0 is its first command.
    guest.reset();
    guest.show_picture();
    guest.send(freezing(1));
    guest.reset();
    assert_eq!(guest.ids(), [1]);
    assert_eq!(guest.send(freezing(0)), OK);
    assert!(guest.ids().is_empty());

    // A suspend that was aborted before the reset.
    guest.show_picture();
    guest.send(freezing(1));
    assert_eq!(guest.send(freezing(0)), OK);
    assert_eq!(guest.ids(), [1]);
    guest.reset();
    assert!(guest.ids().is_empty());
    assert!(guest.rules().is_empty());
}

#[test]
fn lenient_thaw_keeps() {
    let mut guest = Guest::with(Options {
        lenient_thaw: true,
        ..Options::default()
    });
    guest.show_picture();
    guest.send(freezing(1));
    guest.reset();
    assert_eq!(guest.send(freezing(0)), OK);
    assert_eq!(guest.ids(), [1]);
}

#[test]
fn nothing_is_drawn_while_frozen() {
    let mut guest = Guest::new();
    guest.show_picture();
    guest.send(freezing(1));
    guest.send(flush(1, rect(0, 0, 4, 2)));
    assert_eq!(guest.rules(), ["drawing-while-frozen"]);
    // A suspend that was called off.
    guest.device.record.violations.clear();
    guest.send(unref(1));
    guest.send(freezing(0));
    assert!(guest.rules().is_empty());
}

#[test]
fn conduct() {
    for (conduct, kept) in [
        ("refuse", false),
        ("late:2s", false),
        ("mute", false),
        ("drop-all", false),
        ("honest", true),
    ] {
        let mut guest = Guest::new();
        guest.device.set_conduct(conduct.parse().unwrap());
        guest.show_picture();
        guest.create(2, 4, 4);
        let answer = guest.answer(freezing(1));
        match conduct {
            "refuse" => assert_eq!(kind(&answer), ResponseType::ErrUnspec),
            "late:2s" => assert_eq!(answer.delay, Some(Duration::from_secs(2))),
            "mute" => assert_eq!(answer.delay, None),
            _ => {
                assert!(answer.promise);
                guest.device.promise();
            }
        }
        guest.reset();
        assert_eq!(!guest.ids().is_empty(), kept, "{conduct}");
        // Nothing that the guest believed is held against it.
        if conduct == "drop-all" {
            guest.send(flush(1, rect(0, 0, 4, 2)));
            guest.send(freezing(0));
            guest.send(flush(1, rect(0, 0, 4, 2)));
        }
        assert!(guest.rules().is_empty(), "{conduct}");
    }

    for (conduct, left) in [("drop-one", 1), ("drop-one:1", 2)] {
        let mut guest = Guest::new();
        guest.device.set_conduct(conduct.parse().unwrap());
        guest.show_picture();
        guest.create(2, 4, 4);
        guest.send(freezing(1));
        guest.reset();
        assert_eq!(guest.ids(), [left]);
        // Nor is the guest blamed for making anew what it thinks is gone.
        guest.send(unref(3 - left as u32));
        guest.send(freezing(0));
        guest.create_again(left as u32);
        guest.create(3 - left as u32, 4, 2);
        assert!(guest.rules().is_empty());
        guest.reset();
        guest.create(1, 4, 2);
        guest.create_again(1);
        assert_eq!(guest.rules(), ["resource-exists"]);
    }
    assert!("loyal".parse::<Conduct>().is_err());
}

/// FREEZING on another bit, or on none.
#[test]
fn freezing_bits() {
    let other = Options {
        freezing: Some(7),
        ..Options::default()
    };
    assert_eq!(other.features() & 0b1010_0000, 0b1000_0000);
    let mut guest = Guest::with(other);
    assert_eq!(guest.send(freezing(1)), OK);

    let mut guest = Guest::with(Options {
        freezing: None,
        ..Options::default()
    });
    assert_eq!(guest.send(freezing(0)), ResponseType::ErrUnspec);
    assert_eq!(guest.rules(), ["feature"]);

    let both = Options {
        blob: true,
        blob_alignment: Some(4096),
        ..Options::default()
    };
    assert!(both.check().is_err());
}

/// A virtual machine that was halted and goes on is not a guest that reset its device.
#[test]
fn a_halt_is_no_reset() {
    let mut guest = Guest::new();
    guest.show_picture();
    let features = guest.device.options().features();
    guest.device.stop(0);
    guest.device.start(features, true, 0);
    assert_eq!(guest.ids(), [1]);
}

#[test]
fn commands_before_driver_ok() {
    let mut guest = Guest::new();
    guest.device.stop(0);
    guest.device.start(0, false, 2);
    assert_eq!(guest.rules(), ["before-driver-ok"]);
}

#[test]
fn faults_spoil_answers() {
    let mut guest = Guest::new();
    guest.create(1, 4, 2);
    let mut spoilt = |rule: &str| {
        guest.device.faults.clear();
        let rule = format!("RESOURCE_FLUSH: {rule}");
        guest.device.faults.add(rule.parse().unwrap());
        guest.answer(flush(1, rect(0, 0, 4, 2)))
    };
    let answer = spoilt("error 0x1203");
    assert_eq!(kind(&answer), ResponseType::ErrInvalidResourceId);
    assert_eq!(spoilt("no answer").delay, None);
    assert_eq!(
        spoilt("answer after 2 s").delay,
        Some(Duration::from_secs(2))
    );
    assert_eq!(kind(&spoilt("wrong type")), ResponseType::OkDisplayInfo);
    let answer = spoilt("used length 3");
    assert_eq!((answer.used, answer.bytes.len()), (3, 3));
    assert_ne!(spoilt("wrong fence id").bytes[8..16], [0; 8]);
    assert_eq!(spoilt("token twice").times, 2);
    assert_eq!(spoilt("bad descriptor id").id, Some(None));
    assert_eq!(spoilt("bad descriptor id 9").id, Some(Some(9)));
    assert!(spoilt("open chain").open);
    assert_eq!(spoilt("garbage").bytes.len(), 2048);
    assert_eq!(guest.device.record.injected.len(), 11);
    assert_eq!(guest.device.record.counters["faults"], 11);
    assert!(guest.rules().is_empty());
}

/// A command that is refused by a fault is not carried out.
#[test]
fn an_error_does_nothing() {
    let mut guest = Guest::new();
    let rule = "1st RESOURCE_CREATE_2D: error 0x1201";
    guest.device.faults.add(rule.parse().unwrap());
    let create = Command::ResourceCreate2d {
        resource_id: 1,
        format: BGRX,
        width: 1,
        height: 1,
    };
    assert_eq!(guest.send(create), ResponseType::ErrOutOfMemory);
    assert!(guest.ids().is_empty());
    assert_eq!(guest.send(create), OK);
}

/// An answer that comes after the guest awoke is no promise either.
#[test]
fn a_promise_can_be_too_late() {
    let mut guest = Guest::new();
    guest.device.set_conduct("late:2s".parse().unwrap());
    guest.show_picture();
    assert!(guest.answer(freezing(1)).promise);
    guest.send(freezing(0));
    guest.device.promise();
    assert_eq!(guest.device.state()["power"], "awake");
}

/// A guest that has had no answer may look what is there, as long as it has not said that it is awake.
#[test]
fn who_had_no_answer_may_look() {
    let mut guest = Guest::new();
    guest.device.set_conduct("mute".parse().unwrap());
    guest.show_picture();
    guest.answer(freezing(1));
    guest.reset();
    guest.send(unref(1));
    assert!(guest.rules().is_empty());
    guest.send(freezing(0));
    guest.send(unref(1));
    assert_eq!(guest.rules(), ["unknown-resource"]);
}

/// A spoilt answer to FREEZING=1 is no promise.
#[test]
fn a_spoilt_promise_is_none() {
    for fault in ["wrong type", "no answer", "token twice", "used length 3"] {
        let mut guest = Guest::new();
        let rule = format!("STATUS_FREEZING: {fault}");
        guest.device.faults.add(rule.parse().unwrap());
        let answer = guest.answer(freezing(1));
        assert!(!answer.promise, "{fault}");
    }
}

#[test]
fn the_record_has_every_command() {
    let mut guest = Guest::new();
    guest.show_picture();
    guest.send(unref(9));
    let bytes = guest.lines.0.lock().unwrap().clone();
    let lines: Vec<Value> = String::from_utf8(bytes)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let commands: Vec<&str> = lines
        .iter()
        .filter(|line| line["event"] == "command")
        .map(|line| line["command"].as_str().unwrap())
        .collect();
    assert_eq!(
        commands,
        [
            "RESOURCE_CREATE_2D",
            "RESOURCE_ATTACH_BACKING",
            "TRANSFER_TO_HOST_2D",
            "SET_SCANOUT",
            "RESOURCE_FLUSH",
            "RESOURCE_UNREF",
        ]
    );
    let last = lines.last().unwrap();
    assert_eq!(last["args"]["resource_id"], 9);
    assert_eq!(last["response"], "ERR_INVALID_RESOURCE_ID");
    assert_eq!(last["violations"][0], "resource 9 does not exist");
    assert!(last["t"].is_number() && last["kick"] == 1);
}

/// Whatever comes, with every feature on: no panic, and an answer that fits.
#[test]
fn random_commands() {
    let mut random = virtgpu_host::fault::Random::new(1);
    let mut guest = Guest::with(Options {
        displays: vec![Some((u32::MAX, 64)); 2],
        uuid: true,
        blob: true,
        virgl: true,
        context_init: true,
        host_visible: 1 << 20,
        ..Options::default()
    });
    for round in 0..50_000 {
        let (kind, _) = Command::ALL[random.below(Command::ALL.len() as u64) as usize];
        let size = Command::size(kind).unwrap() + random.below(3) as usize * 16;
        // Small numbers, so that some of them mean something.
        let mut bytes: Vec<u8> = (0..size)
            .map(|at| match at % 4 {
                0 => random.below(9) as u8,
                1 => [0, 0, 0, 0x10][random.below(4) as usize],
                _ if random.below(40) == 0 => random.number() as u8,
                _ => 0,
            })
            .collect();
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        let queue = match random.below(8) {
            0 => QueueKind::Cursor,
            _ => QueueKind::Control,
        };
        let capacity = random.below(1100) as usize;
        let outcome = guest.raw(queue, &bytes, capacity);
        let answer = match outcome {
            Outcome::Answer(answer) => answer,
            Outcome::Map(work, unfinished) => {
                let made = random.below(2) == 0;
                guest.device.mapped(&work, unfinished, made)
            }
        };
        assert!(answer.bytes.len() <= capacity);
        if answer.promise {
            guest.device.promise();
        }
        if round % 1000 == 0 {
            guest.reset();
            guest.device.record.violations.clear();
            guest.lines.0.lock().unwrap().clear();
        }
    }
}
