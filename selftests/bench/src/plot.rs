// SPDX-License-Identifier: GPL-2.0

//! The picture of the figures.

use std::fs;
use std::path::Path;

use anyhow::{
    Context,
    Result,
    anyhow, //
};
use plotters::prelude::*;
use plotters::style::FontStyle;

use crate::figures::{
    self,
    Figures,
    MEASURED,
    REFERENCE, //
};

/// Debian's fontconfig brings it.
const FONT: &str = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";

const FAMILY: &str = "sans-serif";

const DRIVERS: &[(&str, RGBColor)] = &[
    (REFERENCE, RGBColor(120, 120, 120)),
    (MEASURED, RGBColor(200, 80, 30)),
];

/// Who restores, on which host (the end of the operation's name), and what that is called.
const RESTORES: &[(&str, &str, &str, RGBColor)] = &[
    (REFERENCE, "", "c", RGBColor(120, 120, 120)),
    (MEASURED, "", "rust, recovery", RGBColor(200, 80, 30)),
    (MEASURED, "_kept", "rust, FREEZING", RGBColor(30, 90, 200)),
    (
        MEASURED,
        "_not_reset",
        "rust, not reset",
        RGBColor(40, 150, 80),
    ),
];

const SIZE: (u32, u32) = (1600, 1200);

/// Draws the instructions of every operation, and restore by the number of buffers.
pub fn draw(figures: &Figures, path: &Path) -> Result<()> {
    let font = fs::read(FONT).context(FONT)?;
    plotters::style::register_font(FAMILY, FontStyle::Normal, Vec::leak(font))
        .map_err(|_| anyhow!("{FONT} is no font"))?;
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(SIZE.1 * 6 / 10);
    let (all, module) = upper.split_horizontally(SIZE.0 / 2);
    bars(&all, figures, "instructions", "Executed instructions")?;
    bars(
        &module,
        figures,
        "instructions_module",
        "... of them in the driver's module",
    )?;
    let (clock, instructions) = lower.split_horizontally(SIZE.0 / 2);
    lines(
        &clock,
        figures,
        "clock_us",
        "Restore, µs on the guest's clock",
    )?;
    lines(
        &instructions,
        figures,
        "instructions",
        "Restore, executed instructions",
    )?;
    root.present()?;
    Ok(())
}

type Area<'a, 'b> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

fn bars(area: &Area<'_, '_>, figures: &Figures, metric: &str, title: &str) -> Result<()> {
    let operations: Vec<_> = figures
        .operations
        .iter()
        .filter(|name| !Figures::is_suspend(name))
        .collect();
    if operations.is_empty() {
        return Ok(());
    }
    let top = operations
        .iter()
        .flat_map(|operation| {
            DRIVERS
                .iter()
                .filter_map(|(driver, _)| figures.get(operation, driver, metric))
        })
        .fold(10.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FAMILY, 24))
        .margin(15)
        .x_label_area_size(35)
        .y_label_area_size(150)
        .build_cartesian_2d((1.0..top * 2.0).log_scale(), 0.0..operations.len() as f64)?;
    let label = |row: &f64| match operations.get(operations.len() - 1 - row.floor() as usize) {
        Some(name) if row.fract() != 0.0 => name.to_string(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(2 * operations.len() + 1)
        .y_label_formatter(&label)
        .x_label_formatter(&|value| figures::short(*value))
        .label_style((FAMILY, 15))
        .draw()?;
    for (number, (driver, colour)) in DRIVERS.iter().enumerate() {
        let bar = |row: usize, value: f64| {
            let bottom = (operations.len() - 1 - row) as f64;
            let upper = bottom + 0.9 - 0.4 * number as f64;
            Rectangle::new(
                [(1.0, upper - 0.4), (value.max(1.0), upper)],
                colour.filled(),
            )
        };
        chart
            .draw_series(
                operations
                    .iter()
                    .enumerate()
                    .filter_map(|(row, operation)| {
                        Some(bar(row, figures.get(operation, driver, metric)?))
                    }),
            )?
            .label(*driver)
            .legend(|(x, y)| Rectangle::new([(x, y - 6), (x + 16, y + 6)], colour.filled()));
    }
    legend(&mut chart)
}

fn lines(area: &Area<'_, '_>, figures: &Figures, metric: &str, title: &str) -> Result<()> {
    let points = |driver: &'static str, host: &str| -> Vec<(f64, f64)> {
        let of = |operation: &String| {
            let buffers = operation.strip_prefix("restore_")?.strip_suffix(host)?;
            let buffers = buffers.parse().ok()?;
            Some((buffers, figures.get(operation, driver, metric)?))
        };
        figures.operations.iter().filter_map(of).collect()
    };
    let all: Vec<_> = RESTORES
        .iter()
        .flat_map(|(driver, host, ..)| points(driver, host))
        .collect();
    if all.is_empty() {
        return Ok(());
    }
    let right = all.iter().map(|point| point.0).fold(2.0, f64::max);
    let top = all.iter().map(|point| point.1).fold(1.0, f64::max);
    let bottom = all.iter().map(|point| point.1).fold(top, f64::min);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FAMILY, 24))
        .margin(15)
        .x_label_area_size(50)
        .y_label_area_size(90)
        .build_cartesian_2d(
            (1.0..right * 1.2).log_scale(),
            // Below, there is room for the legend.
            (bottom / 10.0..top * 2.0).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("buffers of 1 MiB")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| figures::short(*value))
        .label_style((FAMILY, 15))
        .draw()?;
    for (driver, host, name, colour) in RESTORES {
        let points = points(driver, host);
        chart.draw_series(
            points
                .iter()
                .map(|point| Circle::new(*point, 5, colour.filled())),
        )?;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(*name)
            .legend(|(x, y)| Rectangle::new([(x, y - 6), (x + 16, y + 6)], colour.filled()));
    }
    legend(&mut chart)
}

fn legend<'a, C>(chart: &mut ChartContext<'a, BitMapBackend<'a>, C>) -> Result<()>
where
    C: CoordTranslate,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font((FAMILY, 16))
        .draw()?;
    Ok(())
}
