"""L4: the one decoder that runs every model family, its KV cache, and loading."""
