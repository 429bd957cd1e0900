"""L5: what devices cost, how much layers mind being quantized, and how good the result is."""
