// SPDX-License-Identifier: GPL-2.0

//! The kernel under test, as the build left it, and where the results go.

use std::collections::HashSet;
use std::env;
use std::fmt;
use std::fs;
use std::path::{
    Path,
    PathBuf, //
};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};

/// The driver under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// `virtgpu-rs`
    Rust,
    /// Linux's `virtio-gpu`
    C,
}

impl Driver {
    /// Reads the variable `DRIVER`; without it, the Rust driver is meant.
    pub fn from_env() -> Result<Self> {
        match env::var("DRIVER").as_deref() {
            Err(_) | Ok("" | "rs") => Ok(Self::Rust),
            Ok("c") => Ok(Self::C),
            Ok(other) => bail!("DRIVER={other} is neither rs nor c"),
        }
    }

    /// Name of the module's file, without suffix.
    pub fn module(self) -> &'static str {
        match self {
            Self::Rust => "virtgpu-rs",
            Self::C => "virtio-gpu",
        }
    }

    /// Option that has the driver built in.
    fn built_in(self) -> &'static str {
        match self {
            Self::Rust => "CONFIG_DRM_VIRTGPU_RS",
            Self::C => "CONFIG_DRM_VIRTIO_GPU",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rust => "Rust",
            Self::C => "C",
        })
    }
}

/// Returns the directory named by the variable `name`.
fn directory(name: &str) -> Result<PathBuf> {
    let path = env::var_os(name).with_context(|| format!("{name} is not set: run this by make"))?;
    Ok(PathBuf::from(path))
}

/// Returns the directory that results are left in.
pub fn results() -> Result<PathBuf> {
    let path = directory("VIRTGPU_RUN")?;
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// Returns the kernel's symbols as `nm` prints them, with their sizes.
pub fn symbols() -> Result<&'static str> {
    // It takes a second, and some cases want them often.
    static SYMBOLS: OnceLock<String> = OnceLock::new();
    if let Some(symbols) = SYMBOLS.get() {
        return Ok(symbols);
    }
    let vmlinux = directory("VIRTGPU_BUILD")?.join("vmlinux");
    let output = Command::new("nm")
        .arg("--print-size")
        .arg(&vmlinux)
        .output()
        .context("cannot run nm")?;
    ensure!(
        output.status.success(),
        "nm {}: {}",
        vmlinux.display(),
        output.status
    );
    let symbols = String::from_utf8(output.stdout)?;
    Ok(SYMBOLS.get_or_init(|| symbols))
}

/// A built kernel and its modules.
pub struct Kernel {
    pub image: PathBuf,
    /// What must be loaded for the driver, dependencies first. Empty if it is built in.
    pub modules: Vec<PathBuf>,
    pub driver: Driver,
    config: String,
}

impl Kernel {
    /// Finds the kernel that `VIRTGPU_BUILD` names, for the driver that `DRIVER` names.
    pub fn from_env() -> Result<Self> {
        Self::with_driver(Driver::from_env()?)
    }

    /// Finds the kernel that `VIRTGPU_BUILD` names, for `driver`.
    pub fn with_driver(driver: Driver) -> Result<Self> {
        let build = directory("VIRTGPU_BUILD")?;
        let image = build.join("bzImage");
        ensure!(
            image.exists(),
            "there is no {}: build the kernel first",
            image.display()
        );

        let config = fs::read_to_string(build.join("config"))?;
        let mut modules = Vec::new();
        if !has(&config, driver.built_in()) {
            let directory = build.join("modules");
            let file = directory.join(driver.module()).with_extension("ko");
            ensure!(
                file.exists(),
                "there is no {}: the kernel was built without it",
                file.display()
            );
            add_with_dependencies(&directory, &file, &mut HashSet::new(), &mut modules)?;
        }
        Ok(Self {
            image,
            modules,
            driver,
            config,
        })
    }

    /// Whether an option, such as `CONFIG_KASAN`, is built in.
    pub fn has(&self, option: &str) -> bool {
        has(&self.config, option)
    }
}

/// Whether `config`, a kernel's, has an option built in.
fn has(config: &str, option: &str) -> bool {
    config
        .lines()
        .any(|line| line.strip_prefix(option) == Some("=y"))
}

/// Appends `file` to `order`, after what it depends on. A dependency without a file is built in.
fn add_with_dependencies(
    directory: &Path,
    file: &Path,
    seen: &mut HashSet<PathBuf>,
    order: &mut Vec<PathBuf>,
) -> Result<()> {
    if !file.exists() || !seen.insert(file.to_owned()) {
        return Ok(());
    }
    let output = Command::new("modinfo")
        .args(["-F", "depends"])
        .arg(file)
        .output()
        .context("cannot run modinfo")?;
    ensure!(
        output.status.success(),
        "modinfo {}: {}",
        file.display(),
        output.status
    );
    let names = String::from_utf8(output.stdout)?;
    for name in names.trim().split(',').filter(|name| !name.is_empty()) {
        // The kernel takes `-` and `_` in a module's name for the same, a file system does not.
        for spelling in [name.to_owned(), name.replace('_', "-")] {
            let file = directory.join(spelling).with_extension("ko");
            add_with_dependencies(directory, &file, seen, order)?;
        }
    }
    order.push(file.to_owned());
    Ok(())
}
