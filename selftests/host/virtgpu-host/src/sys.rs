// SPDX-License-Identifier: GPL-2.0

//! The things that the standard library has no safe call for.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, FromRawFd};
use std::os::unix::net::UnixStream;

/// Anonymous memory of `size` bytes that can be mapped by others.
pub fn memory_file(size: u64) -> io::Result<File> {
    const NAME: &CStr = c"virtgpu-host blob";
    // SAFETY: The name is a C string; the call has no other requirements.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The descriptor was just opened, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

/// The descriptors that this process has open.
pub fn open_descriptors() -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        if let Some(number) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// Another descriptor for the one end of a socket pair that was opened since `known` was taken.
///
/// The channel from back-end to front-end is kept by the `vhost` crate, which has no call to send
/// that the configuration space changed. It is the only unnamed, connected Unix socket that this
/// process is handed: those that were accepted have the name of their listener.
pub fn find_channel(known: &[i32]) -> io::Result<UnixStream> {
    let mut found = None;
    for number in open_descriptors()? {
        if known.contains(&number) {
            continue;
        }
        // SAFETY: The number may have been closed since it was read, as the descriptor of the
        // directory itself was; then the call fails, and touches nothing.
        let Ok(fd) = unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned() else {
            continue;
        };
        let socket = UnixStream::from(fd);
        let unnamed = |address: io::Result<std::os::unix::net::SocketAddr>| {
            address.is_ok_and(|address| address.is_unnamed())
        };
        if unnamed(socket.local_addr()) && unnamed(socket.peer_addr()) {
            found = Some((number, socket));
        }
    }
    found
        .map(|(_, socket)| socket)
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

/// Tells the front-end that the configuration space changed: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,
/// protocol version 1, without a payload.
pub fn send_config_change(channel: &UnixStream) -> io::Result<()> {
    let message: Vec<u8> = [2u32, 1, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
    // In one piece: the crate sends its own messages on the same socket.
    match (&mut &*channel).write(&message)? {
        sent if sent == message.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
