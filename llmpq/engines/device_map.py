"""accelerate: one process; transformers' from_pretrained takes a map of modules to devices.

The rules are dispatch_model's in accelerate's src/accelerate/big_modeling.py: every parameter is below one entry of the
map; a device is the number of a GPU, "cpu" or "disk"; what is not on a GPU is computed on one of the map's GPUs, where
its weights are copied for each step, unless there is no GPU: the first of a set of their numbers, which is the lowest.
Tied parameters want one device. In its documentation (concept_guides/big_model_inference) only one GPU computes at a
time.
"""

from __future__ import annotations

import json

from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.engines.export import Export, Job, shell_script
from llmpq.engines.folder_weights import Weights, check_weights_fit, gptq_weights, stored_weights
from llmpq.engines.losses import cache_loss, common_losses, microbatch_loss
from llmpq.spec import Device

MAP_FILE = "device_map.json"


def for_accelerate(job: Job) -> Export:
    """For transformers' from_pretrained. Raises UsageError."""
    job.check_one_host()
    # What is copied to a GPU for each step is not known to work in the GPTQ form.
    mixed = len({device.kind for _, device in job.stages}) > 1
    weights = stored_weights(job) if mixed else gptq_weights(job)
    check_weights_fit(job, weights)
    device_map = modules(job)
    files = {"load.py": _script(job, weights), MAP_FILE: json.dumps(device_map, indent=1) + "\n"}
    if weights.commands:
        files = {"quantize.sh": shell_script(weights.commands), **files}
    lost = [*weights.lost, microbatch_loss(job, "all sequences go through all layers together, one device at a time")]
    return Export(files, (*lost, *_losses(job), *common_losses(job)))


def modules(job: Job) -> dict[str, int | str]:
    """transformers' module -> the device of its stage, in the order of the stages."""
    spec, family, plan = job.spec, job.family, job.plan
    stages: dict[str, int] = {}
    for (unit, _), pieces in decoder_tensors(spec, family).items():
        if unit.startswith("layer."):
            continue
        for piece in pieces:
            stages.setdefault(piece.name.rpartition(".")[0], getattr(plan, unit).stage)
    if spec.tied_embeddings:
        stages[family.head] = stages[family.table]
    for i, (stage, _) in enumerate(job.stages):
        for layer in range(*stage.layers):
            stages[family.layer.format(layer).rstrip(".")] = i
    return {module: _device(job.stages[i][1]) for module, i in sorted(stages.items(), key=lambda placed: placed[1])}


def _device(device: Device) -> int | str:
    return device.index if device.kind == "cuda" else "cpu"


def _script(job: Job, weights: Weights) -> str:
    needs = "gptqmodel and accelerate" if weights.commands else "accelerate"
    return f'''"""Loads the model as its plan places it, and answers a prompt. transformers needs {needs} for it."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).parent
model_path = {json.dumps(weights.model)}
if (here / model_path).is_dir():
    model_path = here / model_path
device_map = json.loads((here / "{MAP_FILE}").read_text())
model = AutoModelForCausalLM.from_pretrained(model_path, device_map=device_map, dtype="{job.spec.dtype}")
tokenizer = AutoTokenizer.from_pretrained(model_path)
# model.device would be meta where the table of the embedding is offloaded.
device = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
tokens = tokenizer("Once upon a time", return_tensors="pt").to(device)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0]))
'''


def _losses(job: Job) -> list[str]:
    devices = [device for _, device in job.stages]
    cpus = [device.name for device in devices if device.kind == "cpu"]
    lost = []
    if cpus and len(cpus) < len(devices):
        lowest = min((device for device in devices if device.kind == "cuda"), key=lambda device: device.index)
        lost.append(f"computing on {', '.join(cpus)}: the weights there are copied to {lowest.name} for each step")
    elif len(cpus) > 1:
        lost.append(f"stages on {', '.join(cpus)}: to accelerate they are one CPU")
    if job.spec.tied_embeddings and len(devices) > 1:
        lost.append(f"the head on {devices[-1].name}: its table is the embedding's, which is on {devices[0].name}")
    lost += cache_loss(job, "transformers")
    lost.append(f"the size of the KV cache ({job.plan.slots} slots of {job.plan.max_length}): it grows as it is used")
    return lost
