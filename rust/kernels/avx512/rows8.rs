//! Rows of one byte per weight.

crate::kernels::row8_bodies::row8_bodies!("avx512f,avx512bw,avx512dq,avx512vl");
