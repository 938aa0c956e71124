// SPDX-License-Identifier: GPL-2.0

//! The guest's root: busybox, the driver's modules, modetest, and our own guest program.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{
    Path,
    PathBuf, //
};
use std::process::Command;
use std::sync::Mutex;
use std::time::{
    Duration,
    SystemTime, //
};

use anyhow::{
    Context,
    Result,
    ensure, //
};
use cpio::newc;
use sha2::{
    Digest,
    Sha256, //
};

use crate::cargo;
use crate::kernel::{
    Kernel,
    results, //
};

/// First program of the guest. The control channel is the second serial line; `lab.shell` asks for a shell on the first.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /usr/bin /usr/sbin /sbin
/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=vt100
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t debugfs debugfs /sys/kernel/debug
mount -t tmpfs tmpfs /tmp
if grep -qw lab.shell /proc/cmdline; then
    load-driver
    echo "The driver is loaded. modetest and virtgpu-guest are at hand; Ctrl-A X ends QEMU."
    setsid cttyhack sh
else
    virtgpu-guest agent /dev/ttyS1
fi
poweroff -f
"#;

/// Loads the driver's modules that are not loaded yet. Parameters stand on the kernel's command line, as modprobe would have it.
const LOAD_DRIVER: &str = r#"#!/bin/sh
for module in $(cat /lib/modules/order); do
    name=$(basename $module .ko | tr - _)
    parameters=$(tr ' ' '\n' </proc/cmdline | sed -n "s/^$name\.//p")
    grep -q "^$name " /proc/modules || insmod $module $parameters || exit
done
"#;

struct File {
    mode: u32,
    content: Vec<u8>,
}

/// Makes the initramfs, with `programs` and what they need, unless the same one is there, and returns its path.
pub fn make(kernel: &Kernel, programs: &[PathBuf]) -> Result<PathBuf> {
    // Cases of one process ask at once.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().expect("not poisoned");

    let mut files = BTreeMap::new();
    let mut add = |path: String, mode: u32, content: Vec<u8>| {
        files.insert(path, File { mode, content });
    };
    add("init".into(), 0o755, INIT.into());
    add("bin/load-driver".into(), 0o755, LOAD_DRIVER.into());
    let mut copy = |from: &Path, to: String| -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        add(to, 0o755, content);
        Ok(())
    };
    copy(Path::new("/usr/bin/busybox"), "bin/busybox".into())?;
    copy(&guest_program()?, "bin/virtgpu-guest".into())?;
    let modetest = PathBuf::from("/usr/bin/modetest");
    for program in programs.iter().chain([&modetest]) {
        let name = program.file_name().expect("a file").to_string_lossy();
        copy(program, format!("bin/{name}"))?;
        for library in libraries(program)? {
            let to = library.to_string_lossy().trim_start_matches('/').to_owned();
            copy(&library, to)?;
        }
    }
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().expect("a file").to_string_lossy();
        order += &format!("/lib/modules/{name}\n");
        copy(module, format!("lib/modules/{name}"))?;
    }
    add("lib/modules/order".into(), 0o644, order.into());

    let mut hash = Sha256::new();
    for (path, file) in &files {
        hash.update(format!("{path}\0{:o}\0{}\0", file.mode, file.content.len()));
        hash.update(&file.content);
    }
    let hash: String = hash.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let archive = results()?.join(format!("initramfs-{hash}.cpio"));
    if archive.exists() {
        // It is in use.
        fs::File::open(&archive)?.set_modified(SystemTime::now())?;
    } else {
        // Another process may do the same: each writes a file of its own, and the name appears when it is complete.
        let mut new = tempfile::NamedTempFile::new_in(results()?)?;
        write(&files, new.as_file_mut())?;
        new.persist(&archive)?;
        remove_old()?;
    }
    Ok(archive)
}

/// Removes what nobody has used in a week: every new kernel and program makes another one.
fn remove_old() -> Result<()> {
    const WEEK: Duration = Duration::from_secs(7 * 24 * 60 * 60);
    for entry in fs::read_dir(results()?)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_archive = name.starts_with("initramfs-") && name.ends_with(".cpio");
        // One from the future is not old.
        let is_old = |age: Duration| age > WEEK;
        if is_archive && entry.metadata()?.modified()?.elapsed().is_ok_and(is_old) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn write(files: &BTreeMap<String, File>, mut to: &mut fs::File) -> Result<()> {
    let mut directories = std::collections::BTreeSet::from([PathBuf::from("dev")]);
    for path in files.keys() {
        let parents = Path::new(path).ancestors().skip(1);
        directories.extend(
            parents
                .filter(|path| *path != Path::new(""))
                .map(PathBuf::from),
        );
    }
    let mut ino = 0;
    let mut entry = |name: &str, mode: u32| {
        ino += 1;
        newc::Builder::new(name).ino(ino).mode(mode).nlink(1)
    };
    for directory in &directories {
        let builder = entry(&directory.to_string_lossy(), 0o040_755);
        to = builder.write(to, 0).finish()?;
    }
    // The kernel opens it for the first program before anything is mounted.
    let console = entry("dev/console", 0o020_600).rdev_major(5).rdev_minor(1);
    to = console.write(to, 0).finish()?;
    for (path, file) in files {
        let mut writer = entry(path, 0o100_000 | file.mode).write(to, file.content.len() as u32);
        io::copy(&mut file.content.as_slice(), &mut writer)?;
        to = writer.finish()?;
    }
    newc::trailer(to)?;
    Ok(())
}

/// Builds the guest program, linked statically, and returns its path.
fn guest_program() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";

    // Once for all cases of a process.
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().expect("not poisoned");
    if let Some(program) = &*built {
        return Ok(program.clone());
    }
    let program = cargo::build(
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../guest")),
        &["--target", TARGET],
        &[(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-Ctarget-feature=+crt-static",
        )],
    )?;
    Ok(built.insert(program).clone())
}

/// Returns the libraries that a program needs, the dynamic linker included: none, if it is linked statically, or no program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() || said.contains("not a dynamic executable"),
        "ldd {}: {}: {said}",
        program.display(),
        output.status
    );
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}
