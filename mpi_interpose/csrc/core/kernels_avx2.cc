// The avx2 build of the kernels; build.py compiles this file with the flags of that instruction set.
#define UNDERTOW_ISA kKernelsAvx2
#define UNDERTOW_ISA_NAME "avx2"
#include "kernels.inc"
