"""Networks of other projects, from their own configurations and checkpoints."""
