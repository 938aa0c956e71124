// SPDX-License-Identifier: GPL-2.0

//! Programs of this repository that are built when they are needed.

use std::path::{
    Path,
    PathBuf, //
};
use std::process::{
    Command,
    Stdio, //
};

use anyhow::{
    Context,
    Result,
    ensure, //
};
use serde_json::Value;

/// Builds the one program that `arguments` choose of the package or workspace in `dir`, and returns its path. What cargo has to say
/// while it builds is for the user.
pub(crate) fn build(
    dir: &Path,
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .current_dir(dir)
        .args([
            "build",
            "--release",
            "--message-format=json-render-diagnostics",
        ])
        .args(arguments)
        .envs(environment.iter().copied())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    let place = dir.display();
    ensure!(
        output.status.success(),
        "the program in {place} does not build"
    );
    let messages = String::from_utf8(output.stdout)?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo built no program in {place}"))
}
