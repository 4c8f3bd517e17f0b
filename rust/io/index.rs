//! Shard indexes.
