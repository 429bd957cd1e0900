"""`python -m bench.serving`: ours and llama.cpp's servers under a load of requests that come at random."""

from bench.serving.command import main

if __name__ == "__main__":
    main()
