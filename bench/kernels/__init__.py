"""Speed of the kernels, beside other libraries and the machine's limits."""
