// SPDX-License-Identifier: GPL-2.0

//! What the plugin counted.

use std::collections::HashMap;

use anyhow::{
    Context,
    Result,
    bail,
    ensure, //
};

/// Executed instructions by address, in granules.
#[derive(Debug, Default, Clone)]
pub struct Counts(pub HashMap<u64, u64>);

impl Counts {
    /// Adds what another part of the guest's time has.
    pub fn add(&mut self, other: &Self) {
        for (address, count) in &other.0 {
            *self.0.entry(*address).or_default() += count;
        }
    }
}

/// A span of the kernel's code that ran in a measurement.
#[derive(Debug, Default, Clone)]
pub struct Span {
    pub name: String,
    pub counts: Counts,
    /// When it began and how long it took on the guest's clock, in nanoseconds.
    pub begin: u64,
    pub duration: u64,
}

/// From a start mark to the stop mark.
#[derive(Debug, Default, Clone)]
pub struct Interval {
    pub counts: Counts,
    pub spans: Vec<Span>,
}

/// Reads the plugin's file.
pub fn parse(text: &str) -> Result<Vec<Interval>> {
    let mut intervals = Vec::new();
    let mut current: Option<Interval> = None;
    let mut open: Option<Span> = None;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let words: Vec<_> = line.split(' ').collect();
        let ["cut", what, name, clock] = words[..] else {
            bail!("the plugin's file has no cut but '{line}'");
        };
        let clock: u64 = clock.parse()?;
        let mut counts = Counts::default();
        while let Some(line) = lines.next_if(|line| !line.starts_with("cut")) {
            let (address, count) = line.split_once(' ').context("address and count")?;
            counts
                .0
                .insert(u64::from_str_radix(address, 16)?, count.parse()?);
        }
        if let Some(interval) = &mut current {
            interval.counts.add(&counts);
        }
        if let Some(span) = &mut open {
            span.counts.add(&counts);
        }
        match what {
            "start" => current = Some(Interval::default()),
            "stop" => intervals.push(current.take().context("a stop without a start")?),
            "enter" => {
                ensure!(open.is_none(), "{name} is entered within another span");
                open = Some(Span {
                    name: name.into(),
                    begin: clock,
                    ..Span::default()
                });
            }
            "leave" => {
                let mut span = open.take().context("a span is left and not entered")?;
                ensure!(span.name == name, "{name} is left within {}", span.name);
                span.duration = clock - span.begin;
                let interval = current.as_mut().context("a span outside")?;
                interval.spans.push(span);
            }
            _ => {}
        }
    }
    Ok(intervals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_part_of_its_interval() {
        let text = "cut start - 5\n10 99\ncut enter f 10\n10 1\ncut leave f 30\n20 2\ncut stop - 40\n10 4\n";
        let intervals = parse(text).expect("it is well formed");
        assert_eq!(intervals.len(), 1);
        let sum = |counts: &Counts| counts.0.values().sum::<u64>();
        assert_eq!(sum(&intervals[0].counts), 7);
        assert_eq!(sum(&intervals[0].spans[0].counts), 2);
        assert_eq!(intervals[0].spans[0].duration, 20);
    }
}
