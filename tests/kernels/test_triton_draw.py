"""Tokens that are drawn on a device: by Python's sums over sorted tokens, and as the host draws them."""

from __future__ import annotations

import math

import pytest
import torch

from llmpq.kernels import draw_, draws
from llmpq.runtime.sampler import Admitted, Sampler, draw, next_tokens, sample
from llmpq.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("triton_device")

NUMBERS = (0.0, 0.031, 0.27, 0.5, 0.73, 0.96, 1 - 2.0**-53)
PARAMETERS = {  # temperature, top_k, top_p, min_p
    "all": (0.7, 0, 1.0, 0.0),
    "top_k among equal ones": (1.0, 7, 1.0, 0.0),
    "top_k of more than there are": (1.0, 10**6, 1.0, 0.0),
    "top_p among equal ones": (1.3, 0, 0.6, 0.0),
    "a small top_p": (1.0, 0, 1e-9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.2),
    "one after the other": (0.9, 40, 0.8, 0.1),
    "hardly any temperature": (1e-30, 5, 0.9, 0.0),
}


def drawn(row: list[float], temperature: float, top_k: float, top_p: float, min_p: float, number: float) -> set[int]:
    """The token by the definition, in sums without rounding; two, if the number falls on the boundary between them."""
    weights = [math.exp((x - max(row)) / temperature) for x in row]
    kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[: int(top_k) or None]
    total = math.fsum(weights[i] for i in kept)
    if top_p < 1:
        kept = [token for at, token in enumerate(kept) if math.fsum(weights[i] for i in kept[:at]) < top_p * total]
    kept = sorted(token for token in kept if weights[token] >= min_p)
    wanted = number * math.fsum(weights[i] for i in kept)
    cumulative = [math.fsum(weights[i] for i in kept[: at + 1]) for at in range(len(kept))]
    return {
        next((token for token, reached in zip(kept, cumulative) if reached > wanted * (1 + shift)), kept[-1])
        for shift in (-1e-12, 1e-12)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PARAMETERS)
def test_tokens_are_drawn_by_their_definition(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    """Of logits of which many are equal, some are below 0 and some are none."""
    torch.manual_seed(2)
    x = (3 * torch.randn(len(NUMBERS), 300)).round().div(2).to(dtype)
    x[1] = torch.randn(300).to(dtype)
    x[2, ::3] = -torch.inf
    x[3, 299] = 40
    x[4] = -1.5
    parameters = torch.tensor([PARAMETERS[name]] * len(x), dtype=torch.float64).T.contiguous()
    found = draw_(torch.zeros(len(x), dtype=torch.int64), x, parameters, torch.tensor(NUMBERS, dtype=torch.float64))
    for row, number, token in zip(x, NUMBERS, found.tolist(), strict=True):
        assert token in drawn(row.tolist(), *PARAMETERS[name], number)


def test_a_row_depends_on_itself_and_one_without_a_temperature_keeps_its_token() -> None:
    x = torch.randn(4, 9000)[:, 100:]  # of more than one block, rows that lie apart
    rows = [(1.0, 0.0, 0.7, 0.0), (0.0, 3.0, 0.5, 0.0), (0.8, 50.0, 1.0, 0.0), (1.1, 200.0, 0.9, 0.01)]
    parameters, numbers = torch.tensor(rows, dtype=torch.float64).T.contiguous(), torch.rand(4, dtype=torch.float64)
    tokens = torch.tensor([1, 2, 3, 4])
    found = draw_(tokens.clone(), x, parameters, numbers).tolist()
    assert found[1] == 2
    for i, row in enumerate(rows):
        one = torch.tensor([row], dtype=torch.float64).T.contiguous()
        assert draw_(tokens[i : i + 1].clone(), x[i : i + 1], one, numbers[i : i + 1]).tolist() == [found[i]]
        if row[0]:
            params = SamplingParams(temperature=row[0], top_k=int(row[1]), top_p=row[2], min_p=row[3])
            assert sample(x[i].cpu().float(), params, float(numbers[i])) == found[i]


def test_the_host_is_left_with_what_it_has_to_work_out() -> None:
    """Of a step's requests, greedy ones included; all get the tokens that the host would choose."""
    torch.manual_seed(4)
    logits, positions = torch.randn(5, 400).to(torch.bfloat16), torch.tensor([3, 9, 4, 5, 6], dtype=torch.int32)
    asked = [
        SamplingParams(temperature=0.8, seed=1, top_p=0.9),
        SamplingParams(temperature=0.8, seed=1, typical_p=0.9),
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=2, logprobs=1),
        SamplingParams(temperature=1.0, seed=3, top_k=20),
    ]
    made = [Sampler(Admitted(i, params)) for i, params in enumerate(asked)]
    samplers = [sampler if sampler.is_needed else None for sampler in made]
    assert draws(logits.device, logits.dtype)
    likeliest = logits.argmax(-1)
    expected = next_tokens(likeliest.clone(), logits, samplers, positions.cpu())
    left = draw(likeliest, logits, samplers, positions.cpu())
    assert left == [None, samplers[1], None, samplers[3], None]
    assert next_tokens(likeliest, logits, left, positions.cpu()).tolist() == expected.tolist()


@pytest.mark.parametrize("wrong", ["tokens", "parameters", "numbers"])
def test_arguments_of_another_shape_are_refused_by_name(wrong: str) -> None:
    given = {
        "tokens": torch.zeros(2, dtype=torch.int64),
        "parameters": torch.zeros(4, 2, dtype=torch.float64),
        "numbers": torch.zeros(2, dtype=torch.float64),
    }
    given[wrong] = given[wrong][..., :1]
    with pytest.raises(ValueError, match=f"{wrong} is"):
        draw_(logits=torch.zeros(2, 8), **given)
