"""Studies: list the runs of a paper's table, find the finished ones and run the rest. Does not import torch itself."""
