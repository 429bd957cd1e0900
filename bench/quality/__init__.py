"""Perplexity of the weights as served."""
