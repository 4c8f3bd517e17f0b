//! The engine: a pure plan, then a bounded pipeline.
//!
//! | part | does |
//! |---|---|
//! | [`checkpoint`] | opens files and finds the logical tensors in them |
//! | [`request`], [`plan`], `assign`, `memory`, `identity` | what is asked for; everything that will be written, from headers alone |
//! | `derive`, `gather`, `transpose`, `decoded` | tensors made of rows of stored ones, in another shape, transposed, or decoded first |
//! | `importance` | importance vectors, loaded while their tensor is encoded |
//! | [`run`] | workers that carry the plan out, slab by slab |
//! | [`fill`] | tensors of a file into arrays of the caller, encoded on the way |
//! | `slab` | decode, encode and measure a slab while it is in cache |
//! | `two_pass`, `shared_scale` | the first pass of formats that need the whole tensor first, or several |
//! | `keeper`, `journal`, `workspace` | nothing lost: sync, record, commit by rename |
//! | `carry`, `leftovers` | files of a folder that outlive its model; what killed runs left |
//! | [`array`], `exchanged` | encode and decode an array in memory |
//! | [`writer`] | a file made from arrays in memory |
//! | [`read`], [`compare`] | decode a tensor; error sums of two checkpoints |
//! | [`verify`] | look through every block for scales that cannot be meant |

pub mod array;
mod assign;
mod carry;
pub mod checkpoint;
pub mod compare;
mod decoded;
mod derive;
mod describe;
mod exchanged;
mod extra;
pub mod fill;
mod gather;
mod identity;
mod importance;
mod journal;
mod keeper;
mod leftovers;
mod memory;
mod metadata;
mod pieces;
pub mod plan;
mod pool;
mod preflight;
pub mod read;
pub mod recognise;
pub mod report;
pub mod request;
pub mod run;
mod shards;
mod shared_scale;
mod slab;
mod transpose;
mod two_pass;
pub mod verify;
mod workspace;
pub mod writer;

pub use carry::Keep;
pub use checkpoint::Checkpoint;
pub use plan::Plan;
pub use request::Request;
pub use run::{run, run_beside, Progress, RunChoices};
