"""sbatch templates; imports nothing."""
