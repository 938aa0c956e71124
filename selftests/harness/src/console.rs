// SPDX-License-Identifier: GPL-2.0

//! The text console, and the screens that it must lead to.
//!
//! The font is the kernel's; which one, is not for us to know. So the glyphs are learnt from the screen once, and every later
//! picture is calculated from them.

use std::collections::{
    HashMap,
    HashSet, //
};

use anyhow::{
    Result,
    ensure, //
};
use image::{
    GenericImageView,
    Rgb,
    RgbImage,
    imageops, //
};

use crate::screen;
use crate::vm::Vm;

/// Size of a glyph in pixels.
const GLYPH: (u32, u32) = (8, 16);

/// Every printable character of ASCII but the space.
const CHARACTERS: std::ops::RangeInclusive<char> = '!'..='~';

/// The console on the first terminal.
pub struct Console {
    glyphs: HashMap<char, RgbImage>,
    expected: RgbImage,
    heads: u32,
}

impl Console {
    /// Clears the terminal, without a cursor that would blink, and learns its font. All heads show the same.
    pub fn new(vm: &mut Vm, heads: u32) -> Result<Self> {
        let alphabet: String = CHARACTERS.collect();
        // Unless the text is the only thing on the screen, it is not learnt from.
        write(vm, "\\033[?25l\\033[2J\\033[H")?;
        let size = screen::dump(vm, 0)?.dimensions();
        let black = RgbImage::new(size.0, size.1);
        screen::expect(vm, 0, "an empty console", &black)?;

        write(vm, &format!("\\033[H{}", escape(&alphabet)))?;
        let learnt = |picture: &RgbImage| {
            let mut seen = HashSet::new();
            let cells = (0..)
                .zip(CHARACTERS)
                .all(|(column, _)| seen.insert(cell(picture, column)));
            cells && !seen.contains(&RgbImage::new(GLYPH.0, GLYPH.1)) && is_below_black(picture)
        };
        let (picture, right) = screen::watch(vm, 0, screen::SCREEN_LIMIT, learnt)?;
        if !right {
            picture.save(vm.dir.join("console-seen.png"))?;
        }
        ensure!(
            right,
            "the console does not show a character of its own for each of {alphabet}"
        );
        let glyphs = (0..)
            .zip(CHARACTERS)
            .map(|(column, character)| (character, cell(&picture, column)));
        let mut console = Self {
            glyphs: glyphs.collect(),
            expected: black,
            heads,
        };
        ensure!(
            console.glyphs[&'A'] != console.glyphs[&'B'],
            "the font has one glyph for all"
        );
        console.expected = picture;
        console.expect(vm)?;
        Ok(console)
    }

    /// Writes a line of text, counted from 0, and expects it, and all the others, on every screen.
    pub fn write(&mut self, vm: &mut Vm, line: u32, text: &str) -> Result<()> {
        write(vm, &format!("\\033[{};1H{}", line + 1, escape(text)))?;
        for (column, character) in (0..).zip(text.chars()) {
            if let Some(glyph) = self.glyphs.get(&character) {
                imageops::replace(
                    &mut self.expected,
                    glyph,
                    column * i64::from(GLYPH.0),
                    (line * GLYPH.1).into(),
                );
            }
        }
        self.expect(vm)
    }

    /// Expects on every screen what has been written.
    pub fn expect(&self, vm: &mut Vm) -> Result<()> {
        for head in 0..self.heads {
            screen::expect(vm, head, "the console's text", &self.expected)?;
        }
        Ok(())
    }
}

/// Returns the cell in column `column` of the first line.
fn cell(picture: &RgbImage, column: u32) -> RgbImage {
    picture
        .view(column * GLYPH.0, 0, GLYPH.0, GLYPH.1)
        .to_image()
}

/// Whether there is nothing below the first line.
fn is_below_black(picture: &RgbImage) -> bool {
    let first = (GLYPH.1 * picture.width()) as usize;
    picture
        .pixels()
        .skip(first)
        .all(|pixel| *pixel == Rgb([0, 0, 0]))
}

fn write(vm: &mut Vm, format: &str) -> Result<()> {
    vm.run(&format!("printf '{format}' > /dev/tty1"))?;
    Ok(())
}

/// Writes a text so that the shell and its printf leave it as it is.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('%', "%%")
        .replace('\'', "'\\''")
}
