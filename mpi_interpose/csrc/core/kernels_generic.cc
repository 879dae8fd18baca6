// The generic build of the kernels; build.py compiles this file with the flags of that instruction set.
#define UNDERTOW_ISA kKernelsGeneric
#define UNDERTOW_ISA_NAME "generic"
#include "kernels.inc"
