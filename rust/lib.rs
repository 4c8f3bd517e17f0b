//! weightpack: packs model weights on any CPU.
//!
//! The crate is the byte work of the Python package of the same name and is usable without
//! Python. Layers, lowest first (a module may use those before it):
//!
//! | module | holds |
//! |---|---|
//! | [`error`], [`dtype`], [`shape`] | the one error enum, the one type table, checked size arithmetic |
//! | [`bits`], [`codebook`] | bit packing, the fixed tables of 4-bit and 8-bit codes |
//! | `kernels` | SIMD versions of the inner loops, chosen once at run time |
//! | [`float`], [`float8`] | conversions between stored floats and `f32` |
//! | [`formats`] | numeric layouts: what is stored for a tensor, and how to encode and decode it |
//! | [`io`] | containers: safetensors and GGUF files, shard indexes |
//! | [`engine`] | plan, run, finish: a checkpoint in, a packed checkpoint out |
//! | `py` | thin Python bindings (feature `python`) |

pub mod bits;
pub mod codebook;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod float;
pub mod float8;
pub mod formats;
pub mod io;
#[doc(hidden)]
pub mod kernels;
#[cfg(feature = "python")]
mod py;
pub mod shape;

pub use error::{Error, Result};
