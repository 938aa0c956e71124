// SPDX-License-Identifier: GPL-2.0

//! The figures, and how they are shown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The driver that the other is compared with.
pub const REFERENCE: &str = "c";

/// The driver that is measured.
pub const MEASURED: &str = "rust";

/// A metric that has a column in the table, and its title.
pub const COLUMNS: &[(&str, &str)] = &[
    ("instructions", "instructions"),
    ("instructions_module", "in the module"),
    ("commands", "commands"),
    ("kicks", "kicks"),
    ("interrupts", "interrupts"),
    ("bytes", "bytes"),
];

/// As [`COLUMNS`], for what has to do with suspend.
pub const SUSPEND_COLUMNS: &[(&str, &str)] = &[
    ("instructions", "instructions"),
    ("instructions_module", "in the module"),
    ("commands", "commands"),
    ("kicks", "kicks"),
    ("bytes", "bytes"),
    ("clock_us", "guest's clock, µs"),
    ("first_frame_us", "first right frame, µs"),
];

/// Everything that was measured: operation, driver, metric, and a value for each time.
#[derive(Default)]
pub struct Figures {
    /// In the order of measurement.
    pub operations: Vec<String>,
    /// In ascending order.
    values: BTreeMap<(String, &'static str, String), Vec<f64>>,
}

impl Figures {
    /// Notes a value, which may be one of several.
    pub fn add(&mut self, operation: &str, driver: &'static str, metric: &str, value: f64) {
        if !self.operations.iter().any(|known| known == operation) {
            self.operations.push(operation.into());
        }
        let key = (operation.into(), driver, metric.into());
        let values = self.values.entry(key).or_default();
        values.insert(values.partition_point(|other| *other <= value), value);
    }

    /// Returns the median of the values of a metric, if it was measured.
    pub fn get(&self, operation: &str, driver: &'static str, metric: &str) -> Option<f64> {
        let key = (operation.into(), driver, metric.into());
        self.values.get(&key).map(|values| median(values))
    }

    /// Whether an operation is about suspend.
    pub fn is_suspend(operation: &str) -> bool {
        ["freeze", "restore", "suspend"]
            .iter()
            .any(|prefix| operation.starts_with(prefix))
    }

    /// Everything, a value a line: the median, and where the values differ the smallest and the largest.
    pub fn csv(&self) -> String {
        let mut text = String::from("operation,driver,metric,value\n");
        for operation in &self.operations {
            for ((of, driver, metric), values) in &self.values {
                if of != operation {
                    continue;
                }
                let mut line = |suffix: &str, value: f64| {
                    writeln!(text, "{of},{driver},{metric}{suffix},{}", exact(value))
                        .expect("a string takes it");
                };
                line("", median(values));
                if let [min, .., max] = values[..]
                    && min < max
                {
                    line("_min", min);
                    line("_max", max);
                }
            }
        }
        text
    }

    /// The two drivers side by side, as a table that Markdown understands: C, Rust, and Rust divided by C.
    pub fn table(&self) -> String {
        let (suspend, others): (Vec<_>, Vec<_>) = self
            .operations
            .iter()
            .partition(|name| Self::is_suspend(name));
        let mut text = self.part_of_table(&others, COLUMNS);
        text.push('\n');
        text += &self.part_of_table(&suspend, SUSPEND_COLUMNS);
        text
    }

    fn part_of_table(&self, operations: &[&String], columns: &[(&str, &str)]) -> String {
        let mut rows = vec![vec![String::from("operation (C, Rust: Rust / C)")]];
        rows[0].extend(columns.iter().map(|(_, title)| title.to_string()));
        for operation in operations {
            let mut row = vec![operation.to_string()];
            for (metric, _) in columns {
                let value = |driver| self.get(operation, driver, metric);
                row.push(cell(value(REFERENCE), value(MEASURED)));
            }
            rows.push(row);
        }
        let widths: Vec<_> = (0..=columns.len())
            .map(|column| {
                let lengths = rows.iter().map(|row| row[column].chars().count());
                lengths.max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for (number, row) in rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(&widths) {
                write!(text, "| {cell:width$} ").expect("a string takes it");
            }
            text.push_str("|\n");
            if number == 0 {
                for width in &widths {
                    write!(text, "|{:-<1$}", "", width + 2).expect("a string takes it");
                }
                text.push_str("|\n");
            }
        }
        text
    }
}

/// The value in the middle of values in ascending order, of which there is one at least.
fn median(values: &[f64]) -> f64 {
    values[values.len() / 2]
}

fn cell(reference: Option<f64>, measured: Option<f64>) -> String {
    match (reference, measured) {
        (Some(c), Some(rust)) if c > 0.0 => {
            format!("{}, {}: {:.2}", short(c), short(rust), rust / c)
        }
        (None, None) => String::from("–"),
        (c, rust) => {
            let show = |value: Option<f64>| value.map_or(String::from("–"), short);
            format!("{}, {}", show(c), show(rust))
        }
    }
}

/// Four digits are enough for a reader.
pub fn short(value: f64) -> String {
    match value {
        ..1e3 => exact((value * 100.0).round() / 100.0),
        1e3..1e4 => format!("{value:.0}"),
        1e4..1e6 => format!("{:.1} k", value / 1e3),
        1e6..1e9 => format!("{:.2} M", value / 1e6),
        _ => format!("{:.2} G", value / 1e9),
    }
}

fn exact(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(short(3.0), "3");
        assert_eq!(short(0.456), "0.46");
        assert_eq!(short(1207.0), "1207");
        assert_eq!(short(33_812.0), "33.8 k");
        assert_eq!(short(5_480_000.0), "5.48 M");
    }

    #[test]
    fn of_several_values_the_one_in_the_middle_counts() {
        let mut figures = Figures::default();
        for value in [30.0, 10.0, 90.0] {
            figures.add("freeze", MEASURED, "kicks", value);
        }
        figures.add("freeze", MEASURED, "commands", 2.0);
        figures.add("freeze", MEASURED, "commands", 2.0);
        assert_eq!(figures.get("freeze", MEASURED, "kicks"), Some(30.0));
        assert_eq!(
            figures.csv(),
            "operation,driver,metric,value\n\
             freeze,rust,commands,2\n\
             freeze,rust,kicks,30\n\
             freeze,rust,kicks_min,10\n\
             freeze,rust,kicks_max,90\n"
        );
    }

    #[test]
    fn what_one_driver_lacks_has_no_ratio() {
        assert_eq!(cell(Some(2.0), None), "2, –");
        assert_eq!(cell(Some(2.0), Some(1.0)), "2, 1: 0.50");
    }
}
