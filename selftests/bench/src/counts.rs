// SPDX-License-Identifier: GPL-2.0

//! What the plugin counted.

use std::collections::{
    BTreeMap,
    HashMap, //
};

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

/// The spans of the kernel's code that have one name and ran in a measurement.
#[derive(Debug, Default, Clone)]
pub struct Span {
    pub counts: Counts,
    /// When they began and ended on the guest's clock, in nanoseconds.
    times: Vec<(u64, u64)>,
}

impl Span {
    /// How much of the guest's time before `clock` was in these spans, in nanoseconds.
    pub fn before(&self, clock: u64) -> u64 {
        let times = self.times.iter();
        times
            .map(|(begin, end)| clock.min(*end).saturating_sub(*begin))
            .sum()
    }
}

/// From a start mark to the stop mark.
#[derive(Debug, Default, Clone)]
pub struct Interval {
    pub counts: Counts,
    pub spans: BTreeMap<String, Span>,
}

/// Reads the plugin's file.
pub fn parse(text: &str) -> Result<Vec<Interval>> {
    let mut intervals = Vec::new();
    let mut current: Option<Interval> = None;
    let mut open: Option<(&str, Span)> = None;
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
        if let Some((_, span)) = &mut open {
            span.counts.add(&counts);
        }
        match what {
            "start" => current = Some(Interval::default()),
            "stop" => intervals.push(current.take().context("a stop without a start")?),
            "enter" => {
                ensure!(open.is_none(), "{name} is entered within another span");
                let interval = current.as_mut().context("a span outside")?;
                let mut span = interval.spans.remove(name).unwrap_or_default();
                span.times.push((clock, u64::MAX));
                open = Some((name, span));
            }
            "leave" => {
                let (entered, mut span) = open.take().context("a span is left and not entered")?;
                ensure!(entered == name, "{name} is left within {entered}");
                if let Some((_, end)) = span.times.last_mut() {
                    *end = clock;
                }
                let interval = current.as_mut().context("a span outside")?;
                interval.spans.insert(name.into(), span);
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
    fn spans_of_one_name_are_added_and_are_part_of_their_interval() {
        let text = "cut start - 5\n10 99\n\
                    cut enter f 10\n10 1\ncut leave f 30\n20 2\n\
                    cut enter f 50\n30 8\ncut leave f 53\n20 16\n\
                    cut stop - 60\n10 4\n";
        let intervals = parse(text).expect("it is well formed");
        assert_eq!(intervals.len(), 1);
        let sum = |counts: &Counts| counts.0.values().sum::<u64>();
        assert_eq!(sum(&intervals[0].counts), 31);
        let span = &intervals[0].spans["f"];
        assert_eq!(sum(&span.counts), 18);
        assert_eq!(span.before(u64::MAX), 23);
        assert_eq!(span.before(51), 21);
    }
}
