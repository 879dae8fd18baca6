"""Block attention with log-sum-exp: one file per backend, all with the signature that `types` states."""
