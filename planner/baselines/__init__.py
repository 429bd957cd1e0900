"""What other systems would do with the same devices, in the same cost model."""
