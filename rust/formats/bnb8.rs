//! bitsandbytes int8.
