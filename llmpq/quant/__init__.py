"""L1: quantized weights. The packed format, the tensor that carries it, and the quantizers that make it.

And quantized activations (activations.py), which exist within a product only.
"""

from llmpq.quant.packing import pack, unpack
from llmpq.quant.quantizers import quantize
from llmpq.quant.tensor import CHUNK, InputStatistics, QuantTensor

__all__ = ["CHUNK", "InputStatistics", "QuantTensor", "pack", "quantize", "unpack"]
