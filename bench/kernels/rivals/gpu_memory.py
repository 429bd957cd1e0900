"""Reading a GPU's memory and nothing else: what a product with few rows cannot be faster than."""

from __future__ import annotations

import torch

from bench.kernels import gpu_ceilings
from bench.kernels.rivals import Contender, Problem

_PROGRAMS_PER_SM = 8


def contender(problem: Problem) -> Contender:
    """Its nbytes are not those of a weight: times are scaled to the bytes of what it is compared with."""
    device = problem.weight.device
    source = torch.ones(gpu_ceilings.whole_blocks(problem.rotated_bytes), dtype=torch.int32, device=device)
    programs = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    read = gpu_ceilings.reader(source, programs)
    return Contender(source.nbytes, 1, None, lambda x: read)
