"""Templates for Slurm, a command that fills them, and the check that a job runs on each node first."""
