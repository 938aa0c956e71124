// SPDX-License-Identifier: GPL-2.0

//! The program itself, behind a vhost-user front-end made of the `vhost` crate: virtqueues,
//! interrupts, late and wrong answers, resets, hotplug.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command as Process};
use std::time::{Duration, Instant};

use serde_json::Value;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtgpu_host::control;
use virtio_gpu_protocol::{
    Command, Config, Header, Request, Response, ResponseType, Tail, Wire, EVENT_DISPLAY,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::tempfile::TempFile;

const MEMORY: usize = 1 << 20;
const ENTRIES: u16 = 16;
const OK: ResponseType = ResponseType::OkNoData;

/// A virtqueue as its driver sees it: descriptors, available and used ring, then the buffers.
struct Queue {
    base: u64,
    avail: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
}

/// A guest that is made of virtqueues only, and the host as a child.
struct Guest {
    host: Child,
    directory: PathBuf,
    frontend: Option<Frontend>,
    channel: UnixStream,
    mem: GuestMemoryMmap,
    queues: Vec<Queue>,
}

fn wait_for<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = what() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for Guest {
    /// A test that fails leaves no host behind.
    fn drop(&mut self) {
        let _ = self.host.kill();
        let _ = self.host.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Guest {
    fn new(name: &str, options: &[&str]) -> Self {
        let directory = std::env::temp_dir().join(format!("vgh-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let host = Process::new(env!("CARGO_BIN_EXE_virtgpu-host"))
            .args(["--features", "edid", "--strict"])
            .arg("--socket")
            .arg(directory.join("socket"))
            .arg("--control")
            .arg(directory.join("control"))
            .arg("--record")
            .arg(directory.join("record"))
            .args(options)
            .spawn()
            .unwrap();

        let file = TempFile::new().unwrap().into_file();
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let mem = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();

        let mut frontend =
            wait_for(|| Frontend::connect(directory.join("socket").to_str().unwrap(), 2).ok());
        frontend.set_owner().unwrap();
        frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::BACKEND_REQ;
        assert!(protocol.contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        let (channel, theirs) = UnixStream::pair().unwrap();
        frontend
            .set_backend_request_fd(&OwnedFd::from(theirs))
            .unwrap();

        let mut guest = Self {
            host,
            directory,
            frontend: Some(frontend),
            channel,
            mem,
            queues: Vec::new(),
        };
        guest.start(0);
        guest
    }

    fn frontend(&mut self) -> &mut Frontend {
        self.frontend.as_mut().unwrap()
    }

    /// DRIVER_OK, with so many commands queued too early.
    fn start(&mut self, early: u16) {
        let offered = self.frontend().get_features().unwrap();
        self.frontend().set_features(offered).unwrap();
        let region = self.mem.iter().next().unwrap();
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        self.frontend().set_mem_table(&[info]).unwrap();
        self.queues.clear();
        for number in 0..2 {
            let queue = Queue {
                base: number as u64 * 0x10000,
                avail: early,
                used: 0,
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
            };
            let zero = [0u8; 0x3000];
            self.mem
                .write_slice(&zero, GuestAddress(queue.base))
                .unwrap();
            let index = GuestAddress(queue.base + 0x1002);
            self.mem.write_obj(early, index).unwrap();
            let host = |offset| {
                let address = GuestAddress(queue.base + offset);
                self.mem.get_host_address(address).unwrap() as u64
            };
            let config = VringConfigData {
                queue_max_size: ENTRIES,
                queue_size: ENTRIES,
                flags: 0,
                desc_table_addr: host(0),
                avail_ring_addr: host(0x1000),
                used_ring_addr: host(0x2000),
                log_addr: None,
            };
            self.frontend().set_vring_num(number, ENTRIES).unwrap();
            self.frontend().set_vring_base(number, 0).unwrap();
            self.frontend().set_vring_addr(number, &config).unwrap();
            self.frontend().set_vring_call(number, &queue.call).unwrap();
            self.frontend().set_vring_kick(number, &queue.kick).unwrap();
            self.queues.push(queue);
        }
        for number in 0..2 {
            self.frontend().set_vring_enable(number, true).unwrap();
        }
        // An answer to this means that all of that was read.
        self.frontend().get_features().unwrap();
    }

    fn stop(&mut self) {
        for number in 0..2 {
            self.frontend().set_vring_enable(number, false).unwrap();
            self.frontend().get_vring_base(number).unwrap();
        }
    }

    fn reset(&mut self) {
        self.stop();
        self.start(0);
    }

    /// Puts a command into slot `slot` of the control queue, and notifies.
    fn post(&mut self, slot: u16, command: Command) {
        let queue = &mut self.queues[0];
        let buffer = queue.base + 0x4000 + u64::from(slot) * 0x1000;
        let request = Request {
            header: Header::default(),
            command,
            tail: Tail::None,
        };
        let mut bytes = Vec::new();
        request.encode(&mut |piece| bytes.extend_from_slice(piece));
        let mem = &self.mem;
        mem.write_slice(&bytes, GuestAddress(buffer)).unwrap();
        mem.write_slice(&[0xee; 0x800], GuestAddress(buffer + 0x800))
            .unwrap();
        // Two descriptors: the command, then the answer.
        let describe = |number: u16, address: u64, length: u32, flags: u16, next: u16| {
            let place = GuestAddress(queue.base + u64::from(number) * 16);
            let first = [address, u64::from(length)];
            let second = u64::from(flags) << 32 | u64::from(next) << 48;
            mem.write_obj(first[0], place).unwrap();
            mem.write_obj(first[1] | second, GuestAddress(place.0 + 8))
                .unwrap();
        };
        describe(slot * 2, buffer, bytes.len() as u32, 1, slot * 2 + 1);
        describe(slot * 2 + 1, buffer + 0x800, 0x800, 2, 0);
        let entry = queue.base + 0x1004 + u64::from(queue.avail % ENTRIES) * 2;
        mem.write_obj(slot * 2, GuestAddress(entry)).unwrap();
        queue.avail += 1;
        mem.store(
            queue.avail,
            GuestAddress(queue.base + 0x1002),
            std::sync::atomic::Ordering::Release,
        )
        .unwrap();
        queue.kick.write(1).unwrap();
    }

    /// The next entry of the used ring, if there is one: id and length.
    fn next_used(&mut self) -> Option<(u32, u32)> {
        let queue = &mut self.queues[0];
        let index: u16 = self
            .mem
            .load(
                GuestAddress(queue.base + 0x2002),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap();
        if index == queue.used {
            return None;
        }
        let place = queue.base + 0x2004 + u64::from(queue.used % ENTRIES) * 8;
        queue.used += 1;
        let entry: u64 = self.mem.read_obj(GuestAddress(place)).unwrap();
        Some((entry as u32, (entry >> 32) as u32))
    }

    /// The answer in a slot.
    fn answer(&self, slot: u16) -> Vec<u8> {
        let buffer = self.queues[0].base + 0x4800 + u64::from(slot) * 0x1000;
        let mut bytes = vec![0; 0x800];
        self.mem
            .read_slice(&mut bytes, GuestAddress(buffer))
            .unwrap();
        bytes
    }

    /// Sends a command and waits for its answer.
    fn send(&mut self, command: Command) -> ResponseType {
        self.post(0, command);
        let (id, length) = wait_for(|| self.next_used());
        assert_eq!(id, 0);
        let bytes = self.answer(0);
        let (_, response) = Response::decode(&bytes[..length as usize]).unwrap();
        response.response_type()
    }

    fn create(&mut self, resource_id: u32) -> ResponseType {
        self.send(Command::ResourceCreate2d {
            resource_id,
            format: 2,
            width: 16,
            height: 16,
        })
    }

    fn ctl(&self, line: &str) -> Value {
        control::ask(&self.directory.join("control"), line).unwrap()
    }

    fn resources(&self) -> usize {
        self.ctl("state")["resources"].as_array().unwrap().len()
    }

    fn rules(&self) -> Vec<String> {
        let violations = self.ctl("violations");
        let rules = violations.as_array().unwrap().iter();
        rules
            .map(|violation| violation["rule"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Hangs up, and returns the host's exit status and its record.
    fn end(mut self) -> (Option<i32>, String) {
        self.frontend = None;
        let status = wait_for(|| self.host.try_wait().unwrap());
        let mut record = String::new();
        File::open(self.directory.join("record"))
            .unwrap()
            .read_to_string(&mut record)
            .unwrap();
        (status.code(), record)
    }
}

#[test]
fn commands_and_interrupts() {
    let mut guest = Guest::new("commands", &[]);
    assert_eq!(
        guest.send(Command::GetDisplayInfo {}),
        ResponseType::OkDisplayInfo
    );
    assert_eq!(wait_for(|| guest.queues[0].call.read().ok()), 1);
    assert_eq!(guest.create(1), OK);
    // Several at once, and the ring goes round.
    for _ in 0..8 {
        for slot in 0..7 {
            guest.post(slot, Command::GetEdid { scanout: 0 });
        }
        let mut ids: Vec<u32> = (0..7).map(|_| wait_for(|| guest.next_used()).0).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 2, 4, 6, 8, 10, 12]);
    }
    let counters = guest.ctl("counters");
    assert_eq!(counters["GET_EDID"], 56);
    assert_eq!(counters["kicks_control"], 58);
    assert!(guest.ctl("nonsense").get("error").is_some());
    let (status, record) = guest.end();
    assert_eq!(status, Some(0));
    let last: Value = serde_json::from_str(record.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "end");
}

#[test]
fn faults_reach_the_ring() {
    let mut guest = Guest::new("faults", &["--fault", "1st GET_EDID: answer after 300 ms"]);
    let edid = Command::GetEdid { scanout: 0 };
    let info = Command::GetDisplayInfo {};
    let start = Instant::now();
    guest.post(0, edid);
    guest.post(1, info);
    // The second one overtakes.
    assert_eq!(wait_for(|| guest.next_used()).0, 2);
    assert_eq!(wait_for(|| guest.next_used()).0, 0);
    assert!(start.elapsed() >= Duration::from_millis(300));

    guest.ctl("fault GET_EDID: answer after 600 s");
    guest.post(0, edid);
    guest.post(1, info);
    assert_eq!(wait_for(|| guest.next_used()).0, 2);
    assert_eq!(guest.next_used(), None);
    assert_eq!(guest.ctl("answer-now"), 1);
    assert_eq!(wait_for(|| guest.next_used()).0, 0);
    assert_eq!(guest.ctl("answer-now"), 0);
    guest.ctl("clear");

    guest.ctl("fault GET_EDID: token twice");
    guest.post(0, edid);
    assert_eq!(wait_for(|| guest.next_used()).0, 0);
    assert_eq!(wait_for(|| guest.next_used()).0, 0);
    guest.ctl("clear");

    guest.ctl("fault GET_EDID: bad descriptor id 70000");
    guest.post(0, edid);
    assert_eq!(wait_for(|| guest.next_used()).0, 70000);
    guest.ctl("clear");

    guest.ctl("fault GET_EDID: open chain");
    guest.post(0, edid);
    assert_eq!(wait_for(|| guest.next_used()).0, 0);
    let flags = |descriptor: u64| -> u16 {
        let place = guest.queues[0].base + descriptor * 16 + 12;
        guest.mem.read_obj(GuestAddress(place)).unwrap()
    };
    assert_eq!((flags(0), flags(1)), (1, 2 | 1));
    guest.ctl("clear");

    guest.ctl("fault GET_EDID: used length 3");
    guest.post(0, edid);
    assert_eq!(wait_for(|| guest.next_used()), (0, 3));
    assert_eq!(guest.answer(0)[..4], [4, 0x11, 0, 0xee]);
    guest.ctl("clear");

    guest.ctl("fault GET_EDID: no answer");
    guest.post(0, edid);
    guest.post(1, info);
    assert_eq!(wait_for(|| guest.next_used()).0, 2);
    assert_eq!(guest.next_used(), None);
    assert_eq!(guest.ctl("faults").as_array().unwrap().len(), 7);
    assert!(guest.rules().is_empty());
    // What is not answered is not answered after the reset either.
    guest.ctl("clear");
    guest.reset();
    assert_eq!(guest.send(info), ResponseType::OkDisplayInfo);
    guest.end();
}

#[test]
fn resets_and_freezing() {
    let mut guest = Guest::new("freezing", &[]);
    let freezing = |freezing| Command::StatusFreezing { freezing };
    assert_eq!(guest.create(1), OK);
    guest.reset();
    // The reset shows with the first command after it.
    assert_eq!(guest.create(1), OK);
    assert_eq!(guest.send(freezing(1)), OK);
    assert_eq!(guest.ctl("state")["power"], "frozen");
    guest.reset();
    assert_eq!(guest.create(1), ResponseType::ErrInvalidResourceId);
    assert_eq!(guest.send(freezing(0)), OK);
    assert_eq!(guest.resources(), 1);

    // A promise that was not given in time is none.
    guest.ctl("freezing late:10s");
    guest.post(0, freezing(1));
    assert_eq!(guest.ctl("state")["power"], "awake");
    wait_for(|| (guest.ctl("counters")["STATUS_FREEZING"] == 3).then_some(()));
    guest.reset();
    assert_eq!(guest.send(freezing(0)), OK);
    assert_eq!(guest.resources(), 0);
    assert!(guest.rules().is_empty());
    let (status, record) = guest.end();
    assert_eq!(status, Some(0));
    assert_eq!(record.matches("\"kept\":true").count(), 1);
}

#[test]
fn violations_of_the_ring() {
    let mut guest = Guest::new("ring", &[]);
    guest.stop();
    guest.start(2);
    wait_for(|| {
        guest
            .rules()
            .contains(&"before-driver-ok".into())
            .then_some(())
    });
    guest.reset();
    assert_eq!(guest.create(1), OK);
    // An index that is further ahead than the queue is long.
    guest.queues[0].avail += 100;
    guest.post(0, Command::GetDisplayInfo {});
    wait_for(|| guest.rules().contains(&"ring".into()).then_some(()));
    let (status, _) = guest.end();
    assert_eq!(status, Some(3));
}

#[test]
fn hotplug_interrupts() {
    let mut guest = Guest::new("hotplug", &["--display", "1024x768", "--display", "off"]);
    assert_eq!(guest.ctl("hotplug 1 640x480")["ok"], true);
    let mut message = [0; 12];
    guest.channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let size = Config::SIZE as u32;
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, bytes) = guest
        .frontend()
        .get_config(0, size, flags, &[0; Config::SIZE])
        .unwrap();
    let mut config = Config::get(&bytes).unwrap();
    assert_eq!(
        (config.events_read, config.num_scanouts),
        (EVENT_DISPLAY, 2)
    );
    config.events_clear = EVENT_DISPLAY;
    let mut bytes = Vec::new();
    config.put(&mut |piece| bytes.extend_from_slice(piece));
    guest.frontend().set_config(0, flags, &bytes).unwrap();
    wait_for(|| (guest.ctl("state")["events_read"] == 0).then_some(()));
    guest.end();
}
