//! Any bytes: a header is read or refused, and what is read lies inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weightpack::io::memory::MemorySource;
use weightpack::io::Container;

fuzz_target!(|bytes: &[u8]| {
    let source = MemorySource::new("fuzzed", bytes);
    if let Ok(header) = Container::Safetensors.read_header(&source) {
        let stored: u64 = header.entries.iter().map(|entry| entry.bytes).sum();
        assert_eq!(header.header_bytes + stored, bytes.len() as u64);
    }
});
