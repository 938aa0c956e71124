// SPDX-License-Identifier: GPL-2.0

//! Whatever the bytes, the decoder neither panics nor loses anything: what it accepted encodes to
//! the same bytes, but for padding and what came after the end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_gpu_protocol::{Command, DecodeError, Request, Response, Tail};

fuzz_target!(|bytes: &[u8]| {
    match Request::decode(bytes) {
        Ok((request, findings)) => {
            let mut again = Vec::new();
            request.encode(&mut |piece| again.extend_from_slice(piece));
            assert_eq!(again.len() + findings.trailing, bytes.len());
            if !findings.padding {
                assert_eq!(again, bytes[..again.len()]);
            }
            let (decoded, _) = Request::decode(&again).expect("what was encoded decodes");
            assert_eq!(decoded, request);

            let mut numbers = 0u64;
            request.command.fields(&mut |_, value| {
                value.each(&mut |number| numbers = numbers.wrapping_add(number));
            });
            if let Tail::Entries(entries) = request.tail {
                assert_eq!(entries.iter().count(), entries.len());
            }
            assert_eq!(Command::kind_of(request.command.name()), Some(request.command.kind()));
        }
        Err(DecodeError::NoHeader) => assert!(bytes.len() < 24),
        Err(DecodeError::UnknownType { kind, .. }) => assert_eq!(Command::name_of(kind), None),
        Err(DecodeError::TooShort { needed, .. }) => assert!(needed > bytes.len() as u64),
    }
    if let Some((header, response)) = Response::decode(bytes) {
        let mut again = Vec::new();
        response.encode(&header, &mut |piece| again.extend_from_slice(piece));
        assert_eq!(Response::decode(&again), Some((header, response)));
    }
});
