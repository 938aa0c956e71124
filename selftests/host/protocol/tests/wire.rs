// SPDX-License-Identifier: GPL-2.0

//! Sizes, round trips and malformed input.

use virtio_gpu_protocol::{
    Command, DecodeError, DisplayOne, Entries, Format, Header, MemEntry, Rect, Request, Response,
    ResponseType, Tail, Wire, FLAG_FENCE,
};

fn encode(request: &Request<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    request.encode(&mut |piece| bytes.extend_from_slice(piece));
    bytes
}

/// The sizes of the structures in `linux/virtio_gpu.h`.
#[test]
fn sizes() {
    let sizes = [
        ("GET_DISPLAY_INFO", 24),
        ("RESOURCE_CREATE_2D", 40),
        ("RESOURCE_UNREF", 32),
        ("SET_SCANOUT", 48),
        ("RESOURCE_FLUSH", 48),
        ("TRANSFER_TO_HOST_2D", 56),
        ("RESOURCE_ATTACH_BACKING", 32),
        ("RESOURCE_DETACH_BACKING", 32),
        ("GET_CAPSET_INFO", 32),
        ("GET_CAPSET", 32),
        ("GET_EDID", 32),
        ("RESOURCE_ASSIGN_UUID", 32),
        ("RESOURCE_CREATE_BLOB", 56),
        ("SET_SCANOUT_BLOB", 96),
        ("CTX_CREATE", 96),
        ("CTX_DESTROY", 24),
        ("CTX_ATTACH_RESOURCE", 32),
        ("CTX_DETACH_RESOURCE", 32),
        ("RESOURCE_CREATE_3D", 72),
        ("TRANSFER_TO_HOST_3D", 72),
        ("TRANSFER_FROM_HOST_3D", 72),
        ("SUBMIT_3D", 32),
        ("RESOURCE_MAP_BLOB", 40),
        ("RESOURCE_UNMAP_BLOB", 32),
        ("UPDATE_CURSOR", 56),
        ("MOVE_CURSOR", 56),
        ("STATUS_FREEZING", 32),
    ];
    assert_eq!(sizes.len(), Command::ALL.len());
    for (name, size) in sizes {
        let kind = Command::kind_of(name).unwrap();
        assert_eq!(Command::size(kind), Some(size), "{name}");
        assert_eq!(Command::name_of(kind), Some(name));
    }
    assert_eq!(DisplayOne::SIZE, 24);
    assert_eq!(Response::DisplayInfo(Default::default()).size(), 408);
    assert_eq!(Response::Edid(&[]).size(), 1056);
    assert_eq!(Response::MapInfo(0).size(), 32);
    assert_eq!(Response::Uuid([0; 16]).size(), 40);
}

/// The bytes of one command, spelled out.
#[test]
fn freezing_on_the_wire() {
    let bytes = encode(&Request {
        header: Header {
            flags: FLAG_FENCE,
            fence_id: 0x0102_0304_0506_0708,
            ctx_id: 0,
            ring_idx: 0,
        },
        command: Command::StatusFreezing { freezing: 1 },
        tail: Tail::None,
    });
    #[rustfmt::skip]
    assert_eq!(
        bytes,
        [
            0x00, 4, 0, 0,  1, 0, 0, 0,  8, 7, 6, 5, 4, 3, 2, 1,
            0, 0, 0, 0,  0, 0, 0, 0,  1, 0, 0, 0,  0, 0, 0, 0,
        ]
    );
}

/// Every command survives encoding and decoding, whatever its bytes.
#[test]
fn every_command_round_trips() {
    for &(kind, name) in Command::ALL {
        let size = Command::size(kind).unwrap();
        let mut bytes: Vec<u8> = (0..size).map(|i| i as u8 | 1).collect();
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        // Counts of what follows would otherwise be huge.
        if matches!(name, "RESOURCE_ATTACH_BACKING" | "RESOURCE_CREATE_BLOB") {
            let at = if name == "RESOURCE_CREATE_BLOB" {
                36
            } else {
                28
            };
            bytes[at..at + 4].copy_from_slice(&2u32.to_le_bytes());
            bytes.extend([0x11; 32]);
        } else if name == "SUBMIT_3D" {
            bytes[24..28].copy_from_slice(&3u32.to_le_bytes());
            bytes.extend([1, 2, 3]);
        }
        let (request, findings) = Request::decode(&bytes).unwrap();
        assert_eq!(request.command.kind(), kind);
        assert!(findings.padding && findings.flags && findings.trailing == 0);

        let again = encode(&request);
        assert_eq!(again.len(), bytes.len(), "{name}");
        assert_eq!(Request::decode(&again).unwrap().0, request, "{name}");
    }
}

#[test]
fn short_and_unknown_commands() {
    assert_eq!(Request::decode(&[0; 23]), Err(DecodeError::NoHeader));
    assert!(matches!(
        Request::decode(&[0xff; 24]),
        Err(DecodeError::UnknownType {
            kind: 0xffff_ffff,
            ..
        })
    ));
    for &(kind, name) in Command::ALL {
        let size = Command::size(kind).unwrap();
        let mut bytes = vec![0; size];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        assert!(Request::decode(&bytes).is_ok(), "{name}");
        for length in 24..size {
            assert!(
                matches!(
                    Request::decode(&bytes[..length]),
                    Err(DecodeError::TooShort { needed, .. }) if needed == size as u64
                ),
                "{name}"
            );
        }
        bytes.push(0);
        assert_eq!(Request::decode(&bytes).unwrap().1.trailing, 1, "{name}");
    }
}

#[test]
fn counts_that_lie() {
    let attach = |nr_entries, tail: &[u8]| {
        let mut bytes = encode(&Request {
            header: Header::default(),
            command: Command::ResourceAttachBacking {
                resource_id: 1,
                nr_entries,
            },
            tail: Tail::None,
        });
        bytes.extend_from_slice(tail);
        bytes
    };
    assert!(matches!(
        Request::decode(&attach(u32::MAX, &[0; 64])),
        Err(DecodeError::TooShort { needed, .. }) if needed == 32 + 16 * u64::from(u32::MAX)
    ));
    let bytes = attach(1, &[0; 40]);
    let (request, findings) = Request::decode(&bytes).unwrap();
    assert_eq!(findings.trailing, 24);
    let Tail::Entries(entries) = request.tail else {
        panic!("no entries");
    };
    assert_eq!(entries.len(), 1);

    let mut entry = [0; 16];
    entry[12] = 1;
    assert!(Request::decode(&attach(1, &entry)).unwrap().1.padding);
}

#[test]
fn entries() {
    let mut bytes = Vec::new();
    let entry = MemEntry {
        addr: 0x1_2345_6000,
        length: 0x1000,
        padding: 0,
    };
    entry.put(&mut |piece| bytes.extend_from_slice(piece));
    bytes.push(0);
    let entries = Entries::new(&bytes);
    assert_eq!(entries.iter().collect::<Vec<_>>(), [entry]);
    assert!(!entries.is_empty());
}

#[test]
fn responses_round_trip() {
    let header = Header {
        flags: FLAG_FENCE,
        fence_id: 9,
        ctx_id: 3,
        ring_idx: 1,
    };
    let mut displays = [DisplayOne::default(); 16];
    displays[3].r.width = 640;
    displays[3].enabled = 1;
    for response in [
        Response::NoData,
        Response::DisplayInfo(displays),
        Response::CapsetInfo {
            id: 4,
            max_version: 1,
            max_size: 160,
        },
        Response::Capset(&[1, 2, 3]),
        Response::Edid(&[0xff; 128]),
        Response::Uuid([7; 16]),
        Response::MapInfo(1),
        Response::Error(ResponseType::ErrInvalidResourceId),
    ] {
        let mut bytes = Vec::new();
        response.encode(&header, &mut |piece| bytes.extend_from_slice(piece));
        assert_eq!(bytes.len(), response.size());
        assert_eq!(Response::decode(&bytes), Some((header, response)));
        let shorter = &bytes[..bytes.len() - 1];
        assert!(matches!(
            Response::decode(shorter),
            None | Some((_, Response::Capset(_)))
        ));
    }
    // An EDID that says it is longer than its place.
    let mut bytes = Vec::new();
    Response::Edid(&[0; 128]).encode(&header, &mut |piece| bytes.extend_from_slice(piece));
    bytes[24..28].copy_from_slice(&1025u32.to_le_bytes());
    assert_eq!(Response::decode(&bytes), None);
}

#[test]
fn rectangles() {
    let rect = |x, y, width, height| Rect {
        x,
        y,
        width,
        height,
    };
    assert!(rect(10, 10, 90, 90).is_within(100, 100));
    assert!(!rect(10, 10, 91, 90).is_within(100, 100));
    assert!(!rect(u32::MAX, 0, 2, 1).is_within(u32::MAX, 1));
    assert_eq!(
        rect(0, 0, 10, 10).intersect(&rect(5, 6, 10, 10)),
        Some(rect(5, 6, 5, 4))
    );
    assert_eq!(rect(0, 0, 10, 10).intersect(&rect(10, 0, 1, 1)), None);
    assert_eq!(
        rect(0, 0, u32::MAX, u32::MAX).intersect(&rect(u32::MAX - 1, 0, u32::MAX, 1)),
        Some(rect(u32::MAX - 1, 0, 1, 1))
    );
}

#[test]
fn formats() {
    for format in 0..200 {
        let Some(known) = Format::from_wire(format) else {
            continue;
        };
        assert_eq!(known as u32, format);
        let rgba = known.rgba([1, 2, 3, 4]);
        assert_eq!(rgba[3] == 255, !known.has_alpha());
    }
    assert_eq!(Format::B8G8R8X8.rgba([1, 2, 3, 4]), [3, 2, 1, 255]);
}
