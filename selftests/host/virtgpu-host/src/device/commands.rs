// SPDX-License-Identifier: GPL-2.0

//! What each command does.

use std::fs::File;

use serde_json::json;
use virtio_gpu_protocol::{
    Command, DisplayOne, Format, Header, Rect, Request, ResponseType, Tail,
    BLOB_FLAG_USE_CROSS_DEVICE, BLOB_FLAG_USE_MAPPABLE, BLOB_FLAG_USE_SHAREABLE, BLOB_MEM_GUEST,
    BLOB_MEM_HOST3D, BLOB_MEM_HOST3D_GUEST, F_BLOB_ALIGNMENT, F_CONTEXT_INIT, F_EDID,
    F_RESOURCE_BLOB, F_RESOURCE_UUID, F_VIRGL, MAX_SCANOUTS,
};
use vm_memory::GuestMemoryMmap;

use super::{invalid, refuse, Device, Done, MapWork, Power, Refusal};
use crate::display::{self, BlobLayout, Scanout, Source};
use crate::options::PAGE_SIZE;
use crate::resource::{Backing, Blob, Image, Kind, Resource};
use crate::sys;

/// The most memory that all resources together may take on the host, in bytes.
const MAX_HOST_MEMORY: u64 = 2 << 30;
/// Width and height of a cursor, in pixels.
const CURSOR_SIZE: u32 = 64;

impl Device {
    fn resource(&mut self, id: u32) -> Result<&mut Resource, Refusal> {
        let broken = self.broken.contains(&id);
        self.resources.get_mut(&id).ok_or_else(|| {
            let rule = if broken {
                "broken-promise"
            } else {
                "unknown-resource"
            };
            refuse(
                ResponseType::ErrInvalidResourceId,
                rule,
                format!("resource {id} does not exist"),
            )
        })
    }

    fn scanout(&mut self, id: u32) -> Result<&mut Scanout, Refusal> {
        usize::try_from(id)
            .ok()
            .and_then(|id| self.scanouts.get_mut(id))
            .ok_or_else(|| {
                refuse(
                    ResponseType::ErrInvalidScanoutId,
                    "unknown-scanout",
                    format!("scanout {id} does not exist"),
                )
            })
    }

    fn need(&self, bit: u32, name: &str) -> Result<(), Refusal> {
        if self.has(bit) {
            return Ok(());
        }
        Err(refuse(
            ResponseType::ErrUnspec,
            "feature",
            format!("{name} was not negotiated"),
        ))
    }

    fn context(&self, header: &Header) -> Result<(), Refusal> {
        self.need(F_VIRGL, "VIRGL")?;
        if self.contexts.contains(&header.ctx_id) {
            return Ok(());
        }
        Err(refuse(
            ResponseType::ErrInvalidContextId,
            "unknown-context",
            format!("context {} does not exist", header.ctx_id),
        ))
    }

    /// Whether a resource with this id and so many bytes can be made.
    fn check_new(&self, id: u32, size: u64) -> Result<(), Refusal> {
        if id == 0 {
            return Err(refuse(
                ResponseType::ErrInvalidResourceId,
                "resource-zero",
                "resource 0 is none",
            ));
        }
        if self.resources.contains_key(&id) {
            return Err(refuse(
                ResponseType::ErrInvalidResourceId,
                "resource-exists",
                format!("resource {id} exists"),
            ));
        }
        let taken: u64 = self.resources.values().map(Resource::host_size).sum();
        if size.saturating_add(taken) > MAX_HOST_MEMORY {
            return Err(refuse(
                ResponseType::ErrOutOfMemory,
                "host-memory",
                format!("{size} bytes are more than is left of {MAX_HOST_MEMORY}"),
            ));
        }
        Ok(())
    }

    fn insert(&mut self, id: u32, resource: Resource) {
        self.broken.remove(&id);
        self.resources.insert(id, resource);
        let most = self.resources.len() as u64;
        let counter = self.record.counters.entry("most_resources".into());
        let counter = counter.or_insert(0);
        *counter = most.max(*counter);
    }

    pub(super) fn execute(
        &mut self,
        mem: &GuestMemoryMmap,
        request: &Request<'_>,
    ) -> Result<Done, Refusal> {
        let header = &request.header;
        let first = self.power == Power::Waking { first: true };
        if first && !matches!(request.command, Command::StatusFreezing { .. }) {
            self.power = Power::Waking { first: false };
        }
        match request.command {
            Command::GetDisplayInfo {} => {
                let mut displays = [DisplayOne::default(); MAX_SCANOUTS];
                let mut left = 0;
                for (display, scanout) in displays.iter_mut().zip(&self.scanouts) {
                    *display = scanout.info(left);
                    // Displays may be as absurd as a test wants them.
                    left = left.wrapping_add(scanout.size.0);
                }
                Ok(Done::DisplayInfo(Box::new(displays)))
            }
            Command::GetEdid { scanout } => {
                self.need(F_EDID, "EDID")?;
                let size = self.scanout(scanout)?.size;
                Ok(Done::Edid(display::edid(scanout, size)))
            }
            Command::ResourceCreate2d {
                resource_id,
                format,
                width,
                height,
            } => {
                let format = known_format(format)?;
                if width == 0 || height == 0 {
                    return Err(invalid("empty-resource", "the resource has no pixels"));
                }
                let size = pixels_size(width, height);
                self.check_new(resource_id, size)?;
                let image = Image::new(format, width, height);
                self.insert(resource_id, Resource::new(Kind::Image(image)));
                Ok(Done::NoData)
            }
            Command::ResourceUnref { resource_id } => {
                self.resource(resource_id)?;
                Ok(Done::Work(self.release(resource_id).into_iter().collect()))
            }
            Command::ResourceAttachBacking { resource_id, .. } => {
                let resource = self.resource(resource_id)?;
                if resource.backing.is_some() {
                    return Err(invalid("backing-exists", "there is backing already"));
                }
                resource.backing = Some(backing(mem, &request.tail)?);
                Ok(Done::NoData)
            }
            Command::ResourceDetachBacking { resource_id } => {
                let resource = self.resource(resource_id)?;
                if resource.backing.take().is_none() {
                    return Err(invalid("no-backing", "there is no backing"));
                }
                Ok(Done::NoData)
            }
            Command::TransferToHost2d {
                r,
                offset,
                resource_id,
            } => self.transfer_2d(mem, r, offset, resource_id),
            Command::SetScanout {
                r,
                scanout_id,
                resource_id,
            } => self.set_scanout(r, scanout_id, resource_id),
            Command::SetScanoutBlob { .. } => self.set_scanout_blob(&request.command),
            Command::ResourceFlush { r, resource_id } => self.flush(mem, r, resource_id),
            Command::ResourceAssignUuid { resource_id } => {
                self.need(F_RESOURCE_UUID, "RESOURCE_UUID")?;
                let number = self.number;
                let resource = self.resource(resource_id)?;
                let uuid = *resource
                    .uuid
                    .get_or_insert_with(|| uuid(resource_id, number));
                Ok(Done::Uuid(uuid))
            }
            Command::UpdateCursor {
                scanout_id,
                x,
                y,
                resource_id,
                hot_x,
                hot_y,
                ..
            } => {
                let image = match resource_id {
                    0 => None,
                    id => Some(self.cursor_image(mem, id)?),
                };
                let cursor = &mut self.scanout(scanout_id)?.cursor;
                cursor.resource_id = resource_id;
                (cursor.x, cursor.y) = (x, y);
                cursor.hot = (hot_x, hot_y);
                cursor.image = image;
                Ok(Done::NoData)
            }
            Command::MoveCursor {
                scanout_id, x, y, ..
            } => {
                let cursor = &mut self.scanout(scanout_id)?.cursor;
                (cursor.x, cursor.y) = (x, y);
                Ok(Done::NoData)
            }
            Command::GetCapsetInfo { capset_index } => usize::try_from(capset_index)
                .ok()
                .and_then(|index| self.options.capsets.get(index))
                .map(|&set| Done::Capset(set))
                .ok_or_else(|| {
                    invalid(
                        "unknown-capset",
                        format!("there is no capability set {capset_index}"),
                    )
                }),
            Command::GetCapset {
                capset_id,
                capset_version,
            } => self
                .options
                .capsets
                .iter()
                .find(|set| set.id == capset_id && capset_version <= set.max_version)
                .map(|set| Done::CapsetData((0..set.size).map(|i| (i ^ set.id) as u8).collect()))
                .ok_or_else(|| {
                    invalid(
                        "unknown-capset",
                        format!("there is no capability set {capset_id} version {capset_version}"),
                    )
                }),
            Command::ResourceCreateBlob { .. } => {
                self.create_blob(mem, header, &request.command, &request.tail)
            }
            Command::ResourceMapBlob {
                resource_id,
                offset,
                ..
            } => self.map_blob(resource_id, offset),
            Command::ResourceUnmapBlob { resource_id } => {
                self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
                match &mut self.resource(resource_id)?.kind {
                    Kind::Blob(blob) if blob.mapped.is_some() => Ok(Done::Work(vec![MapWork {
                        file: None,
                        offset: blob.mapped.take().unwrap_or(0),
                        length: blob.size,
                        resource_id,
                    }])),
                    _ => Err(invalid("not-mapped", "the resource is not mapped")),
                }
            }
            Command::CtxCreate {
                nlen, context_init, ..
            } => {
                self.need(F_VIRGL, "VIRGL")?;
                if nlen > 64 {
                    self.find("context-name", format!("a name of {nlen} bytes"));
                }
                if context_init != 0 {
                    self.need(F_CONTEXT_INIT, "CONTEXT_INIT")?;
                    let set = context_init & 0xff;
                    if !self.options.capsets.iter().any(|known| known.id == set) {
                        let text = format!("there is no capability set {set}");
                        return Err(invalid("unknown-capset", text));
                    }
                }
                if header.ctx_id == 0 || !self.contexts.insert(header.ctx_id) {
                    return Err(refuse(
                        ResponseType::ErrInvalidContextId,
                        "context-exists",
                        format!("context {} exists, or is none", header.ctx_id),
                    ));
                }
                Ok(Done::NoData)
            }
            Command::CtxDestroy {} => {
                self.context(header)?;
                self.contexts.remove(&header.ctx_id);
                for resource in self.resources.values_mut() {
                    resource.contexts.remove(&header.ctx_id);
                }
                Ok(Done::NoData)
            }
            Command::CtxAttachResource { resource_id } => {
                self.context(header)?;
                self.resource(resource_id)?.contexts.insert(header.ctx_id);
                Ok(Done::NoData)
            }
            Command::CtxDetachResource { resource_id } => {
                self.context(header)?;
                if !self.resource(resource_id)?.contexts.remove(&header.ctx_id) {
                    return Err(invalid(
                        "not-attached",
                        "the resource is not attached to the context",
                    ));
                }
                Ok(Done::NoData)
            }
            Command::ResourceCreate3d {
                resource_id,
                format,
                width,
                height,
                depth,
                array_size,
                ..
            } => {
                self.need(F_VIRGL, "VIRGL")?;
                if width == 0 || height == 0 || depth == 0 || array_size == 0 {
                    return Err(invalid("empty-resource", "the resource has no pixels"));
                }
                let size = pixels_size(width, height);
                let (kind, size) = match Format::from_wire(format) {
                    Some(format) if depth == 1 && array_size == 1 => (Some(format), size),
                    _ => (None, 0),
                };
                self.check_new(resource_id, size)?;
                let mut resource = Resource::new(kind.map_or(Kind::Opaque, |format| {
                    Kind::Image(Image::new(format, width, height))
                }));
                resource.is_3d = true;
                self.insert(resource_id, resource);
                Ok(Done::NoData)
            }
            Command::TransferToHost3d { .. } | Command::TransferFromHost3d { .. } => {
                self.context(header)?;
                self.transfer_3d(mem, &request.command)
            }
            Command::Submit3d { .. } => {
                self.context(header)?;
                Ok(Done::NoData)
            }
            Command::StatusFreezing { freezing } => self.set_freezing(freezing),
        }
    }

    fn set_freezing(&mut self, freezing: u32) -> Result<Done, Refusal> {
        if !self.has_freezing() {
            return Err(refuse(
                ResponseType::ErrUnspec,
                "feature",
                "FREEZING was not negotiated",
            ));
        }
        self.asked_to_keep = freezing == 1;
        match freezing {
            0 => {
                if self.power == (Power::Waking { first: true }) && !self.options.lenient_thaw {
                    // Not the guest that was frozen: that one would have looked what is left.
                    let stale = self.resources.len();
                    let work = self.release_all();
                    self.broken.clear();
                    self.power = Power::Awake;
                    self.record.line("released", json!({ "resources": stale }));
                    return Ok(Done::Work(work));
                }
                self.power = Power::Awake;
                Ok(Done::NoData)
            }
            1 => Ok(Done::Promise),
            other => Err(invalid("freezing", format!("freezing is {other}"))),
        }
    }

    fn transfer_2d(
        &mut self,
        mem: &GuestMemoryMmap,
        r: Rect,
        offset: u64,
        id: u32,
    ) -> Result<Done, Refusal> {
        let resource = self.resource(id)?;
        match &mut resource.kind {
            // The memory of a blob is the resource: there is nothing to copy.
            Kind::Blob(_) | Kind::Opaque => Ok(Done::NoData),
            Kind::Image(image) => {
                within(&r, image.width, image.height)?;
                let Some(backing) = &resource.backing else {
                    return Err(invalid("no-backing", "there is no backing"));
                };
                let stride = image.stride();
                image
                    .fill(&r, offset, stride, |at, to| backing.read(mem, at, to))
                    .map_err(|text| invalid("past-backing", text))?;
                Ok(Done::NoData)
            }
        }
    }

    fn transfer_3d(&mut self, mem: &GuestMemoryMmap, command: &Command) -> Result<Done, Refusal> {
        let (Command::TransferToHost3d {
            r#box,
            offset,
            resource_id,
            level,
            stride,
            ..
        }
        | Command::TransferFromHost3d {
            r#box,
            offset,
            resource_id,
            level,
            stride,
            ..
        }) = *command
        else {
            return Ok(Done::NoData);
        };
        let resource = self.resource(resource_id)?;
        let Kind::Image(image) = &mut resource.kind else {
            return Ok(Done::NoData);
        };
        if level != 0 || r#box.z != 0 || r#box.d != 1 {
            return Err(invalid("outside", "a level or layer that does not exist"));
        }
        let r = Rect {
            x: r#box.x,
            y: r#box.y,
            width: r#box.w,
            height: r#box.h,
        };
        within(&r, image.width, image.height)?;
        let Some(backing) = &resource.backing else {
            return Err(invalid("no-backing", "there is no backing"));
        };
        let stride = match stride {
            0 => image.stride(),
            stride => stride.into(),
        };
        if matches!(command, Command::TransferToHost3d { .. }) {
            image.fill(&r, offset, stride, |at, to| backing.read(mem, at, to))
        } else {
            image.drain(&r, offset, stride, |at, from| backing.write(mem, at, from))
        }
        .map_err(|text| invalid("past-backing", text))?;
        Ok(Done::NoData)
    }

    fn set_scanout(&mut self, r: Rect, scanout_id: u32, id: u32) -> Result<Done, Refusal> {
        if id == 0 {
            self.scanout(scanout_id)?.disable();
            return Ok(Done::NoData);
        }
        self.scanout(scanout_id)?;
        let format = match &self.resource(id)?.kind {
            Kind::Image(image) => {
                within(&r, image.width, image.height)?;
                image.format
            }
            // Accepted, as everything else about it, and nothing is shown.
            Kind::Opaque => {
                self.scanout(scanout_id)?.disable();
                return Ok(Done::NoData);
            }
            Kind::Blob(_) => return Err(invalid("blob", "a blob needs SET_SCANOUT_BLOB")),
        };
        self.show(
            scanout_id,
            format,
            Source {
                resource_id: id,
                rect: r,
                blob: None,
            },
        )
    }

    fn set_scanout_blob(&mut self, command: &Command) -> Result<Done, Refusal> {
        let Command::SetScanoutBlob {
            r,
            scanout_id,
            resource_id,
            width,
            height,
            format,
            strides,
            offsets,
            ..
        } = *command
        else {
            return Ok(Done::NoData);
        };
        self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
        let scanout = self.scanout(scanout_id)?;
        if resource_id == 0 {
            scanout.disable();
            return Ok(Done::NoData);
        }
        let Kind::Blob(blob) = &self.resource(resource_id)?.kind else {
            return Err(invalid("not-a-blob", "SET_SCANOUT_BLOB needs a blob"));
        };
        let size = blob.size;
        let format = known_format(format)?;
        within(&r, width, height)?;
        let line = u64::from(width) * u64::from(Format::BYTES);
        if u64::from(strides[0]) < line {
            let text = format!("a stride of {} bytes for {width} pixels", strides[0]);
            return Err(invalid("stride", text));
        }
        let end = u64::from(strides[0])
            .saturating_mul(u64::from(height) - 1)
            .saturating_add(line + u64::from(offsets[0]));
        if end > size {
            let text = format!("the framebuffer ends at {end}, the blob at {size}");
            return Err(invalid("past-backing", text));
        }
        self.show(
            scanout_id,
            format,
            Source {
                resource_id,
                rect: r,
                blob: Some(BlobLayout {
                    format,
                    stride: strides[0],
                    offset: offsets[0],
                }),
            },
        )
    }

    fn show(&mut self, scanout: u32, format: Format, source: Source) -> Result<Done, Refusal> {
        let Rect { width, height, .. } = source.rect;
        // A blob may have the same memory many times over.
        let size = pixels_size(width, height);
        if size > MAX_HOST_MEMORY {
            let text = format!("a display of {size} bytes");
            return Err(refuse(ResponseType::ErrOutOfMemory, "host-memory", text));
        }
        let scanout = self.scanout(scanout)?;
        let fits = scanout
            .screen
            .as_ref()
            .is_some_and(|s| (s.format, s.width, s.height) == (format, width, height));
        if !fits {
            scanout.screen = Some(Image::new(format, width, height));
        }
        scanout.source = Some(source);
        scanout.stale = true;
        Ok(Done::NoData)
    }

    fn flush(&mut self, mem: &GuestMemoryMmap, r: Rect, id: u32) -> Result<Done, Refusal> {
        if let Kind::Image(image) = &self.resource(id)?.kind {
            within(&r, image.width, image.height)?;
        }
        let Some(resource) = self.resources.get(&id) else {
            return Ok(Done::NoData);
        };
        for scanout in &mut self.scanouts {
            let (Some(source), Some(screen)) = (scanout.source, &mut scanout.screen) else {
                continue;
            };
            if source.resource_id != id {
                continue;
            }
            let part = if scanout.stale {
                source.rect
            } else {
                match r.intersect(&source.rect) {
                    Some(part) => part,
                    None => continue,
                }
            };
            let target = Rect {
                x: part.x - source.rect.x,
                y: part.y - source.rect.y,
                ..part
            };
            let copied = match (&resource.kind, source.blob) {
                (Kind::Image(image), _) => {
                    let stride = image.stride();
                    let start = u64::from(part.y) * stride + u64::from(part.x) * 4;
                    screen.fill(&target, start, stride, |at, to| {
                        let at = at as usize;
                        to.copy_from_slice(&image.pixels[at..at + to.len()]);
                        Ok(())
                    })
                }
                (Kind::Blob(_), Some(layout)) => {
                    let stride = u64::from(layout.stride);
                    let start = u64::from(layout.offset)
                        + u64::from(part.y) * stride
                        + u64::from(part.x) * 4;
                    screen.fill(&target, start, stride, |at, to| {
                        resource.read_blob(mem, at, to)
                    })
                }
                _ => Ok(()),
            };
            copied.map_err(|text| invalid("past-backing", text))?;
            scanout.stale = false;
        }
        Ok(Done::NoData)
    }

    fn cursor_image(&mut self, mem: &GuestMemoryMmap, id: u32) -> Result<Image, Refusal> {
        let resource = self.resource(id)?;
        match &resource.kind {
            Kind::Image(image) => {
                if !image.filled {
                    return Err(invalid(
                        "cursor-never-filled",
                        "the cursor was never filled",
                    ));
                }
                if (image.width, image.height) != (CURSOR_SIZE, CURSOR_SIZE) {
                    return Err(invalid(
                        "cursor-size",
                        format!("a cursor of {}x{} pixels", image.width, image.height),
                    ));
                }
                Ok(image.clone())
            }
            Kind::Blob(_) => {
                let mut image = Image::new(Format::B8G8R8A8, CURSOR_SIZE, CURSOR_SIZE);
                resource
                    .read_blob(mem, 0, &mut image.pixels)
                    .map_err(|text| invalid("past-backing", text))?;
                Ok(image)
            }
            Kind::Opaque => Err(invalid("cursor-size", "the cursor has no pixels")),
        }
    }

    fn check_alignment(&mut self, what: &str, number: u64) {
        if let Some(alignment) = self.options.blob_alignment {
            if self.has(F_BLOB_ALIGNMENT) && !number.is_multiple_of(alignment.into()) {
                let text = format!("the {what} {number:#x} is not aligned to {alignment:#x}");
                self.find("blob-alignment", text);
            }
        }
    }

    fn create_blob(
        &mut self,
        mem: &GuestMemoryMmap,
        header: &Header,
        command: &Command,
        tail: &Tail<'_>,
    ) -> Result<Done, Refusal> {
        let Command::ResourceCreateBlob {
            resource_id,
            blob_mem,
            blob_flags,
            nr_entries,
            blob_id,
            size,
        } = *command
        else {
            return Ok(Done::NoData);
        };
        self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
        let known = BLOB_FLAG_USE_MAPPABLE | BLOB_FLAG_USE_SHAREABLE | BLOB_FLAG_USE_CROSS_DEVICE;
        if blob_flags & !known != 0 {
            self.find("flags", format!("undefined blob flags {blob_flags:#x}"));
        }
        if size == 0 {
            return Err(invalid("empty-resource", "the blob has no bytes"));
        }
        self.check_alignment("size", size);
        let host = matches!(blob_mem, BLOB_MEM_HOST3D | BLOB_MEM_HOST3D_GUEST);
        let guest = matches!(blob_mem, BLOB_MEM_GUEST | BLOB_MEM_HOST3D_GUEST);
        if !host && !guest {
            return Err(invalid("blob-mem", format!("blob memory {blob_mem}")));
        }
        if host {
            self.context(header)?;
        }
        if blob_mem == BLOB_MEM_GUEST && blob_id != 0 {
            self.find("blob-id", "a blob of guest memory has no id");
        }
        if guest == (nr_entries == 0) {
            return Err(invalid("blob-entries", format!("{nr_entries} entries")));
        }
        self.check_new(resource_id, if host { size } else { 0 })?;
        let backing = if guest {
            let backing = backing(mem, tail)?;
            if backing.size() < size {
                let text = format!("{} bytes of memory for a blob of {size}", backing.size());
                return Err(invalid("past-backing", text));
            }
            Some(backing)
        } else {
            None
        };
        let file = if host {
            let file = sys::memory_file(size).map_err(|error| {
                refuse(
                    ResponseType::ErrOutOfMemory,
                    "host-memory",
                    error.to_string(),
                )
            })?;
            Some(file)
        } else {
            None
        };
        let mut resource = Resource::new(Kind::Blob(Blob {
            mem: blob_mem,
            flags: blob_flags,
            size,
            host: file,
            mapped: None,
        }));
        resource.backing = backing;
        self.insert(resource_id, resource);
        Ok(Done::NoData)
    }

    fn map_blob(&mut self, resource_id: u32, offset: u64) -> Result<Done, Refusal> {
        self.need(F_RESOURCE_BLOB, "RESOURCE_BLOB")?;
        self.check_alignment("offset", offset);
        let region = self.options.host_visible;
        let taken: Vec<_> = self
            .resources
            .values()
            .filter_map(|resource| match &resource.kind {
                Kind::Blob(blob) => blob.mapped.map(|at| (at, at + blob.size)),
                _ => None,
            })
            .collect();
        let Kind::Blob(blob) = &mut self.resource(resource_id)?.kind else {
            return Err(invalid("not-a-blob", "only a blob can be mapped"));
        };
        if blob.flags & BLOB_FLAG_USE_MAPPABLE == 0 {
            return Err(invalid("not-mappable", "the blob is not mappable"));
        }
        if blob.mapped.is_some() {
            return Err(invalid("mapped-twice", "the blob is mapped already"));
        }
        let end = offset.checked_add(blob.size).filter(|&end| end <= region);
        let Some(end) = end.filter(|_| offset.is_multiple_of(PAGE_SIZE)) else {
            let text = format!("{:#x} bytes at {offset:#x} of {region:#x}", blob.size);
            return Err(invalid("outside", text));
        };
        if taken.iter().any(|&(from, to)| offset < to && from < end) {
            return Err(invalid("overlap", "another blob is mapped there"));
        }
        let Some(Ok(file)) = blob.host.as_ref().map(File::try_clone) else {
            return Err(invalid(
                "not-mappable",
                "the blob has no memory on the host",
            ));
        };
        blob.mapped = Some(offset);
        Ok(Done::Work(vec![MapWork {
            file: Some(file),
            offset,
            length: blob.size,
            resource_id,
        }]))
    }
}

/// The size of so many pixels in bytes, or as much as there is not.
fn pixels_size(width: u32, height: u32) -> u64 {
    (u64::from(width) * u64::from(height)).saturating_mul(Format::BYTES.into())
}

fn known_format(format: u32) -> Result<Format, Refusal> {
    Format::from_wire(format).ok_or_else(|| {
        invalid(
            "unknown-format",
            format!("no format has the number {format}"),
        )
    })
}

fn within(r: &Rect, width: u32, height: u32) -> Result<(), Refusal> {
    if r.is_empty() {
        return Err(invalid("empty-rectangle", "the rectangle has no pixels"));
    }
    if !r.is_within(width, height) {
        let text = format!(
            "{}x{}+{}+{} is outside {width}x{height}",
            r.width, r.height, r.x, r.y
        );
        return Err(invalid("outside", text));
    }
    Ok(())
}

fn backing(mem: &GuestMemoryMmap, tail: &Tail<'_>) -> Result<Backing, Refusal> {
    let Tail::Entries(entries) = tail else {
        return Err(invalid("no-backing", "there are no entries"));
    };
    if entries.is_empty() {
        return Err(invalid("no-backing", "there are no entries"));
    }
    Backing::new(mem, entries.iter()).map_err(|text| invalid("backing-outside-memory", text))
}

/// A UUID that no other resource has, the same in every run (version 8: made as one likes).
fn uuid(resource_id: u32, number: u64) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid[..4].copy_from_slice(&resource_id.to_be_bytes());
    uuid[8..].copy_from_slice(&number.to_be_bytes());
    uuid[6] = 0x80;
    uuid[8] = 0x80;
    uuid
}
