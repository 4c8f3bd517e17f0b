//! Any bytes: a header is read or refused, what is read lies inside the file, and every metadata
//! value decodes or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weightpack::io::memory::MemorySource;
use weightpack::io::{Container, Metadata};

fuzz_target!(|bytes: &[u8]| {
    let source = MemorySource::new("fuzzed", bytes);
    let Ok(header) = Container::Gguf.read_header(&source) else {
        return;
    };
    for entry in &header.entries {
        assert!(entry.bytes == 0 || entry.offset + entry.bytes <= bytes.len() as u64);
    }
    if let Metadata::Gguf(pairs) = &header.metadata {
        for key in pairs.keys() {
            let value = pairs.value(&source, key);
            let carried = pairs.carry(&source, key);
            if header.big_endian {
                assert_eq!(value.is_ok(), carried.is_ok());
            } else {
                assert!(carried.is_ok());
            }
        }
    }
});
