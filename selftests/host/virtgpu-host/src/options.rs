// SPDX-License-Identifier: GPL-2.0

//! What the device is, and how it is written on a command line.

use std::str::FromStr;
use std::time::Duration;

use virtio_gpu_protocol::{
    F_BLOB_ALIGNMENT, F_CONTEXT_INIT, F_EDID, F_RESOURCE_BLOB, F_RESOURCE_UUID, F_VIRGL,
    MAX_SCANOUTS,
};

use crate::fault::{duration, number, number32};

/// The guest's pages, in bytes.
pub(crate) const PAGE_SIZE: u64 = 4096;

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
    /// Feature bits that are offered, and mean nothing here.
    pub claimed: Vec<u32>,
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
            claimed: Vec::new(),
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
            let taken = !(F_BLOB_ALIGNMENT..24).contains(&bit)
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
        for &bit in &self.claimed {
            offer(bit, true);
        }
        features
    }
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
