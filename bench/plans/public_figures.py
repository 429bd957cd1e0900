"""Public figures that analytic devices are made of: what data sheets say of devices, and the sizes of models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmpq.spec import ModelSpec

MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """One device as its data sheet has it: peaks, and what is left of its memory for a plan."""

    kind: Literal["cpu", "cuda"]
    memory_bytes: int  # for weights, cache and buffers
    bytes_per_s: float  # of its memory
    flop_per_s: float  # 16-bit products, dense, summed in float32
    link_bytes_per_s: float  # to another device of its node, one direction
    source: str


def _usable(gib: float) -> int:
    """What LLM-PQ's planner leaves for a plan of a GPU's memory: 95 % of it without 1930 MiB."""
    return round(0.95 * gib * 1024 - 1930) * MIB


PCIE_3, PCIE_4, PCIE_5 = 15.75e9, 31.5e9, 63e9  # 16 lanes, one direction (PCI-SIG)

# Peaks of GeForce cards are those with sums in float32, half of what is printed largest.
DEVICES = {
    "P100": Figures(
        "cuda",
        _usable(11.91),
        549e9,
        18.7e12,
        PCIE_3,
        "NVIDIA Tesla P100 PCIe data sheet (12 GB)",
    ),
    "T4": Figures("cuda", _usable(14.76), 320e9, 65e12, PCIE_3, "NVIDIA T4 data sheet"),
    "V100": Figures("cuda", _usable(31.74), 900e9, 125e12, 150e9, "NVIDIA V100 data sheet (SXM2, 32 GB)"),
    "A100-40": Figures("cuda", _usable(39.4), 1555e9, 312e12, 300e9, "NVIDIA A100 data sheet (SXM, 40 GB)"),
    "A800-80": Figures(
        "cuda",
        _usable(79.0),
        2039e9,
        312e12,
        200e9,
        "NVIDIA A100 data sheet (SXM, 80 GB), with the A800's NVLink of 400 GB/s",
    ),
    "H100": Figures("cuda", _usable(79.0), 3350e9, 989e12, 450e9, "NVIDIA H100 data sheet (SXM, 80 GB)"),
    "L4": Figures("cuda", _usable(22.5), 300e9, 121e12, PCIE_4, "NVIDIA L4 data sheet (half of what sparsity gives)"),
    "RTX 4090": Figures(
        "cuda", _usable(23.6), 1008e9, 165.2e12, PCIE_4, "NVIDIA Ada GPU architecture white paper, appendix A"
    ),
    "RTX 3060": Figures(
        "cuda",
        _usable(11.8),
        360e9,
        25.5e12,
        PCIE_4,
        "GeForce RTX 3060 specifications (12 GB): 112 tensor cores at 1.777 GHz; "
        "64 products a cycle in each by the NVIDIA Ampere GA102 white paper",
    ),
    "CPU host": Figures(
        "cpu",
        256 * 1024 * MIB,
        460.8e9,
        14.7e12,
        PCIE_5,
        "AMD EPYC 9654 specifications: 96 cores at 2.4 GHz, twelve channels of DDR5-4800; "
        "64 operations a cycle in each on bfloat16, and on two int8 terms (Zen 4: two 256-bit units)",
    ),
}


_LLAMA_2_70B = ModelSpec(
    name="Llama-2-70B",
    content_hash="0" * 16,
    num_layers=80,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=28672,
    vocab_size=32000,
    max_positions=4096,
    dtype="float16",
    tied_embeddings=False,
    embedding_dim=8192,
    norm_eps=1e-5,
    norm="rms",
    activation="silu",
    gated_mlp=True,
    final_norm=True,
    position_offset=None,
    eos_token_ids=(2,),
    bos_token_id=1,
)


def _decoder(
    name: str, num_layers: int, hidden_size: int, num_heads: int, *, vocab_size: int, learned_positions: bool
) -> ModelSpec:
    """A model of OPT's shape: heads of their own keys, four times the hidden size in the MLP, a tied table."""
    return replace(
        _LLAMA_2_70B,
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_positions=2048,
        tied_embeddings=True,
        embedding_dim=hidden_size,
        norm="layer",
        gated_mlp=False,
        activation="relu" if learned_positions else "gelu",
        biases=("qkv", "out", "up", "down"),
        position_offset=2 if learned_positions else None,  # BLOOM's ALiBi has no table of positions
        bos_token_id=None,
    )


# Sizes from each model's published configuration; BLOOM is planned for as a model of OPT's shape, which it nearly is.
MODELS = {
    spec.name: spec
    for spec in (
        _decoder("OPT-13b", 40, 5120, 40, vocab_size=50272, learned_positions=True),
        _decoder("OPT-30b", 48, 7168, 56, vocab_size=50272, learned_positions=True),
        _decoder("OPT-66b", 64, 9216, 72, vocab_size=50272, learned_positions=True),
        _decoder("BLOOM-176b", 70, 14336, 112, vocab_size=250880, learned_positions=False),
        _LLAMA_2_70B,
    )
}
