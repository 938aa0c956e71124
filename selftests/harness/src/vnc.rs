// SPDX-License-Identifier: GPL-2.0

//! A VNC client that does one thing: it says how large its window is.
//!
//! That is how a display of stock QEMU changes from the outside: the window's size becomes the head's size in the GPU's display
//! info, and a head whose window is gone (0x0) is disabled.

use std::io::{
    Read,
    Write, //
};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{
    Context,
    Result,
    ensure, //
};

const VERSION: &[u8; 12] = b"RFB 003.008\n";
const SECURITY_NONE: u8 = 1;
const SET_ENCODINGS: u8 = 2;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
const SET_DESKTOP_SIZE: u8 = 251;

/// A window on a head.
pub struct Window(UnixStream);

impl Window {
    /// Opens a window on the head that the server at `path` shows.
    pub fn open(path: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        let mut version = [0; VERSION.len()];
        stream.read_exact(&mut version)?;
        ensure!(&version == VERSION, "the VNC server speaks {version:?}");
        stream.write_all(VERSION)?;

        let mut kinds = [0];
        stream.read_exact(&mut kinds)?;
        let mut kinds = vec![0; kinds[0].into()];
        stream.read_exact(&mut kinds)?;
        ensure!(
            kinds.contains(&SECURITY_NONE),
            "the VNC server wants a password"
        );
        stream.write_all(&[SECURITY_NONE])?;
        let mut result = [0; 4];
        stream.read_exact(&mut result)?;
        ensure!(result == [0; 4], "the VNC server turns us away");

        const SHARED: u8 = 1;
        stream.write_all(&[SHARED])?;
        // Size, pixel format, and the length of the name that follows.
        let mut greeting = [0; 24];
        stream.read_exact(&mut greeting)?;
        let length = u32::from_be_bytes(*greeting.last_chunk().expect("it is longer"));
        stream.read_exact(&mut vec![0; length as usize])?;

        let mut message = vec![SET_ENCODINGS, 0, 0, 1];
        message.extend(EXTENDED_DESKTOP_SIZE.to_be_bytes());
        stream.write_all(&message)?;
        Ok(Self(stream))
    }

    /// Gives the window another size.
    pub fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        const SCREENS: u8 = 1;
        let mut message = vec![SET_DESKTOP_SIZE, 0];
        message.extend([width, height].map(u16::to_be_bytes).concat());
        message.extend([SCREENS, 0]);
        // The only screen: id, position, size, flags.
        message.extend(0u32.to_be_bytes());
        message.extend([0, 0, width, height].map(u16::to_be_bytes).concat());
        message.extend(0u32.to_be_bytes());
        self.0.write_all(&message)?;
        Ok(())
    }
}
