//! GGML basic blocks.
