"""A simulator of the T3 paper: track-and-trigger hardware, near-memory reduction, arbitration of memory bandwidth."""
