// SPDX-License-Identifier: GPL-2.0

//! What lies at an address of the guest's kernel.

use std::collections::{
    BTreeMap,
    HashMap, //
};

use anyhow::{
    Context,
    Result, //
};

use crate::counts::Counts;

/// Name of the part that is not the kernel.
pub const USER: &str = "user";

/// Name of the part that is not a module.
pub const VMLINUX: &str = "vmlinux";

/// A function of the kernel's image.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    pub start: u64,
    pub end: u64,
}

/// The functions of the kernel's image.
pub struct Image {
    by_address: BTreeMap<u64, String>,
    by_name: HashMap<String, Function>,
}

impl Image {
    /// Reads `symbols`, as [`virtgpu_lab::kernel::symbols`] returns them.
    pub fn read(symbols: &str) -> Result<Self> {
        let mut image = Self {
            by_address: BTreeMap::new(),
            by_name: HashMap::new(),
        };
        for line in symbols.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            if let [start, size, "t" | "T" | "w" | "W", name] = words[..] {
                let start = u64::from_str_radix(start, 16)?;
                let end = start + u64::from_str_radix(size, 16)?;
                image.by_address.insert(start, name.into());
                image.by_name.insert(name.into(), Function { start, end });
            }
        }
        Ok(image)
    }

    /// Returns a function.
    pub fn function(&self, name: &str) -> Result<Function> {
        let found = self.by_name.get(name).copied();
        found.with_context(|| format!("vmlinux has no function {name}"))
    }
}

/// The modules as one guest has loaded them.
pub struct Modules {
    /// Start of the code, name.
    starts: BTreeMap<u64, String>,
    functions: BTreeMap<u64, String>,
}

impl Modules {
    /// Reads the modules' lines of the guest's /proc/kallsyms.
    ///
    /// A module's code is one piece of its own, so an address belongs to the module with the last function before it.
    pub fn parse(kallsyms: &str) -> Result<Self> {
        let mut modules = Self {
            starts: BTreeMap::new(),
            functions: BTreeMap::new(),
        };
        for line in kallsyms.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            if let [address, "t" | "T" | "w" | "W", name, module] = words[..] {
                let address = u64::from_str_radix(address, 16)?;
                let module = module.trim_matches(['[', ']']);
                modules.starts.insert(address, module.into());
                let name = format!("{:#}", rustc_demangle::demangle(name));
                modules.functions.insert(address, name);
            }
        }
        Ok(modules)
    }
}

/// Everything that can be executed in a guest.
pub struct Symbols<'a> {
    pub image: &'a Image,
    pub modules: Modules,
}

/// Start of the kernel's half of the address space.
const KERNEL: u64 = 1 << 63;

impl Symbols<'_> {
    /// Returns the functions of modules with `part` in their names.
    pub fn in_modules(&self, part: &str) -> Vec<Function> {
        let starts = self.modules.functions.iter();
        let ends = self.modules.functions.keys().skip(1);
        starts
            .zip(ends)
            .filter(|((_, name), _)| name.contains(part))
            .map(|((start, _), end)| Function {
                start: *start,
                end: *end,
            })
            .collect()
    }

    fn part(&self, address: u64) -> &str {
        if address < KERNEL {
            return USER;
        }
        // The image lies below the modules.
        match self.modules.starts.range(..=address).next_back() {
            Some((_, name)) => name,
            None => VMLINUX,
        }
    }

    fn function(&self, address: u64) -> String {
        if address < KERNEL {
            return USER.into();
        }
        let (_, name) = (self.modules.functions.range(..=address).next_back())
            .or_else(|| self.image.by_address.range(..=address).next_back())
            .unzip();
        name.cloned().unwrap_or_else(|| format!("{address:x}"))
    }

    /// Splits what was counted by module.
    pub fn by_part(&self, counts: &Counts) -> BTreeMap<String, u64> {
        let mut parts = BTreeMap::new();
        for (address, count) in &counts.0 {
            *parts.entry(self.part(*address).to_owned()).or_default() += count;
        }
        parts
    }

    /// Splits what was counted by function: part, function, instructions; the most first.
    pub fn by_function(&self, counts: &Counts) -> Vec<(String, String, u64)> {
        let mut functions: HashMap<_, u64> = HashMap::new();
        for (address, count) in &counts.0 {
            let key = (self.part(*address).to_owned(), self.function(*address));
            *functions.entry(key).or_default() += count;
        }
        let mut all: Vec<_> = functions
            .into_iter()
            .map(|((part, function), count)| (part, function, count))
            .collect();
        all.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.cmp(b)));
        all
    }
}
