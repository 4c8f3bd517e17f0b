//! Portable bodies, as the compiler makes vectors of them.

crate::kernels::bodies::bodies!(avx2, "avx2,fma");
