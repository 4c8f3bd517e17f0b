//! Any bytes: an index is read or refused, and its shards are plain file names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weightpack::io::index;
use weightpack::io::memory::MemorySource;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = index::read(&MemorySource::new("fuzzed", bytes)) {
        for shard in index.shards() {
            assert!(shard.ends_with(".safetensors") && !shard.contains(['/', '\\']));
        }
    }
});
