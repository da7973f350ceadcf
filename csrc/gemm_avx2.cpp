#define TRIMPOT_ISA avx2
#define TRIMPOT_ISA_NAME "avx2"
#define TRIMPOT_FAST_INT16 true

#include "gemm_isa.inc"
