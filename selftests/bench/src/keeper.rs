// SPDX-License-Identifier: GPL-2.0

//! A host that keeps everything while the guest sleeps (FREEZING), which QEMU's own device does not.

use std::fs;
use std::path::{
    Path,
    PathBuf, //
};
use std::process::{
    Child,
    Command, //
};
use std::time::{
    Duration,
    Instant, //
};

use anyhow::{
    Context,
    Result,
    ensure, //
};
use image::RgbImage;
use serde_json::Value;
use tempfile::TempDir;
use virtgpu_lab::vm::Machine;

use crate::host::{
    FREEZE,
    Interval,
    RESTORE, //
};

/// How long it may take to listen.
const LIMIT: Duration = Duration::from_secs(20);

/// Builds the host and returns its path.
pub fn build() -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../host"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--package=virtgpu-host",
            "--message-format=json",
        ])
        .output()
        .context("cannot run cargo")?;
    let messages = String::from_utf8(output.stdout)?;
    ensure!(
        output.status.success(),
        "the host does not build: {}{messages}",
        String::from_utf8_lossy(&output.stderr)
    );
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo built no host")
}

/// A host that runs. It ends with this object.
pub struct Keeper {
    child: Child,
    program: PathBuf,
    dir: PathBuf,
    sockets: TempDir,
}

impl Keeper {
    /// Starts `program`, which leaves its record and its pictures in `dir`.
    pub fn start(program: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let sockets = tempfile::Builder::new().prefix("virtgpu-").tempdir()?;
        let child = Command::new(program)
            .arg("--socket")
            .arg(sockets.path().join("gpu"))
            .arg("--control")
            .arg(sockets.path().join("control"))
            .arg("--record")
            .arg(dir.join("record"))
            .arg("--png")
            .arg(dir)
            .spawn()
            .context("cannot run the host")?;
        let keeper = Self {
            child,
            program: program.to_owned(),
            dir: dir.to_owned(),
            sockets,
        };
        let end = Instant::now() + LIMIT;
        while !keeper.sockets.path().join("gpu").exists() {
            ensure!(Instant::now() < end, "the host does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(keeper)
    }

    /// Gives a machine this host's GPU. The host and the guest share `memory`, in QEMU's notation.
    pub fn attach(&self, machine: &mut Machine, memory: &str) {
        machine.machine = "pc,memory-backend=guest";
        machine.devices = vec![
            "vhost-user-test-device-pci,virtio-id=16,num_vqs=2,config_size=24,vq_size=256,\
             chardev=gpu,id=gpu0"
                .into(),
        ];
        let socket = self.sockets.path().join("gpu");
        machine.arguments.extend([
            String::from("-object"),
            format!("memory-backend-memfd,id=guest,size={memory},share=on"),
            "-chardev".into(),
            format!("socket,id=gpu,path={}", socket.display()),
            // The guest's clock must not run ahead while this host, which knows nothing of it, does something.
            "-icount".into(),
            "shift=0,sleep=on".into(),
        ]);
    }

    fn control(&self, words: &[&str]) -> Result<()> {
        let output = Command::new(&self.program)
            .arg("ctl")
            .arg(self.sockets.path().join("control"))
            .args(words)
            .output()?;
        ensure!(
            output.status.success(),
            "the host refuses {words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Writes a line into the record.
    pub fn mark(&self, text: &str) -> Result<()> {
        self.control(&["mark", text])
    }

    /// Returns what the first display shows.
    pub fn picture(&self) -> Result<RgbImage> {
        self.control(&["dump"])?;
        Ok(image::open(self.dir.join("scanout-0.png"))?.into_rgb8())
    }

    /// Adds to `interval` what has arrived here since the mark `begin`.
    pub fn add_traffic(&self, begin: &str, interval: &mut Interval) -> Result<()> {
        let record = fs::read_to_string(self.dir.join("record"))?;
        let mut phase = None;
        for line in record.lines() {
            let line: Value = serde_json::from_str(line)?;
            let event = line["event"].as_str().context("no event")?;
            if event == "mark" && line["text"] == begin {
                phase = Some(FREEZE);
            }
            let Some(phase) = &mut phase else {
                continue;
            };
            let span = interval.spans.entry(phase.to_string()).or_default();
            let all = &mut interval.traffic;
            match event {
                "stop" => *phase = RESTORE,
                "interrupt" => {
                    span.interrupts += 1;
                    all.interrupts += 1;
                }
                "command" => {
                    let name = line["command"].as_str().context("no command")?;
                    for traffic in [span, all] {
                        *traffic.commands.entry(name.to_lowercase()).or_default() += 1;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It ends with its guest, but if there never was one, it waits for ever.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
