"""Everything that chooses: the training loop, recipes, workloads, and programs that users can copy."""
