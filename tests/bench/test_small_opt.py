"""The small OPT learns its text and no other, comes out the same each time, and is a model that llmpq opens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from bench.quality import beds, small_opt
from bench.quality.small_opt import (
    Training,
    counting_perplexity,
    learn_tokenizer,
    perplexities,
    spread_channels,
    train,
)
from llmpq.checkpoint.model_files import open_model
from llmpq.measure.text import calibration_text
from llmpq.runtime.engine import Engine
from llmpq.spec import Device, Plan, Precision

TINY = Training(300, hidden_size=32, layers=2, heads=2, length=32, batch=4, steps=150, learning_rate=1e-2, dropout=0.0)
TEXT = "".join(f"What is {i} and what is {i + 1}? One more, of course.\n" for i in range(60))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opt")
    train(TEXT, folder, TINY)
    return folder


def test_it_knows_more_of_the_text_than_how_often_tokens_come(trained: Path) -> None:
    unseen = "".join(f"What is {i} and what is {i + 1}? One more, of course.\n" for i in range(99, 60, -3))
    found, counting = perplexities(trained, TEXT, unseen)
    assert found < 0.5 * counting


def test_it_is_the_same_each_time(trained: Path, tmp_path: Path) -> None:
    train(TEXT, tmp_path, TINY)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_llmpq_computes_what_transformers_does(trained: Path) -> None:
    model = open_model(str(trained))
    text = "What is 7? Ünseen words.\n"
    token_ids = model.tokenizer.encode(text)
    assert token_ids == AutoTokenizer.from_pretrained(trained).encode(text)
    assert model.tokenizer.decode(token_ids) == text
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(trained)(torch.tensor([token_ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[1:, None])[:, 0]
    plan = Plan.single(model.spec, Device("cpu0", "cpu", threads=1), Precision(16), slots=1, max_length=TINY.length)
    with Engine(plan, model.checkpoint, model.spec) as engine:
        found = engine.score([token_ids])
    torch.testing.assert_close(torch.tensor(found[0].log_probs), expected, atol=2e-3, rtol=0)


def test_channels_are_spread_and_the_function_is_the_same() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2
    )
    network = OPTForCausalLM(config).double().eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms as well
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = network(ids).logits
        spread_channels(network, 1.0)
        torch.testing.assert_close(network(ids).logits, before, atol=1e-9, rtol=0)
    for layer in network.model.decoder.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.out_proj, layer.fc1, layer.fc2):
            columns = linear.weight.norm(dim=0)
            assert columns.max() > 10 * columns.min()


def test_tokens_are_those_of_the_text() -> None:
    tokenizer = learn_tokenizer("abc abc abc abd " * 10, 262)
    assert len(tokenizer) <= 262 and tokenizer.encode(" abc") == [tokenizer.convert_tokens_to_ids("Ġabc")]
    assert tokenizer.encode("</s>") == [0]


def test_a_text_of_less_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no more than a window of 32"):
        train("too short", tmp_path, TINY)
    assert not list(tmp_path.iterdir())


def test_counting_adds_one_to_each_count() -> None:
    found = counting_perplexity([0, 0, 1], [0, 2], 3)  # probabilities 3/6, 2/6, 1/6
    assert found == pytest.approx(math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2))


def test_the_bed_is_trained_on_the_calibration_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []

    def tiny(text: str, folder: Path) -> None:
        texts.append(text)
        train(TEXT, folder, TINY)

    monkeypatch.setattr(small_opt, "train", tiny)
    for _ in range(2):
        bed = beds.open_bed("OPT", tmp_path)
    assert texts == [calibration_text()]
    state = beds.network(bed.folder).state_dict()
    assert len(bed.linears) == 2 * 6 and all(state[f"{name}.weight"].dim() == 2 for name in bed.linears)
    with pytest.raises(ValueError, match="there is no bed 'C'"):
        beds.open_bed("C", tmp_path)
