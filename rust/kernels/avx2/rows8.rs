//! Rows of one byte per weight.

crate::kernels::row8_bodies::row8_bodies!("avx2,fma");
