"""Learning methods from the literature as workloads: each checks its paper's claim at small scale, and the toolkit."""
