"""L1: quantized weights. The packed format, the tensor that carries it, and the quantizers that make it.

And quantized activations (activations.py), which exist within a product only.
"""

from llmpq.quant.packing import pack, unpack
from llmpq.quant.rtn import quantize
from llmpq.quant.tensor import QuantTensor

__all__ = ["QuantTensor", "pack", "quantize", "unpack"]
