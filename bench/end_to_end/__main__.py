"""`python -m bench.end_to_end`: ours against other engines, end to end."""

from bench.end_to_end.command import main

main()
