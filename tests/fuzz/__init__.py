"""What comes from outside, as functions of bytes: each may raise what streamd documents, and nothing else.

tests/test_fuzz.py runs them on some hundred inputs; `python -m tests.fuzz NAME` runs one by atheris for any time.
"""
