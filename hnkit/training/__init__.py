"""Training of noise hypernetworks: the run, its samples, its optimiser, its checkpoints and its report."""
