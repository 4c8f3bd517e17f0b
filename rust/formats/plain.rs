//! Casts.
