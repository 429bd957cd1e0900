"""Native: quantized tensors of GGUF files, held and multiplied as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmpq import kernels
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.models.decoder_stage import build_stage
from llmpq.quant import quantize
from llmpq.spec import NATIVE, W16, InvalidField, ModelSpec, Precision
from tests.support.decoding import CPU, single_plan
from tests.support.gguf_files import write_gguf
from tests.support.target import require_backend

Q4_0 = Precision(4, 32, "sym", "gguf")
Q4_1 = Precision(4, 32, "offset", "gguf")
Q8_0 = Precision(8, 32, "sym", "gguf")
TYPES = {  # of each fused linear one, and all three in a layer
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "Q4_1"),
    "o_proj": "Q8_0",
    **dict.fromkeys(("gate_proj", "up_proj"), "Q4_0"),
    "down_proj": "Q4_1",
    "embed_tokens": "Q8_0",
    "lm_head": "Q4_0",
}
WIDER = {  # the same of types that are wider here than in the file
    **dict.fromkeys(("q_proj", "v_proj"), "Q5_0"),
    "k_proj": "Q8_0",
    "o_proj": "MXFP4",
    **dict.fromkeys(("gate_proj", "up_proj"), "Q5_1"),
    "down_proj": "Q5_0",
    "embed_tokens": "Q5_1",
    "lm_head": "MXFP4",
}


def native(folder: Path, types: dict[str, str], tied: bool = False) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The spec of a model written to folder/tiny.gguf, and its weights by transformers' names."""
    model = write_gguf(folder / "tiny.gguf", "llama-tied" if tied else "llama-gqa", types=types)
    return load_spec(resolve(str(folder / "tiny.gguf"))), dict(model.named_parameters())


def test_a_linear_is_native_if_all_its_parts_are_stored_in_one_precision_that_kernels_read(tmp_path: Path) -> None:
    spec, _ = native(tmp_path, TYPES)
    layer = {"qkv": Q4_1, "out": Q8_0, "up": Q4_0, "down": Q4_1}
    assert spec.stored == {
        "embedding": {"table": Q8_0},
        **{f"layer.{i}": layer for i in range(3)},
        "head": {"table": Q4_0},
    }
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    for types, without in (
        ({**TYPES, "k_proj": "Q8_0"}, "qkv"),
        ({**TYPES, "down_proj": "F16"}, "down"),
        ({**WIDER, "k_proj": "MXFP4"}, "qkv"),
    ):
        spec, _ = native(tmp_path, types)
        found = spec.linear_precisions("layer.1", NATIVE)
        assert [name for name, precision in found.items() if precision == W16] == [without]
        assert list(spec.stored["layer.1"]) == [name for name in layer if name != without]
    spec, _ = native(tmp_path, WIDER)
    assert spec.stored["layer.2"] == {
        "qkv": Q8_0,
        "out": Q8_0,
        "up": Precision(8, 32, "offset", "gguf"),
        "down": Q8_0,
    }
    spec, _ = native(tmp_path, {})
    assert spec.stored == {}


@pytest.mark.parametrize("names", [["up", "qkv"], ["gate"], []])
def test_stored_precisions_are_of_linears_in_order(names: list[str], tmp_path: Path) -> None:
    spec, _ = native(tmp_path, TYPES)
    broken = spec.to_dict()
    broken["stored"]["layer.1"] = dict.fromkeys(names, str(Q4_1))
    with pytest.raises(InvalidField, match=r"stored\['layer\.1'\]: has .*, expected some of \['qkv', 'out'"):
        ModelSpec.from_dict(broken)


@pytest.mark.parametrize(("types", "tied"), [(TYPES, False), (TYPES, True), (WIDER, False)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_native_weights_are_those_of_the_file_bit_for_bit(
    backend: str, types: dict[str, str], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_backend(backend)
    spec, weights = native(tmp_path, types, tied)
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))  # other tests write to the one that all share
    source = open_weights(resolve(str(tmp_path / "tiny.gguf")), spec)
    stage = build_stage(spec, source, single_plan(spec, NATIVE), 0, CPU, backend)
    assert not (tmp_path / "cache" / "quantized").exists()
    assert stage.embedding is not None and stage.head is not None
    table = weights["model.embed_tokens.weight"]
    assert torch.equal(kernels.embedding(torch.arange(len(table)), stage.embedding.table, torch.float32), table)
    assert (stage.head.table.weight is stage.embedding.table) == tied
    prepared = {"lm_head" if not tied else "model.embed_tokens": stage.head.table.weight}
    for i, layer in enumerate(stage.layers):
        for names, linear in (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.linear("qkv")),
            (("self_attn.o_proj",), layer.linear("out")),
            (("mlp.gate_proj", "mlp.up_proj"), layer.linear("up")),
            (("mlp.down_proj",), layer.linear("down")),
        ):
            prepared[",".join(f"model.layers.{i}.{name}" for name in names)] = linear.weight
    for names, weight in prepared.items():
        expected = torch.cat([weights[f"{name}.weight"] for name in names.split(",")])
        assert torch.equal(kernels.gemm(torch.eye(weight.k), weight).T, expected), names


def test_other_options_quantize_what_the_stored_weights_stand_for(tmp_path: Path) -> None:
    spec, weights = native(tmp_path, TYPES)
    source = open_weights(resolve(str(tmp_path / "tiny.gguf")), spec)
    rows = torch.cat([floating(rows) for rows in source.rows("layer.2", "qkv.weight")])
    assert torch.equal(rows, torch.cat([weights[f"model.layers.2.self_attn.{x}_proj.weight"] for x in "qkv"]))
    precision = Precision(8, 64)
    stage = build_stage(spec, source, single_plan(spec, precision), 0, CPU)
    whole = kernels.prepare(quantize(rows, precision))
    assert all(torch.equal(a, b) for a, b in zip(stage.layers[2].attention.qkv.weight.data, whole.data, strict=True))


def test_what_is_read_by_one_thread_is_used_by_as_many_as_before(tmp_path: Path) -> None:
    spec, _ = native(tmp_path, TYPES)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in open_weights(resolve(str(tmp_path / "tiny.gguf")), spec).rows("layer.0", "up.weight"):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
