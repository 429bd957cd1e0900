"""`python -m bench.predictions`: predictions against runs."""

from bench.predictions.runs import main

main()
