"""L5: what devices cost, what layers lose when they are quantized, and how good the result is."""
