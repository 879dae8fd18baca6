// The avx512 build of the kernels; build.py compiles this file with the flags of that instruction set.
#define UNDERTOW_ISA kKernelsAvx512
#define UNDERTOW_ISA_NAME "avx512"
#include "kernels.inc"
