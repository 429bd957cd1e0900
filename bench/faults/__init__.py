"""What can go wrong outside of llmpq is made to go wrong, and how it ends is counted.

`files.inject(seed, count)` returns Counts for each kind of fault, and so does each other module of faults.
"""
