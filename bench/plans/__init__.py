"""How good plans are: measured on emulated clusters, and on paper."""
