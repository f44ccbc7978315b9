"""Many runs: a grid, the seeds, and the arms of the remedies with their table."""
