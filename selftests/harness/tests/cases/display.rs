// SPDX-License-Identifier: GPL-2.0

//! What is drawn is on the screen.

use anyhow::{
    Context,
    Result,
    ensure, //
};
use image::{
    Rgb,
    RgbImage,
    imageops, //
};
use libtest_mimic::Trial;
use virtgpu_lab::case::{
    Case,
    trial, //
};
use virtgpu_lab::client::Client;
use virtgpu_lab::console::Console;
use virtgpu_lab::host::{
    after_mark,
    commands, //
};
use virtgpu_lab::screen;
use virtgpu_lab::suspend::Sleep;
use virtgpu_lab::vm::Machine;

/// Modes from small to large; some have rows whose length in bytes is no multiple of 64.
const MODES: [(u32, u32); 10] = [
    (640, 480),
    (800, 600),
    (1024, 768),
    (1280, 1024),
    (1400, 1050),
    (1680, 1050),
    (1920, 1080),
    (2560, 1080),
    (3840, 2160),
    (4096, 2160),
];

/// What the device offers first.
const PREFERRED: (u32, u32) = (1280, 800);

pub fn trials() -> Vec<Trial> {
    let modes = MODES.iter().map(|&(width, height)| {
        trial(
            format!("display::modetest::{width}x{height}"),
            move |case| modetest(case, width, height),
        )
    });
    let others = [
        trial("display::flips_are_visible", flips_are_visible),
        trial("display::flip_rate", flip_rate),
        trial("display::dirty_rectangle", dirty_rectangle),
        trial("display::console", console),
        trial("display::console_returns", console_returns),
        trial("display::framebuffer_device", framebuffer_device),
        trial("display::two_outputs", two_outputs),
        trial("display::dpms", dpms),
    ];
    modes.chain(others).collect()
}

/// The picture that modetest draws by default: colour bars after SMPTE, a row of castellations, and a row of tests.
fn smpte(width: u32, height: u32) -> RgbImage {
    const GREY: [u8; 3] = [192, 192, 192];
    const YELLOW: [u8; 3] = [192, 192, 0];
    const CYAN: [u8; 3] = [0, 192, 192];
    const GREEN: [u8; 3] = [0, 192, 0];
    const MAGENTA: [u8; 3] = [192, 0, 192];
    const RED: [u8; 3] = [192, 0, 0];
    const BLUE: [u8; 3] = [0, 0, 192];
    const BLACK: [u8; 3] = [19, 19, 19];
    const TOP: [[u8; 3]; 7] = [GREY, YELLOW, CYAN, GREEN, MAGENTA, RED, BLUE];
    const MIDDLE: [[u8; 3]; 7] = [BLUE, BLACK, MAGENTA, BLACK, CYAN, BLACK, GREY];
    const WIDE: [[u8; 3]; 4] = [[0, 33, 76], [255, 255, 255], [50, 0, 106], BLACK];
    // The last one comes from rounding.
    const NARROW: [[u8; 3]; 4] = [[9, 9, 9], BLACK, [29, 29, 29], BLACK];

    RgbImage::from_fn(width, height, |x, y| {
        Rgb(if y < height * 6 / 9 {
            TOP[(x * 7 / width) as usize]
        } else if y < height * 7 / 9 {
            MIDDLE[(x * 7 / width) as usize]
        } else if x < width * 5 / 7 {
            WIDE[(x * 4 / (width * 5 / 7)) as usize]
        } else if x < width * 6 / 7 {
            NARROW[((x - width * 5 / 7) * 3 / (width / 7)) as usize]
        } else {
            BLACK
        })
    })
}

/// libdrm's own client sets the mode, and so does ours.
fn modetest(case: &mut Case, width: u32, height: u32) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let card = vm.card()?;
    let output = card.outputs.first().context("there is no connector")?;
    let setting = format!("{}:{width}x{height}", output.connector);
    let modetest = vm.start_program(&["modetest", "-M", "virtio_gpu", "-s", &setting])?;
    screen::expect(vm, 0, "modetest's picture", &smpte(width, height))?;

    let framebuffer = vm
        .framebuffers()?
        .into_iter()
        .next()
        .context("nothing is scanned out")?;
    let shown = screen::fingerprint(&screen::dump(vm, 0)?);
    ensure!(
        shown == framebuffer.fingerprint,
        "the screen is not what the guest's framebuffer has"
    );
    vm.say(modetest, "")?;
    let output = vm.wait_end(modetest)?;
    ensure!(
        output.code == 0,
        "modetest ended with {}: {}{}",
        output.code,
        output.out,
        output.err
    );

    let client = Client::start_in_mode(vm, 1, (width, height))?;
    client.draw(vm, 2)?;
    client.end(vm)
}

fn flips_are_visible(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let client = Client::start(vm, 1, &[PREFERRED])?;
    for _ in 0..3 {
        let seeds = client.start_flips(vm)?;
        client.expect_flips(vm, seeds)?;
        client.stop_flips(vm)?;
    }
    client.end(vm)
}

/// Counted instructions are the clock here, so that the host's load does not matter.
fn flip_rate(case: &mut Case) -> Result<()> {
    let machine = Machine {
        icount: true,
        ..Machine::with_gpu("virtio-gpu-pci")
    };
    let vm = case.boot(&machine)?;
    let output = vm.try_run("virtgpu-guest selftest flip_rate")?;
    ensure!(output.code == 0, "{}{}", output.out, output.err);
    Ok(())
}

fn dirty_rectangle(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let (width, height) = PREFERRED;
    let client = Client::start(vm, 1, &[PREFERRED])?;
    let mut expected = screen::test_picture(1, width, height);
    let areas = [
        [100, 200, 300, 50],
        [0, 0, 1, 1],
        [width - 1, height - 1, 1, 1],
        [0, 333, width, 1],
        [777, 0, 3, height],
    ];
    for (seed, area) in (2..).zip(areas) {
        client.draw_and_show_part(vm, seed, area)?;
        let [x, y, part_width, part_height] = area;
        let picture = screen::test_picture(seed, width, height);
        let part = imageops::crop_imm(&picture, x, y, part_width, part_height).to_image();
        imageops::replace(&mut expected, &part, x.into(), y.into());
        screen::expect(
            vm,
            0,
            &format!("the part {area:?} of picture {seed}, and no more of it"),
            &expected,
        )?;
    }
    client.end(vm)
}

fn console(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let mut console = Console::new(vm, 1)?;
    console.write(vm, 3, "The quick brown fox jumps over the lazy dog.")?;
    console.write(vm, 49, "The last line.")
}

/// A program draws through a mapping of /dev/fb0: each page is noticed, one after the other and again, whatever else lies in the same
/// huge page.
fn framebuffer_device(case: &mut Case) -> Result<()> {
    const COLOUR: u8 = 0x60;
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let mut console = Console::new(vm, 1)?;
    console.write(vm, 3, "The quick brown fox jumps over the lazy dog.")?;
    let mut expected = screen::dump(vm, 0)?;
    let mark = vm.mark();
    let painter = vm.start_program(&["virtgpu-guest", "paint"])?;
    vm.wait_line(painter, "mapped", mark)?;
    // The first one twice: its page has been seen by then, and is watched again.
    for (line, grey) in [
        (0, 1),
        (0, COLOUR),
        (1, COLOUR),
        (101, COLOUR),
        (799, COLOUR),
    ] {
        let mark = vm.mark();
        vm.say(painter, &format!("line {line} {grey}"))?;
        vm.wait_line(painter, "filled", mark)?;
        for x in 0..PREFERRED.0 {
            expected.put_pixel(x, line, Rgb([grey; 3]));
        }
        screen::expect(vm, 0, "what was drawn through the mapping", &expected)?;
    }
    vm.hang_up(painter)?;
    vm.wait_end(painter)?;
    Ok(())
}

/// A client takes the screen from the console, and leaves it to the console again.
fn console_returns(case: &mut Case) -> Result<()> {
    let vm = case.boot(&Machine::with_gpu("virtio-gpu-pci"))?;
    let mut console = Console::new(vm, 1)?;
    let client = Client::start(vm, 1, &[PREFERRED])?;
    client.end(vm)?;
    console.expect(vm)?;
    console.write(vm, 5, "The client is gone.")
}

fn two_outputs(case: &mut Case) -> Result<()> {
    let machine = Machine {
        windows: 2,
        ..Machine::with_gpu("virtio-gpu-pci,max_outputs=2")
    };
    let vm = case.boot(&machine)?;
    vm.resize_window(1, 1024, 768)?;
    let client = Client::start(vm, 1, &[PREFERRED, (1024, 768)])?;
    client.draw(vm, 2)?;
    let seeds = client.start_flips(vm)?;
    client.expect_flips(vm, seeds)?;
    client.stop_flips(vm)?;
    client.end(vm)
}

/// A client turns its output off and on again. Meanwhile it shows nothing, even if the guest sleeps and wakes up, and what the host keeps
/// or forgets.
fn dpms(case: &mut Case) -> Result<()> {
    const SIZE: (u32, u32) = (1024, 768);
    const OFF: &str = "off";
    let vm = case.boot(&Machine::on_reference_host(&[]))?;
    let client = Client::start(vm, 0, &[SIZE])?;
    let sleeps = [
        None,
        Some((Sleep::S3, "honest")),
        Some((Sleep::Idle, "honest")),
        Some((Sleep::S3, "refuse")),
        Some((Sleep::Idle, "refuse")),
    ];
    for (seed, sleep) in (0..).zip(sleeps) {
        vm.host()?.mark(OFF)?;
        client.set_power(vm, false)?;
        let (_, is_off) = screen::watch(vm, 0, screen::SCREEN_LIMIT, screen::is_black)?;
        ensure!(is_off, "the screen is not off");
        if let Some((sleep, conduct)) = sleep {
            vm.host()?.control(&format!("freezing {conduct}"))?;
            sleep.cycle(vm)?;
        }
        client.set_power(vm, true)?;
        client
            .expect(vm, seed)
            .with_context(|| format!("{sleep:?}"))?;
        let record = vm.host()?.record()?;
        let shown = commands(after_mark(&record, OFF)?)
            .filter(|entry| entry.command == "SET_SCANOUT" && entry.args["resource_id"] != 0)
            .count();
        ensure!(
            shown == 1,
            "{sleep:?}: something was shown {shown} times, not only when the output was turned on"
        );
        client.draw(vm, seed + 1)?;
    }
    client.end(vm)
}
