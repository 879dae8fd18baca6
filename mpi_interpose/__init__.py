"""An LD_PRELOAD MPI datatype interposer (csrc/) and its launcher; imports nothing else of the package."""
