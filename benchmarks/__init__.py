"""What is measured, how, and the committed results; benchmarks/README.md explains both."""
