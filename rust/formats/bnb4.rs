//! bitsandbytes 4-bit.
