"""What knows nothing of RLHF: cores, packed rows, an optimiser, files, jobs and intervals."""
