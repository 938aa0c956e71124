// SPDX-License-Identifier: GPL-2.0

//! What can be checked from within a guest. Whether a picture is on a screen cannot: the host's part looks at that.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};
use drm::Device as _;
use drm::buffer::{
    Buffer as _,
    DrmFourcc, //
};
use drm::control::Device as _;
use rustix::io::Errno;

use crate::card::Card;
use crate::client::Client;
use crate::ktap::{
    Check,
    Outcome, //
};

/// Every check, in the order in which they run.
pub const ALL: &[Check] = &[
    Check {
        name: "identity",
        run: identity,
    },
    Check {
        name: "dumb",
        run: dumb,
    },
    Check {
        name: "addfb_bad",
        run: addfb_bad,
    },
    Check {
        name: "modes",
        run: modes,
    },
    Check {
        name: "flip_rate",
        run: flip_rate,
    },
    Check {
        name: "dirtyfb",
        run: dirtyfb,
    },
    Check {
        name: "console",
        run: console,
    },
    Check {
        name: "suspend_devices",
        run: suspend_devices,
    },
];

/// How many flips are timed.
const FLIPS: u32 = 60;

/// How far the rate of flips may be from the mode's.
const RATE_TOLERANCE: f64 = 0.01;

fn passed(remark: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Passed(remark.into()))
}

/// User space knows the driver by these.
fn identity() -> Result<Outcome> {
    let card = Card::open()?;
    ensure!(
        card.version()? == [0, 1, 0],
        "the version is {:?}",
        card.version()?
    );
    let description = card
        .get_driver()?
        .description()
        .to_string_lossy()
        .into_owned();
    ensure!(
        description == "virtio GPU",
        "the description is '{description}'"
    );

    let info = card.info()?;
    for (number, output) in (1..).zip(&info.outputs) {
        ensure!(
            output.name == format!("Virtual-{number}"),
            "connector {number} is {}",
            output.name
        );
    }
    for file in [
        "virtio-gpu-features",
        "virtio-gpu-irq-fence",
        "virtio-gpu-host-visible-mm",
    ] {
        let path = format!("/sys/kernel/debug/dri/0/{file}");
        fs::read_to_string(&path).with_context(|| path)?;
    }
    passed(format!("{} outputs", info.outputs.len()))
}

/// A dumb buffer keeps what is written to it.
fn dumb() -> Result<Outcome> {
    let card = Card::open()?;
    let mut buffer = card.create_dumb_buffer((1024, 768), DrmFourcc::Xrgb8888, 32)?;
    ensure!(buffer.pitch() == 4096, "the pitch is {}", buffer.pitch());
    card.draw(&mut buffer, 1, [0, 0, 1024, 768])?;
    {
        let map = card.map_dumb_buffer(&mut buffer)?;
        ensure!(map.len() == 4096 * 768, "{} bytes are mapped", map.len());
        let last = map.last_chunk().expect("the buffer is not empty");
        let last = u32::from_le_bytes(*last);
        let expected = virtgpu_guest::picture::pixel(1, 1023, 767);
        ensure!(
            last == expected,
            "the last pixel is {last:#x} instead of {expected:#x}"
        );
    }
    card.destroy_dumb_buffer(buffer)?;
    passed("")
}

/// A framebuffer that reaches beyond its buffer must not come into being.
fn addfb_bad() -> Result<Outcome> {
    const WIDTH: u32 = 640;
    const HEIGHT: u32 = 480;
    const PITCH: u32 = WIDTH * 4;
    // A whole number of pages, so that the allocation has nothing to spare.
    const SIZE: u32 = PITCH * HEIGHT;

    let card = Card::open()?;
    let buffer = card.create_dumb_buffer((WIDTH, HEIGHT), DrmFourcc::Xrgb8888, 32)?;
    let add = |width, height, pitch, offset| -> io::Result<u32> {
        let handles = [buffer.handle().into(), 0, 0, 0];
        let format = DrmFourcc::Xrgb8888 as u32;
        let (pitches, offsets) = ([pitch, 0, 0, 0], [offset, 0, 0, 0]);
        drm_ffi::mode::add_fb2(
            card.as_fd(),
            width,
            height,
            format,
            &handles,
            &pitches,
            &offsets,
            &[0; 4],
            0,
        )
        .map(|framebuffer| framebuffer.fb_id)
    };
    let good = add(WIDTH, HEIGHT, PITCH, 0).context("the framebuffer that fits")?;
    drm_ffi::mode::rm_fb(card.as_fd(), good)?;

    let mut wrong = Vec::new();
    for (what, width, height, pitch, offset) in [
        ("one row too many", WIDTH, HEIGHT + 1, PITCH, 0),
        (
            "twice the width at twice the pitch",
            2 * WIDTH,
            HEIGHT,
            2 * PITCH,
            0,
        ),
        ("a pitch below the width", WIDTH, HEIGHT, PITCH - 4, 0),
        ("an offset without a row less", WIDTH, HEIGHT, PITCH, PITCH),
        ("an offset at the end", WIDTH, 1, PITCH, SIZE),
        ("an offset past the end", WIDTH, 1, PITCH, SIZE + PITCH),
        (
            "an offset near 4 GiB",
            WIDTH,
            1,
            PITCH,
            0u32.wrapping_sub(2 * PITCH),
        ),
    ] {
        match add(width, height, pitch, offset) {
            Ok(id) => {
                drm_ffi::mode::rm_fb(card.as_fd(), id)?;
                wrong.push(format!("{what}: accepted"));
            }
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
            Err(error) => wrong.push(format!("{what}: {error}")),
        }
    }
    card.destroy_dumb_buffer(buffer)?;
    ensure!(
        wrong.is_empty(),
        "not refused as invalid: {}",
        wrong.join(", ")
    );
    passed("")
}

/// Every mode that the first output offers can be set.
fn modes() -> Result<Outcome> {
    let info = Card::open()?.info()?;
    let output = info.outputs.iter().find(|output| output.connected);
    let output = output.context("no connector is connected")?;
    let mut sizes: Vec<_> = output
        .modes
        .iter()
        .map(|mode| (mode.width, mode.height))
        .collect();
    sizes.sort();
    sizes.dedup();
    for &(width, height) in &sizes {
        let size = Some((width as u16, height as u16));
        let client =
            Client::new(Card::open()?, 1, size).with_context(|| format!("{width}x{height}"))?;
        client.end()?;
    }
    passed(format!("{} sizes", sizes.len()))
}

/// Flips with an event come at the mode's rate.
fn flip_rate() -> Result<Outcome> {
    let mut client = Client::new(Card::open()?, 1, None)?;
    let mode = client.mode();
    let total = u32::from(mode.hsync().2) * u32::from(mode.vsync().2);
    let expected = f64::from(mode.clock()) * 1000.0 / f64::from(total);

    let start = client.flip()?;
    let mut end = Duration::ZERO;
    for _ in 0..FLIPS {
        end = client.flip()?;
    }
    client.end()?;
    let time = end
        .checked_sub(start)
        .context("the events' times run backwards")?;
    let rate = f64::from(FLIPS) / time.as_secs_f64();
    ensure!(
        (rate / expected - 1.0).abs() < RATE_TOLERANCE,
        "{rate:.2} flips a second instead of {expected:.2}"
    );
    passed(format!(
        "{rate:.2} flips a second, the mode has {expected:.2}"
    ))
}

/// Parts of a framebuffer can be declared dirty, down to a pixel in the corner.
fn dirtyfb() -> Result<Outcome> {
    let mut client = Client::new(Card::open()?, 1, None)?;
    let (width, height) = client.mode().size();
    client.draw_and_show_part(2, [width / 4, height / 4, width / 2, height / 2])?;
    client.draw_and_show_part(3, [width - 1, height - 1, 1, 1])?;
    client.end()?;
    passed("")
}

/// What is written to the console reaches the framebuffer that is shown when no client is there.
fn console() -> Result<Outcome> {
    let shown = || -> Result<_> {
        Card::open()?
            .shown()?
            .into_iter()
            .next()
            .context("nothing is shown")
    };
    if !has_framebuffer_console()? {
        return Ok(Outcome::Skipped("there is no framebuffer console".into()));
    }
    // No blinking cursor, so that nothing changes but by us.
    fs::write("/dev/tty1", "\x1b[?25l\x1b[2J\x1b[H")?;
    let before = shown()?;
    fs::write("/dev/tty1", "virtgpu selftest\n")?;
    ensure!(shown()? != before, "the text is not in the framebuffer");
    passed("")
}

fn has_framebuffer_console() -> Result<bool> {
    for console in fs::read_dir("/sys/class/vtconsole")? {
        let console = console?.path();
        let name = fs::read_to_string(console.join("name"))?;
        let bound = fs::read_to_string(console.join("bind"))?;
        if name.contains("frame buffer") && bound.trim() == "1" {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The devices are suspended and resumed while a client is there, and it goes on as if nothing had been.
fn suspend_devices() -> Result<Outcome> {
    const LEVEL: &str = "/sys/power/pm_test";

    if !fs::exists(LEVEL)? {
        return Ok(Outcome::Skipped("the kernel has no CONFIG_PM_DEBUG".into()));
    }
    let mut client = Client::new(Card::open()?, 1, None)?;
    client.flip()?;
    let log = KernelLog::open()?;
    fs::write(LEVEL, "devices")?;
    let result = fs::write("/sys/power/state", "mem");
    fs::write(LEVEL, "none")?;
    result.context("the suspend failed")?;
    for _ in 0..5 {
        client.flip()?;
    }
    client.card().info()?;
    client.end()?;
    let faults = log.faults()?;
    ensure!(
        faults.is_empty(),
        "in the kernel's log: {}",
        faults.join("; ")
    );
    passed("")
}

/// The kernel's log from some moment on.
struct KernelLog(fs::File);

impl KernelLog {
    fn open() -> Result<Self> {
        use rustix::fs::{
            SeekFrom,
            seek, //
        };
        use std::os::unix::fs::OpenOptionsExt;

        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = fs::File::options()
            .read(true)
            .custom_flags(nonblocking)
            .open("/dev/kmsg")?;
        seek(&file, SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// Returns the records at level warning or above, which a driver that works has no reason to write.
    fn faults(mut self) -> Result<Vec<String>> {
        use std::io::Read;

        const WARNING: u32 = 4;
        const LEVELS: u32 = 8;
        let mut faults = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(faults),
                Ok(length) => {
                    let record = String::from_utf8_lossy(&record[..length]).into_owned();
                    let (head, text) = record.split_once(';').context("a record without text")?;
                    let priority = head
                        .split(',')
                        .next()
                        .and_then(|word| word.parse::<u32>().ok());
                    let level = priority.context("a record without priority")? % LEVELS;
                    let text = text.lines().next().unwrap_or_default();
                    if level <= WARNING && text.contains("gpu") {
                        faults.push(text.to_owned());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(faults),
                Err(error) => bail!(error),
            }
        }
    }
}
