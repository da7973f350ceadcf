#define TRIMPOT_ISA generic
#define TRIMPOT_ISA_NAME "generic"
#define TRIMPOT_FAST_INT16 false

#include "gemm_isa.inc"
