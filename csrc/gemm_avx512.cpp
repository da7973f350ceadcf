#define TRIMPOT_ISA avx512
#define TRIMPOT_ISA_NAME "avx512"
#define TRIMPOT_FAST_INT16 true
#define TRIMPOT_GEMM_AVX512 1
#include "gemm_isa.inc"
