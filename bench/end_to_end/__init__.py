"""Ours against other engines, end to end: `python -m bench.end_to_end`."""
