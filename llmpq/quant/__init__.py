"""L1: quantized weights. The packed format, the tensor that carries it, and the quantizers that make it."""

from llmpq.quant.packing import pack, unpack
from llmpq.quant.rtn import quantize
from llmpq.quant.tensor import QuantTensor

__all__ = ["QuantTensor", "pack", "quantize", "unpack"]
