"""Ours and llama.cpp's servers under a load of requests that come at random."""
