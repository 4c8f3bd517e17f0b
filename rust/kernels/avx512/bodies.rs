//! Portable bodies, as the compiler makes vectors of them.

crate::kernels::bodies::bodies!(avx512, "avx512f,avx512bw,avx512dq,avx512vl");
