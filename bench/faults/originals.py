"""The files that are damaged, as they are without damage: a small model in both formats, and what is planned for it."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import planner
from bench.faults.mutations import Gguf, gguf_string
from llmpq.checkpoint.model_files import open_model
from llmpq.spec import (
    BITS,
    Context,
    CostRow,
    CostTable,
    Link,
    ModelSpec,
    Op,
    Plan,
    Precision,
    Prediction,
    Profile,
    Sensitivity,
    Solution,
    Solved,
    Workload,
    parse_devices,
    unit_ops,
)

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
_PROMPTS = [f"What is {i} + {i}?" for i in range(8)]
_LENGTHS = [(i, 4) for i in range(1, 9)]
EACH: dict[str, dict[bytes, Any]] = {  # of a file of lines: line -> what is read of it
    "prompts": {json.dumps({"prompt": prompt}).encode(): prompt for prompt in _PROMPTS},
    "lengths": {json.dumps({"prompt_len": m, "output_len": n}).encode(): (m, n) for m, n in _LENGTHS},
}


def _tensors() -> dict[str, np.ndarray[Any, Any]]:
    hidden, up, kv, vocab = 32, 64, 16, 260
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (up, hidden),
        "mlp.up_proj": (up, hidden),
        "mlp.down_proj": (hidden, up),
    }
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    numbers = np.random.default_rng(0)
    return {f"{name}.weight": numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def gguf_model() -> Gguf:
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 16,
    }
    reals = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500.0}
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "the"]
    metadata = (
        (b"general.architecture", 8, gguf_string(b"llama")),
        *((f"llama.{name}".encode(), 4, struct.pack("<I", size)) for name, size in sizes.items()),
        *((f"llama.{name}".encode(), 6, struct.pack("<f", real)) for name, real in reals.items()),
        (b"tokenizer.ggml.model", 8, gguf_string(b"gpt2")),
        (b"tokenizer.ggml.tokens", *_strings(tokens)),
        (b"tokenizer.ggml.merges", *_strings(["t h", "th e"])),
        (b"tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 0)),
        (b"tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 1)),
        (b"tokenizer.chat_template", 8, gguf_string(_TEMPLATE.encode())),
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors, data = [], bytearray()
    for name, tensor in _tensors().items():
        stored = f"{names.get_name(name.removesuffix('.weight'))}.weight".encode()
        tensors.append((stored, tensor.shape[::-1], 0, len(data)))
        data += tensor.tobytes()
        data += bytes(-len(data) % 32)
    return Gguf(metadata, tuple(tensors), bytes(data))


def _strings(texts: Sequence[str]) -> tuple[int, bytes]:
    """An array of a GGUF file's metadata."""
    return 9, struct.pack("<IQ", 8, len(texts)) + b"".join(gguf_string(text.encode()) for text in texts)


def _write_model(folder: Path) -> None:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    save_file(_tensors(), folder / "model.safetensors", {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    _flat_template(folder)


def _flat_template(folder: Path) -> None:
    """The template within tokenizer_config.json, so that mutations of that file meet it."""
    template = folder / "chat_template.jinja"
    if template.exists():
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template.read_text()}))
        template.unlink()


def problem(spec: ModelSpec) -> planner.Problem:
    """A small problem of two devices, whose costs and sensitivities are made up."""
    cluster = parse_devices("cpu:name=a,memory=4MiB;cpu:name=b,memory=4MiB")
    workload = Workload(2, 8, 4)
    precisions = [Precision(bits, None if bits == 16 else 32) for bits in BITS]
    ops = {Op("step")}
    for unit in spec.distinct_units:
        for precision in precisions:
            for tokens in (1, 64):
                for keys in (1, 64):
                    ops.update(unit_ops(spec, unit, precision, "a8x2", tokens, tokens, Context.of(keys)))
    rows = tuple(CostRow(op, 1e-6 * (op.m + op.n / 99), "cpu", "float32", 0) for op in sorted(ops, key=str))
    tables = {name: CostTable(name, "none", 1, None, 2**20, rows) for name in ("a", "b")}
    profile = Profile(tables, (Link("a", "b", 1e-4, 1e9), Link("b", "a", 1e-4, 1e9)))
    omega = {unit: {str(precision): 1 / precision.bits for precision in precisions[:-1]} for unit in spec.units}
    sensitivity = Sensitivity(spec.name, spec.content_hash, "variance", "none", omega)
    constraints = planner.Constraints(time_limit_s=1.0)
    return planner.Problem(spec, cluster, workload, profile, sensitivity, constraints)


def write_originals(folder: Path) -> None:
    """Every file in `folder` as it is without damage."""
    _write_model(folder / "model")
    (folder / "model.gguf").write_bytes(gguf_model().encode())
    spec = open_model(str(folder / "model")).spec
    small = problem(spec)
    for name, record in {"cluster": small.cluster, "costs": small.profile, "sensitivity": small.sensitivity}.items():
        record.save(folder / f"{name}.json")
    plan = Plan.single(spec, small.cluster.devices[0], Precision(4, 32), slots=2, max_length=12)
    plan.save(folder / "plan.json")
    solved = Solved(plan, Prediction(1.0, 1.0, 4.0, (2**20,)), Solution("HiGHS", 2.0, 2.0, 0.1, 1.0, 2.0))
    solved.save(folder / "solved.json")
    for name, lines in EACH.items():
        (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
