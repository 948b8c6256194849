"""Read data sets of several formats, and find what is wrong with them."""
