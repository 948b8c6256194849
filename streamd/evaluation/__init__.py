"""Measure a model on a data set through the code that the daemon runs, and draw what came out."""
