// SPDX-License-Identifier: GPL-2.0

//! The program: options, and the order of starting and ending.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use clap::{Parser, Subcommand, ValueEnum};
use vhost_user_backend::VhostUserDaemon;
use virtgpu_host::backend::{Gpu, Transport};
use virtgpu_host::control;
use virtgpu_host::device::Device;
use virtgpu_host::fault::{Faults, RandomFaults, Rule};
use virtgpu_host::options::{self, Capset, Conduct, Options};
use virtgpu_host::record::Record;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// What can be offered besides the 2D protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Feature {
    /// GET_EDID
    Edid,
    /// RESOURCE_ASSIGN_UUID
    Uuid,
    /// Blob resources
    Blob,
    /// Contexts, without a renderer: what they submit is accepted and forgotten
    Virgl,
    /// Contexts of several kinds, with timelines
    ContextInit,
    /// Indirect descriptors
    Indirect,
    /// Notification suppression by index
    EventIdx,
}

/// A strict virtio-gpu device for tests, as a vhost-user back-end.
///
/// Start it, then QEMU with
///   -object memory-backend-memfd,id=m,size=1G,share=on -machine memory-backend=m
///   -chardev socket,id=c,path=SOCKET
///   -device vhost-user-test-device-pci,virtio-id=16,num_vqs=2,config_size=24,vq_size=256,chardev=c
/// It serves one virtual machine, and exits with it.
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment, args_conflicts_with_subcommands = true)]
#[command(subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    ask: Option<Ask>,

    /// The vhost-user socket to listen on
    #[arg(long, required = true)]
    socket: Option<PathBuf>,

    /// A control socket to listen on
    #[arg(long)]
    control: Option<PathBuf>,

    /// Write every command to this file, as JSON lines
    #[arg(long)]
    record: Option<PathBuf>,

    /// Write what each scanout shows into this directory, at the end and when asked to
    #[arg(long)]
    png: Option<PathBuf>,

    /// A scanout with a display of this size, or `off` without one; again for each further scanout.
    /// `none` for no scanout at all
    #[arg(long, value_name = "WxH|off|none", default_value = "1024x768")]
    display: Vec<String>,

    /// What is offered besides the 2D protocol
    #[arg(long, value_delimiter = ',', default_value = "edid,indirect,event-idx")]
    features: Vec<Feature>,

    /// Offer BLOB_ALIGNMENT, with this alignment in bytes
    #[arg(long, value_name = "BYTES", value_parser = virtgpu_host::fault::number32)]
    blob_alignment: Option<u32>,

    /// A capability set
    #[arg(long, value_name = "ID:VERSION:SIZE")]
    capset: Vec<Capset>,

    /// Have host-visible memory of this size: bytes, or with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = options::memory_size)]
    host_visible: u64,

    /// The feature bit that FREEZING is offered on, or `off`
    #[arg(long, value_name = "BIT|off", default_value = "5")]
    freezing: String,

    /// What happens when the guest freezes: honest, refuse, late:TIME, mute, drop-all,
    /// drop-one[:RESOURCE]
    #[arg(long, default_value = "honest")]
    conduct: String,

    /// Keep the resources even if FREEZING=0 is the first command after a reset
    #[arg(long)]
    lenient_thaw: bool,

    /// Offer a feature bit that this host knows nothing of
    #[arg(long, value_name = "BIT", value_parser = clap::value_parser!(u32).range(24..64))]
    claim_feature: Vec<u32>,

    /// Inject a fault, for example "3rd TRANSFER_TO_HOST_2D: error 0x1203"
    #[arg(long, value_name = "RULE")]
    fault: Vec<Rule>,

    /// Inject random faults into RATE (20) of a thousand commands
    #[arg(long, value_name = "SEED[:RATE]")]
    random_faults: Option<RandomFaults>,

    /// The most entries of a virtqueue
    #[arg(long, value_name = "ENTRIES", default_value_t = 1024)]
    queue_size: u16,

    /// Exit with status 3 if the guest did anything that the specification forbids
    #[arg(long)]
    strict: bool,
}

/// Ask a running host.
#[derive(Debug, Subcommand)]
enum Ask {
    /// Ask a running host, and print the answer as JSON
    #[command(after_help = format!("What can be asked:\n{}", control::HELP))]
    Ctl {
        /// The control socket
        socket: PathBuf,
        /// What to ask
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

/// The device's part of the arguments.
fn options(arguments: &Arguments) -> Result<Options, String> {
    let displays = match &arguments.display[..] {
        [none] if none == "none" => Vec::new(),
        displays => displays
            .iter()
            .map(|text| options::display(text))
            .collect::<Result<_, _>>()?,
    };
    let freezing = match arguments.freezing.as_str() {
        "off" => None,
        bit => Some(virtgpu_host::fault::number32(bit)?),
    };
    let conduct: Conduct = arguments.conduct.parse()?;
    let has = |feature| arguments.features.contains(&feature);
    let options = Options {
        displays,
        edid: has(Feature::Edid),
        uuid: has(Feature::Uuid),
        blob: has(Feature::Blob),
        blob_alignment: arguments.blob_alignment,
        virgl: has(Feature::Virgl),
        context_init: has(Feature::ContextInit),
        capsets: arguments.capset.clone(),
        host_visible: arguments.host_visible,
        freezing,
        conduct,
        lenient_thaw: arguments.lenient_thaw,
        claimed: arguments.claim_feature.clone(),
    };
    options.check()?;
    Ok(options)
}

/// Writes pictures and the end of the record. Returns whether the guest did nothing forbidden.
fn end(gpu: &Gpu, png: Option<&Path>) -> Result<bool, String> {
    let mut state = gpu.state();
    if let Some(png) = png {
        state.device.dump(png).map_err(|error| error.to_string())?;
    }
    state
        .device
        .end(&mut std::io::stderr())
        .map_err(|error| error.to_string())?;
    Ok(state.device.record.violations.is_empty())
}

fn serve(arguments: Arguments, socket: &Path) -> Result<bool, String> {
    let options = options(&arguments)?;
    let out: Option<Box<dyn Write + Send>> = match &arguments.record {
        Some(path) => {
            let file = File::create(path).map_err(|e| format!("{}: {e}", path.display()))?;
            Some(Box::new(BufWriter::new(file)))
        }
        None => None,
    };
    let faults = Faults::new(arguments.fault, arguments.random_faults);
    let transport = Transport {
        queue_size: arguments.queue_size,
        indirect: arguments.features.contains(&Feature::Indirect),
        event_idx: arguments.features.contains(&Feature::EventIdx),
    };
    let device = Device::new(options, faults, Record::new(out));
    let gpu = Gpu::new(transport, device).map_err(|error| error.to_string())?;

    // `quit` comes from another thread than the end of the virtual machine: one of them ends.
    static ENDED: Mutex<()> = Mutex::new(());
    if let Some(control) = &arguments.control {
        let (other, png, strict) = (gpu.clone(), arguments.png.clone(), arguments.strict);
        let quit = move || {
            let _ended = ENDED.lock();
            let clean = end(&other, png.as_deref()).unwrap_or(false);
            std::process::exit(if clean || !strict { 0 } else { 3 });
        };
        control::listen(gpu.clone(), control, arguments.png.clone(), quit)
            .map_err(|error| format!("{}: {error}", control.display()))?;
    }

    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("virtgpu-host".into(), gpu.clone(), memory)
        .map_err(|error| error.to_string())?;
    let served = daemon.serve(socket).map_err(|error| error.to_string());
    let _ended = ENDED.lock();
    let clean = end(&gpu, arguments.png.as_deref())?;
    served?;
    Ok(clean || !arguments.strict)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.ask {
        Some(Ask::Ctl { socket, words }) => control::ask(socket, &words.join(" "))
            .map(|answer| {
                println!("{answer}");
                answer.get("error").is_none()
            })
            .map_err(|error| format!("{}: {error}", socket.display())),
        None => match arguments.socket.clone() {
            Some(socket) => serve(arguments, &socket),
            None => Err("no --socket".into()),
        },
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(error) => {
            eprintln!("virtgpu-host: {error}");
            ExitCode::FAILURE
        }
    }
}
