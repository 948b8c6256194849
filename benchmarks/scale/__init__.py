"""What a stream, and what a message, costs a machine: the numbers behind docs/scaling.md."""
