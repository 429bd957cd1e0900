"""The tables of the README files, made from bench/results."""
