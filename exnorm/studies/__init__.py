"""A table of a paper as a plan of runs: which there are, which are done, and the rest run. Imports no torch itself."""
