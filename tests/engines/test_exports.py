"""Plans in other engines' words, parsed as these engines parse them, and held against the plan."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from llmpq.checkpoint.gguf_header import read_gguf
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.cli.main import main
from llmpq.engines.export import Export
from llmpq.engines.targets import TARGETS
from llmpq.spec import (
    NATIVE,
    W16,
    Cluster,
    Device,
    Mixed,
    Placement,
    Plan,
    Precision,
    Stage,
    UnitPrecision,
    UsageError,
    Workload,
)
from tests.support import tiny_models
from tests.support.gguf_files import write_gguf

W3, W4, W8 = Precision(3, 32), Precision(4, 32), Precision(8, 32)
GPUS = [Device("a", "cuda", index=2), Device("b", "cuda", index=0)]
MIXED = [Device("c", "cpu", threads=3), *GPUS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256}
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, **sizes)
    return open_model(str(folder))


def plan_of(
    model: Model, devices: Sequence[Device], split: Sequence[int], options: Sequence[UnitPrecision] = (W4,)
) -> Plan:
    """Stage i on devices[i] with split[i] layers; `options` in turn are those of all units."""
    units = [options[i % len(options)] for i in range(model.spec.num_layers + 2)]
    stages, first = [], 0
    for device, count in zip(devices, split, strict=True):
        mode = "a8x2" if device.kind == "cpu" else "a16"
        dtype = model.spec.compute_dtype(device.kind)
        stages.append(Stage(device.name, (first, first + count), tuple(units[1:][first : first + count]), mode, dtype))
        first += count
    last = len(stages) - 1
    return Plan(
        model.spec.name,
        model.spec.content_hash,
        Cluster(tuple(devices)),
        Workload(8, 20, 12),
        tuple(stages),
        Placement(0, units[0]),
        Placement(last, units[-1]),
        "bfloat16",
        8,
        32,
        2,
        3,
    )


def export(engine: str, model: Model, plan: Plan) -> Export:
    return TARGETS[engine].export(plan, model)


def commands(script: str) -> tuple[dict[str, str], list[list[str]]]:
    """The variables that a shell script exports, and the words of its commands."""
    lines = [shlex.split(line) for line in script.replace("\\\n", " ").splitlines()]
    variables = dict(words[1].split("=", 1) for words in lines if words[:1] == ["export"])
    return variables, [words for words in lines if words and words[0] not in ("export", "set", "cd", "#!/bin/sh")]


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("engine", "variable", "flags"),
    [
        (
            "vllm",
            "VLLM_PP_LAYER_PARTITION",
            {"--pipeline-parallel-size": "2", "--max-model-len": "32", "--max-num-seqs": "8", "--dtype": "bfloat16"},
        ),
        (
            "sglang",
            "SGLANG_PP_LAYER_PARTITION",
            {
                "--pp-size": "2",
                "--context-length": "32",
                "--max-running-requests": "8",
                "--pp-max-micro-batch-size": "3",
                "--prefill-max-requests": "2",
                "--dtype": "bfloat16",
            },
        ),
    ],
)
def test_pipelines_have_the_plans_layers_and_gpus(
    engine: str, variable: str, flags: dict[str, str], model: Model
) -> None:
    exported = export(engine, model, plan_of(model, GPUS, (4, 2)))
    variables, (quantize, serve) = commands(exported.files["serve.sh"])
    assert variables == {variable: "4,2", "CUDA_VISIBLE_DEVICES": "2,0"}
    assert {name: option(serve, name) for name in flags} == flags
    assert option(quantize, "--out") in serve
    lost = " ".join(exported.lost)
    assert "the bits of embedding and head: 16" in lost and "micro-batches of 2 (prefill) and 3 (decode)" in lost


def test_the_weights_of_a_uniform_plan_are_made_by_the_command_that_is_given(
    model: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exported = export("vllm", model, plan_of(model, GPUS, (4, 2), [W16, *[W4] * 6, W16]))
    assert not any("bits" in what for what in exported.lost)
    _, (quantize, _) = commands(exported.files["serve.sh"])
    out = tmp_path / "weights"
    assert quantize[0] == "llmpq" and main([*quantize[1:-1], str(out)]) == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 32)
    made = open_model(str(out)).spec
    assert set(made.stored) == {f"layer.{i}" for i in range(6)}


def test_a_plan_of_several_widths_gets_the_widest_that_takes_no_more(model: Model) -> None:
    for options, width in (([W16, W3, W4], "4"), ([W8], "8"), ([W8, W16], "8"), ([W4, W8], "4")):
        exported = export("vllm", model, plan_of(model, GPUS, (4, 2), options))
        _, (quantize, _) = commands(exported.files["serve.sh"])
        assert option(quantize, "--bits") == width
        assert any("bits of each layer" in what for what in exported.lost) == (len(options) > 1)
    plain = export("vllm", model, plan_of(model, GPUS, (4, 2), [W16]))
    _, (serve,) = commands(plain.files["serve.sh"])
    assert serve[:3] == ["vllm", "serve", str(model.checkpoint.path)]


def test_hosts_and_cpus_of_pipelines(model: Model) -> None:
    there = [replace(device, host=host) for device, host in zip(GPUS, ("10.0.0.1", "10.0.0.2"), strict=True)]
    plan = plan_of(model, there, (4, 2), [W16])
    files = export("vllm", model, plan).files
    assert list(files) == ["serve-0-10.0.0.1.sh", "serve-1-10.0.0.2.sh"]
    (first, (one,)), (second, (two,)) = (commands(text) for text in files.values())
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("2", "0")
    assert first["VLLM_PP_LAYER_PARTITION"] == second["VLLM_PP_LAYER_PARTITION"] == "4,2"
    assert [option(words, "--node-rank") for words in (one, two)] == ["0", "1"]
    assert option(two, "--master-addr") == "10.0.0.1" and "--headless" in two and "--headless" not in one
    _, (served,) = commands(list(export("sglang", model, plan).files.values())[1])
    assert option(served, "--dist-init-addr").startswith("10.0.0.1:") and option(served, "--nnodes") == "2"
    cpus = [Device("c", "cpu", threads=3), Device("d", "cpu")]
    variables, _ = commands(export("vllm", model, plan_of(model, cpus, (4, 2), [W16])).files["serve.sh"])
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "0-2|3"


def layers_of(words: Sequence[str], num_layers: int) -> list[str]:
    """The device of each layer and of the head, as load_tensors of llama.cpp chooses it from the flags, in float32."""
    ngl = int(option(words, "-ngl"))
    devices, shares = [], np.zeros(0, np.float32)
    if ngl:
        devices = option(words, "--device").split(",")
        shares = np.cumsum(np.array(option(words, "--tensor-split").split(","), np.float32), dtype=np.float32)
        shares = shares / shares[-1]
    first, found = max(num_layers + 1 - ngl, 0), []
    for layer in range(num_layers + 1):
        place = np.searchsorted(shares, np.float32(layer - first) / np.float32(ngl or 1), side="right")
        found.append("CPU" if layer < first else devices[place])
    return found


@pytest.mark.parametrize(
    ("devices", "split"),
    [(MIXED, (1, 2, 3)), (MIXED, (3, 0, 3)), (MIXED, (5, 1, 0)), (GPUS, (5, 1)), (GPUS[:1], (6,)), (MIXED[:1], (6,))],
    ids=str,
)
def test_llama_cpp_puts_every_layer_where_the_plan_has_it(
    devices: list[Device], split: tuple[int, ...], model: Model
) -> None:
    plan = plan_of(model, devices, split)
    _, (words,) = commands(export("llama.cpp", model, plan).files["serve.sh"])
    names = [f"CUDA{d.index}" if d.kind == "cuda" else "CPU" for d, count in zip(devices, split) for _ in range(count)]
    head = devices[-1]
    assert layers_of(words, 6) == [*names, f"CUDA{head.index}" if head.kind == "cuda" else "CPU"]
    assert (option(words, "-c"), option(words, "-np")) == ("256", "8")
    assert ("-t" in words) == (devices[0].kind == "cpu")


def test_proportions_are_exact_for_any_numbers_of_layers(model: Model) -> None:
    """Shares are compared as floats: layers at the border must not slip to the neighbour."""
    random = np.random.default_rng(0)
    for _ in range(30):
        counts = random.integers(1, 60, random.integers(1, 9)).tolist()
        deep = replace(model, spec=replace(model.spec, num_layers=sum(counts)))
        gpus = [Device(f"g{i}", "cuda", index=i) for i in range(len(counts))]
        _, (words,) = commands(export("llama.cpp", deep, plan_of(deep, gpus, counts)).files["serve.sh"])
        expected = [f"CUDA{i}" for i, count in enumerate(counts) for _ in range(count)]
        assert layers_of(words, sum(counts)) == [*expected, expected[-1]]


def overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """The regular expressions of llama-quantize's --tensor-type, and the types."""
    given = [words[i + 1] for i, word in enumerate(words) if word == "--tensor-type"]
    return [(name, kind) for name, _, kind in (text.rpartition("=") for text in given)]


def test_llama_cpp_quantizes_each_tensor_as_near_to_the_plan_as_it_can(model: Model) -> None:
    options: list[UnitPrecision] = [W8, Precision(3, 64), Precision(4, 64), W4, replace(W4, zero="asym"), W8, W16, W4]
    exported = export("llama.cpp", model, plan_of(model, MIXED, (1, 2, 3), options))
    _, (convert, quantize) = commands(exported.files["quantize.sh"])
    assert convert[:2] == [
        "python",
        "${LLAMA_CPP:?set it to the full path of the source of llama.cpp}/convert_hf_to_gguf.py",
    ]
    assert option(convert, "--outtype") == "bf16" and option(convert, "--outfile") in quantize
    assert (option(quantize, "--token-embedding-type"), option(quantize, "--output-tensor-type")) == ("q8_0", "q4_0")
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")  # ffn_down: k = 256
    expected = [("q4_0", "q3_k"), ("q4_0", "q4_k"), ("q4_0",) * 2, ("q4_1",) * 2, ("q8_0",) * 2, ("bf16",) * 2]
    for layer, (most, down) in enumerate(expected):
        for name in names:
            found = [kind for regex, kind in overrides(quantize) if re.search(regex, f"blk.{layer}.{name}.weight")]
            assert found == [down if name == "ffn_down" else most], (layer, name)
    assert not any(re.search(regex, "blk.10.attn_q.weight") for regex, _ in overrides(quantize))
    assert any("rows of 64 are no multiple of 256" in what and "layers 0-1" in what for what in exported.lost)


def test_a_gguf_file_is_taken_as_it_is_or_quantized_anew_where_the_plan_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    stored = {"q_proj": "Q8_0", "k_proj": "Q8_0", "v_proj": "Q8_0", "o_proj": "Q4_0", "up_proj": "Q5_1"}
    write_gguf(path, types={**stored, "down_proj": "Q4_1"})
    model = open_model(str(path))
    split = (model.spec.num_layers,)
    exported = export("llama.cpp", model, plan_of(model, GPUS[:1], split, [NATIVE]))
    _, (words,) = commands(exported.files["serve.sh"])
    assert list(exported.files) == ["serve.sh"] and option(words, "-m") == str(path)
    half = export("llama.cpp", model, plan_of(model, GPUS[:1], split, [NATIVE, W8]))
    _, (quantize,) = commands(half.files["quantize.sh"])
    assert "--allow-requantize" in quantize and str(path) in quantize
    _, index = read_gguf(path)
    for name, entry in index.items():
        found = [kind for regex, kind in overrides(quantize) if re.search(regex, name)]
        layer = re.match(r"blk\.(\d+)\.(attn_[qkv]|attn_output|ffn_\w+)\.weight", name)
        if layer is not None and "norm" not in name:
            assert found == ["q8_0" if int(layer[1]) % 2 == 0 else entry.type.lower()], name
        else:
            assert found == []


def test_linears_that_are_native_keep_their_stored_types_beside_others(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, types={"q_proj": "Q8_0", "k_proj": "Q8_0", "v_proj": "Q8_0", "up_proj": "Q5_1"})
    model = open_model(str(path))
    mixed = Mixed((("qkv", NATIVE), ("out", W8), ("up", NATIVE), ("down", W4)))
    plan = plan_of(model, GPUS[:1], (model.spec.num_layers,), [mixed])
    plan = replace(plan, embedding=Placement(0, W8), head=Placement(0, W8))
    _, (quantize,) = commands(export("llama.cpp", model, plan).files["quantize.sh"])
    _, index = read_gguf(path)
    for layer in range(model.spec.num_layers):
        names = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "attn_output", "ffn_down")
        kinds = [index[f"blk.{layer}.{name}.weight"].type.lower() for name in names[:5]]
        for name, kind in zip(names, [*kinds, "q8_0", "q4_0"], strict=True):
            found = [given for regex, given in overrides(quantize) if re.search(regex, f"blk.{layer}.{name}.weight")]
            assert found == [kind], name
    _, (made, _) = commands(export("sglang", model, plan).files["serve.sh"])
    assert made[:2] == ["llmpq", "quantize"]
    assert any("its weights are rounded anew" in what for what in export("sglang", model, plan).lost)


def test_a_cache_of_8_bits_is_asked_for_where_there_is_one_and_else_said_to_be_lost(model: Model) -> None:
    plan = plan_of(model, GPUS, (4, 2))
    stages = tuple(replace(stage, kv_bits=8) for stage in plan.stages)
    for engine in TARGETS:
        exported, before = (export(engine, model, each) for each in (replace(plan, stages=stages), plan))
        more = set(exported.lost) - set(before.lost)
        if engine == "llama.cpp":
            _, (words,) = commands(exported.files["serve.sh"])
            assert [option(words, name) for name in ("-ctk", "-ctv", "-fa")] == ["q8_0", "q8_0", "on"]
            assert more == {"a scale of keys and of values for each head and token: q8_0 has one for 32 numbers"}
        else:
            (lost,) = more
            assert lost.startswith("keys and values in int8: ") and "in bfloat16" in lost and "twice the memory" in lost


def test_two_types_of_one_table_become_the_wider(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, "llama-tied", torch.bfloat16, hidden_size=64)
    model = open_model(str(tmp_path))
    layers = model.spec.num_layers
    exported = export("llama.cpp", model, plan_of(model, GPUS[:1], (layers,), [W8, *[W4] * layers, W4]))
    _, (_, quantize) = commands(exported.files["quantize.sh"])
    assert option(quantize, "--token-embedding-type") == option(quantize, "--output-tensor-type") == "q8_0"
    said = "embedding and head share one table, which gets the wider of their two types"
    assert exported.lost.count(said) == 1


def test_llama_cpps_converter_is_looked_for_where_the_user_says(model: Model, tmp_path: Path) -> None:
    source, programs = tmp_path / "their source", tmp_path / "bin"
    for folder in (source, programs):
        folder.mkdir()
    (source / "convert_hf_to_gguf.py").write_text("import sys; print(*sys.argv[1:])\n")
    (programs / "python").symlink_to(sys.executable)
    script = tmp_path / "quantize.sh"
    script.write_text(export("llama.cpp", model, plan_of(model, GPUS, (4, 2), [W16])).files["quantize.sh"])

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{programs}:/usr/bin:/bin", **variables}
        return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=False)

    unset = run()
    assert unset.returncode != 0 and "LLAMA_CPP: set it to the full path" in unset.stderr
    found = run(LLAMA_CPP=str(source))
    assert found.stdout.split()[0] == str(model.checkpoint.path), found.stderr


def test_llama_cpp_itself_makes_these_types(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (.[rivals])")
    import ctypes

    import gguf

    model = open_model("demo")
    plan = plan_of(model, MIXED, (10, 10, 10), [W8, W4, NATIVE, Precision(3, 64), NATIVE])
    _, (words,) = commands(export("llama.cpp", model, plan).files["quantize.sh"])
    given = [(name.encode(), gguf.GGMLQuantizationType[kind.upper()].value) for name, kind in overrides(words)]
    override = llama_cpp.llama_model_tensor_override
    array = (override * (len(given) + 1))(*(override(*each) for each in given), override(None, 0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.allow_requantize, parameters.nthread = True, 1
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    parameters.tt_overrides = ctypes.cast(array, ctypes.POINTER(override))
    out = tmp_path / "out.gguf"
    source = str(model.checkpoint.path).encode()
    assert llama_cpp.llama_model_quantize(source, str(out).encode(), ctypes.byref(parameters)) == 0
    _, index = read_gguf(out)
    matched = 0
    for name, entry in index.items():
        for kind in (kind for regex, kind in overrides(words) if re.search(regex, name)):
            assert entry.type.lower() == kind, name
            matched += 1
    assert matched == 7 * 30


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma2", "opt-350m", "gpt2", "bloom", "qwen2_moe"])
def test_every_parameter_of_transformers_has_one_device(kind: str, tmp_path: Path) -> None:
    theirs = tiny_models.save_model(tmp_path, kind, torch.bfloat16)
    model = open_model(str(tmp_path))
    layers = model.spec.num_layers
    exported = export("accelerate", model, plan_of(model, GPUS, (layers - 1, 1), [W16]))
    device_map = json.loads(exported.files["device_map.json"])
    for module in device_map:
        theirs.get_submodule(module)  # raises if it has none
    for name in theirs.state_dict():
        above = [device for module, device in device_map.items() if name.startswith(f"{module}.")]
        assert len(above) == 1, name
        if layer := re.search(r"\.(?:layers|h)\.(\d+)\.", name):
            assert above == [0 if int(layer[1]) == layers - 1 else 2]
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert any("its table is the embedding's" in what for what in exported.lost) == tied


def test_transformers_loads_a_model_by_its_map_and_computes_the_same(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (.[formats])")
    exported = export("accelerate", model, plan_of(model, MIXED, (1, 2, 3), [W16]))
    device_map = json.loads(exported.files["device_map.json"])
    assert [device_map[f"model.layers.{i}"] for i in range(6)] == ["cpu", 2, 2, 0, 0, 0]
    here = {module: "disk" if device == 0 else "cpu" for module, device in device_map.items()}  # there is no GPU
    load = transformers.AutoModelForCausalLM.from_pretrained
    path, tokens = model.checkpoint.path, torch.arange(12)[None]
    plain = load(path, dtype=torch.float32)
    placed = load(path, dtype=torch.float32, device_map=here, offload_folder=tmp_path)
    assert placed.hf_device_map == here
    assert placed.model.layers[5].mlp.down_proj.weight.device.type == "meta"  # on disk
    with torch.inference_mode():
        assert torch.equal(placed(tokens).logits, plain(tokens).logits)
    # The script as it is written; the embedding is where no device is, as it is beside a GPU.
    (tmp_path / "load.py").write_text(exported.files["load.py"])
    first = {module: "disk" if "embed" in module else "cpu" for module in device_map}
    (tmp_path / "device_map.json").write_text(json.dumps(first))
    said = subprocess.run([sys.executable, tmp_path / "load.py"], capture_output=True, text=True, check=False)
    assert said.returncode == 0 and said.stdout.startswith("Once upon a time"), said.stderr


@pytest.mark.parametrize(
    ("devices", "split", "first"), [(MIXED, (1, 2, 3), 2), (GPUS, (4, 2), 2), (MIXED[:1], (6,), "cpu")], ids=str
)
def test_the_script_takes_prompts_to_the_first_device_that_computes(
    devices: list[Device],
    split: tuple[int, ...],
    first: int | str,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    class Tokens(dict[str, str]):
        def to(self, device: object) -> Tokens:
            taken.append(device)
            return self

    class Loaded:
        device = "meta"  # as accelerate has it where the embedding is offloaded

        def __call__(self, text: str, return_tensors: str) -> Tokens:
            return Tokens()

        def generate(self, max_new_tokens: int) -> list[int]:
            return [0]

        def decode(self, tokens: int) -> str:
            return ""

    loader = SimpleNamespace(from_pretrained=lambda *arguments, **keywords: Loaded())
    theirs = SimpleNamespace(AutoModelForCausalLM=loader, AutoTokenizer=loader)
    monkeypatch.setitem(sys.modules, "transformers", theirs)  # type: ignore[arg-type]
    for name, text in export("accelerate", model, plan_of(model, devices, split, [W16])).files.items():
        (tmp_path / name).write_text(text)
    runpy.run_path(str(tmp_path / "load.py"))
    assert taken == [first]


@pytest.mark.parametrize(
    ("engine", "devices", "split", "options", "words"),
    [
        ("vllm", MIXED, (1, 2, 3), [W4], "c is a CPU beside GPUs"),
        ("sglang", MIXED[:1], (6,), [W4], "c is a CPU, and SGLang's stages are on GPUs"),
        ("vllm", GPUS, (6, 0), [W4], "b has no layer"),
        ("sglang", [GPUS[0], replace(GPUS[0], name="twin")], (3, 3), [W4], "a and twin are one GPU"),
        ("vllm", [replace(GPUS[0], memory_bytes=100_000), GPUS[1]], (5, 1), [W4], "its weights would take"),
        ("vllm", [replace(GPUS[0], host="x"), GPUS[1], replace(GPUS[1], name="c", host="x")], (2, 2, 2), [W4], "apart"),
        ("vllm", [GPUS[0], replace(GPUS[1], host="x")], (3, 3), [W4], "localhost, which others know by another name"),
        ("llama.cpp", [GPUS[0], MIXED[0]], (3, 3), [W4], "a CPU comes after a"),
        ("llama.cpp", [GPUS[0], replace(GPUS[1], host="x")], (3, 3), [W4], "stages on localhost and x"),
        ("accelerate", [GPUS[0], replace(GPUS[1], host="x")], (3, 3), [W4], "stages on localhost and x"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_with_the_reason(
    engine: str, devices: list[Device], split: tuple[int, ...], options: list[Precision], words: str, model: Model
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        export(engine, model, plan_of(model, devices, split, options))
    assert f"{TARGETS[engine].name} cannot take this plan: " in str(error.value)


def test_families_and_forms_that_an_engine_does_not_read_are_refused(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path / "opt", "opt", torch.bfloat16)
    opt = open_model(str(tmp_path / "opt"))
    with pytest.raises(UsageError, match=r"llama\.cpp has no models of the family opt"):
        export("llama.cpp", opt, plan_of(opt, GPUS[:1], (opt.spec.num_layers,)))
    write_gguf(tmp_path / "model.gguf")
    gguf = open_model(str(tmp_path / "model.gguf"))
    with pytest.raises(UsageError, match="is a GGUF file, and vLLM wants a folder with safetensors"):
        export("vllm", gguf, plan_of(gguf, GPUS[:1], (gguf.spec.num_layers,), [W16]))


def test_the_command_writes_files_that_a_shell_reads(
    model: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    plan_of(model, MIXED, (1, 2, 3)).save(plan)
    common = ["export", "--model", str(model.checkpoint.path), str(plan)]
    assert main([*common, "--to", "llama.cpp", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["quantize.sh", "serve.sh"]
    assert all(path.stat().st_mode & 0o100 for path in out.iterdir())
    printed = capfd.readouterr().out
    assert f"quantize.sh, serve.sh: {out}" in printed and "\n- activation modes (a8x2 on c)" in printed
    assert main([*common, "--to", "accelerate"]) == 0
    printed = capfd.readouterr().out
    assert "--- device_map.json" in printed and '"model.layers.0": "cpu"' in printed
    assert "computing on c: the weights there are copied to b for each step" in printed  # GPU 0
    assert main([*common, "--to", "vllm"]) == 2
    assert "llmpq: vLLM cannot take this plan: c is a CPU beside GPUs" in capfd.readouterr().err
