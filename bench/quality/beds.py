"""Beds: the networks that figures of quality are measured on, whose weights lie on no quantizer's grid.

`OPT` is trained here (small_opt.py). The others are forms of a stored model that compute what it computes, with other
numbers than those it stores. The models' files hold codes of 4 to 8 bits. A quantizer that is given its weights as they
are may find that grid again, and look better than it is. So the residual stream is turned by an orthogonal matrix Q,
every linear that reads it or writes it along with it, and no weight is on the grid any more. RMS norms see the same
lengths, and biases of linears that read the stream stay as they are.

A  Norm weights are folded into the linears behind them, and Q is any orthogonal matrix. Outliers are spread over all
   channels: hostile to quantizers that see weights only, kind to those that see what goes into a linear.
B  Norm weights stay, Q is near the identity and leaves out the channels whose norm weights are far from the others'.
   The natural structure is kept. A linear behind a norm with weights g becomes W diag(g) Q diag(1 / g).

`A` and `B` are those of the demo model; `QWEN` is form B of Qwen2.5-Coder-0.5B (bench/models/qwen_coder.py). All have a
head of their own. Tensors are float32, under transformers' names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file

from bench.models import qwen_coder
from bench.quality import small_opt
from llmpq.checkpoint.families import LLAMA, QWEN2
from llmpq.checkpoint.model_files import Checkpoint, Model, describe, open_model
from llmpq.checkpoint.tensor_names import Piece, decoder_tensors
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.measure.text import calibration_text

Form = Literal["A", "B"]
FORMS: tuple[Form, ...] = get_args(Form)
OPT, QWEN = "OPT", "QWEN"
BEDS = {  # name -> what it is made of
    "A": "SmolLM2-135M-Instruct",
    "B": "SmolLM2-135M-Instruct",
    OPT: "OPT, 8 layers",
    QWEN: "Qwen2.5-Coder-0.5B-Instruct",
}
USUAL = ("A", "B", OPT)  # that are measured if nothing is said; QWEN takes five times as long as A or B
SEED = 1234
ANGLE = 0.15  # of B's rotation: a weight moves by about that fraction of the weights around it
KEPT_CHANNELS = 32  # that B does not turn

_WRITES = ("self_attn.o_proj", "mlp.down_proj")  # to the residual stream; the other linears read it


@dataclass(frozen=True, eq=False)
class Bed:
    """A model folder, and the names of the linears in it that are quantized."""

    name: str  # one of BEDS
    folder: Path
    model: Model

    @property
    def linears(self) -> tuple[str, ...]:
        """transformers' names of the layers' linears, without ".weight", in the order of the layers."""
        family, layers = describe(self.model.checkpoint).family, range(self.model.spec.num_layers)
        return tuple(
            family.layer.format(i) + name
            for i in layers
            for part in self.model.spec.linears("layer.0")
            for name in family.linears[part]
        )


def open_bed(name: str, work: Path) -> Bed:
    """One of BEDS, in a folder of its own below `work`; made if it is not there. Raises ValueError for another name."""
    folder = work / name
    for form in FORMS:
        if form == name:
            return make_bed(open_model("demo"), form, folder)
    if name == QWEN:
        return make_bed(open_model(str(qwen_coder.fetch(work / "models"))), "B", folder, name)
    if name != OPT:
        raise ValueError(f"there is no bed {name!r}; there are {', '.join(BEDS)}")
    if not (folder / "config.json").exists():
        small_opt.train(calibration_text(), folder)
    return Bed(OPT, folder, open_model(str(folder)))


def make_bed(model: Model, form: Form, folder: Path, name: str | None = None) -> Bed:
    """A form of a model in a folder that llmpq and transformers open, written if it is not there.

    The bed is called `name`, or as the form. Raises ValueError for a model that is built otherwise than a llama, or has
    biases beside those of queries, keys and values.
    """
    if not (folder / "config.json").exists():
        described = describe(model.checkpoint)
        if described.family not in (LLAMA, QWEN2) or {*model.spec.biases} - {"qkv"}:
            raise ValueError(
                f"{model.spec.name} is no llama or qwen2, or has biases beside those of qkv; there are no beds of it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_file(transform(read_tensors(model), form), folder / "model.safetensors", {"format": "pt"})
        save_tokenizer(model.checkpoint, folder)
        architecture = described.family.architectures[0]
        differences = {"architectures": [architecture], "dtype": "float32", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps({**described.config, **differences}, indent=1))
    return Bed(name or form, folder, open_model(str(folder)))


def read_tensors(model: Model) -> dict[str, torch.Tensor]:
    """All tensors of a model, float32, under transformers' names; those of a tied head twice."""
    source = open_weights(model.checkpoint, model.spec)
    tensors: dict[str, torch.Tensor] = {}
    for (unit, part), pieces in decoder_tensors(model.spec, describe(model.checkpoint).family).items():
        whole = torch.cat([floating(rows).float() for rows in source.rows(unit, part)])
        if unit == "head" and part == "table.weight":
            pieces = (Piece.whole(f"{LLAMA.head}.weight", tuple(whole.shape)),)
        for piece, rows in zip(pieces, whole.split([piece.shape[0] for piece in pieces]), strict=True):
            tensors[piece.name] = rows.contiguous()
    return tensors


def save_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    from transformers import AutoTokenizer

    path = checkpoint.path
    options = {"gguf_file": path.name} if checkpoint.is_gguf else {}
    AutoTokenizer.from_pretrained(path.parent if checkpoint.is_gguf else path, **options).save_pretrained(folder)


def transform(tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
    """The same function in a form A or B; float32, computed in float64."""
    table, head = f"{LLAMA.table}.weight", f"{LLAMA.head}.weight"
    norms = {name: tensor.double() for name, tensor in tensors.items() if name.endswith("norm.weight")}
    q = _any_rotation(len(norms[f"{LLAMA.final_norm}.weight"])) if form == "A" else _small_rotation(norms)

    def read(weight: torch.Tensor, norm: str) -> torch.Tensor:
        g = norms[norm]
        return weight.double() * g @ q if form == "A" else weight.double() * g @ q / g

    def transformed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in norms:
            return torch.ones_like(tensor) if form == "A" else tensor
        if name.endswith(".bias"):
            return tensor
        if name == table:
            return tensor.double() @ q
        if name == head:
            return read(tensor, f"{LLAMA.final_norm}.weight")
        if name.removesuffix(".weight").endswith(_WRITES):
            return q.T @ tensor.double()
        block, norm = (".self_attn.", "attention_norm") if ".self_attn." in name else (".mlp.", "mlp_norm")
        return read(tensor, f"{name.partition(block)[0]}.{LLAMA.norms[norm]}.weight")

    return {name: transformed(name, tensor).float().contiguous() for name, tensor in tensors.items()}


def _any_rotation(size: int) -> torch.Tensor:
    q, r = torch.linalg.qr(_normal(size))
    rotation: torch.Tensor = q * r.diagonal().sign()  # of either sign it would not be uniform
    return rotation


def _small_rotation(norms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """exp of a random skew matrix; channels with norm weights far from those around them stay as they are."""
    logarithms = torch.stack([g.abs().log() for g in norms.values()])
    distance = (logarithms - logarithms.median(1, keepdim=True).values).abs().amax(0)
    turned = distance.argsort()[: max(2, len(distance) - KEPT_CHANNELS)].sort().values
    normal = _normal(len(turned))
    q = torch.eye(len(distance), dtype=torch.float64)
    q[turned[:, None], turned] = torch.linalg.matrix_exp((normal - normal.T) * (ANGLE / math.sqrt(2 * len(turned))))
    return q


def _normal(size: int) -> torch.Tensor:
    return torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def network(folder: Path) -> Any:
    """A model folder as transformers runs it, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
