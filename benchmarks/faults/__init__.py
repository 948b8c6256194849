"""Every fault of the catalogue against one real daemon: what it does to the stream, and to the others.

python -m benchmarks.faults                     all rows; writes docs/faults.md and benchmarks/results/faults.json
python -m benchmarks.faults --rows 1,10-12      some rows; prints only
"""
