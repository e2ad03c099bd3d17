"""`make gpu-report`: everything that waits for a GPU, in one run with a budget; see `__main__`."""
