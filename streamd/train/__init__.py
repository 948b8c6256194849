"""Fine-tune the models that the daemon runs: data, losses, the loop, and what a run leaves behind."""
