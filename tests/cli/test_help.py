"""Help fits a screen, says what each option is for, and is there at once."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

import pytest

import planner
from llmpq.cli.constraint_options import add_constraints, add_quality, read_constraints
from llmpq.cli.main import build_parser, main
from llmpq.cli.parser import Parser
from llmpq.spec import NATIVE, UsageError

COMMANDS = ("run", "profile", "sensitivity", "quantize", "plan", "explain", "eval", "export", "serve", "doctor")


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_fits_a_screen(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = help_of(capsys, *command)
    assert len(lines) <= 66
    assert max(map(len, lines)) <= 100
    assert lines[0] == f"usage: llmpq {command[0] if command else 'COMMAND'} [options]"


def test_every_option_has_help_on_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for command in COMMANDS:
        options = [line for line in help_of(capsys, command) if line.startswith("  -")]
        assert len(options) >= 3
        assert [line for line in options if not line[28:].strip()] == []


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from llmpq.cli.main import build_parser; build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def constraints(*arguments: str) -> planner.Constraints:
    parser = Parser(prog="x")
    add_constraints(parser)
    return read_constraints(parser.parse_args(arguments))


def test_constraints_that_are_not_given_are_the_planners() -> None:
    assert constraints() == planner.Constraints()


@pytest.mark.parametrize(
    ("arguments", "quantizer"),
    [
        ([], "rtn"),
        (["--quantizer", "auto"], "rtn"),
        (["--max-kl", "0.1"], "gptq"),
        (["--max-ppl-increase", "1", "--quantizer", "auto"], "gptq"),
        (["--max-kl", "0.1", "--quantizer", "rtn"], "rtn"),
        (["--quantizer", "gptq"], "gptq"),
    ],
)
def test_the_quantizer_is_the_one_that_a_quality_budget_is_worth(arguments: list[str], quantizer: str) -> None:
    parser = Parser(prog="x")
    add_constraints(parser)
    add_quality(parser)
    assert read_constraints(parser.parse_args(arguments)).quantizer == quantizer


def test_every_constraint_that_is_given_arrives() -> None:
    given = {
        "--objective cost": {"objective": "cost"},
        "--theta 0.5": {"theta": 0.5},
        "--bits 8": {"fixed_bits": 8},
        "--min-bits 4": {"min_bits": 4},
        "--bits native": {"fixed_bits": NATIVE},
        "--unit-bits head=native": {"unit_bits": {"head": NATIVE}},
        "--unit-bits head=8 --unit-bits layer.0=4": {"unit_bits": {"head": 8, "layer.0": 4}},
        "--group-size row": {"group_size": None},
        "--group-size 64": {"group_size": 64},
        "--activations a8": {"activations": "a8"},
        "--kv-bits 8": {"kv_bits": (8,)},
        "--kv-bits auto": {"kv_bits": (16, 8)},
        "--all-devices": {"all_devices": True},
        "--use a --use b": {"required": ("a", "b")},
        "--without c": {"excluded": ("c",)},
        "--pin layer.3=a": {"pinned": {"layer.3": "a"}},
        "--prefill-microbatch 2": {"prefill_microbatch": 2},
        "--decode-microbatch 3": {"decode_microbatch": 3},
        "--max-ttft 1.5": {"max_ttft_s": 1.5},
        "--max-tpot 0.1": {"max_tpot_s": 0.1},
        "--max-sensitivity 0": {"omega_budget": 0.0},
        "--time-limit 5": {"time_limit_s": 5.0},
        "--gap 0.02": {"gap": 0.02},
    }
    for arguments, fields in given.items():
        assert constraints(*arguments.split()) == dataclasses.replace(planner.Constraints(), **fields), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        "--theta -1",
        "--theta nan",
        "--max-ttft 0",
        "--max-sensitivity -1",
        "--time-limit 0",
        "--gap nan",
        "--pin head",
        "--unit-bits head=five",
        "--bits 5",
        "--group-size 33",
        "--fly",
    ],
)
def test_an_unknown_constraint_is_named(arguments: str) -> None:
    with pytest.raises(UsageError) as error:
        constraints(*arguments.split())
    assert "\n" not in str(error.value) and arguments.split()[0] in str(error.value)
    assert "`x --help`" in str(error.value)


def test_one_width_leaves_no_sensitivity_to_limit() -> None:
    with pytest.raises(UsageError, match="--bits 8 leaves nothing to --max-sensitivity; drop one"):
        constraints("--bits", "8", "--max-sensitivity", "1")


def test_a_unit_is_constrained_once() -> None:
    with pytest.raises(UsageError, match="--pin is given twice for head"):
        constraints("--pin", "head=a", "--pin", "layer.0=a", "--pin", "head=b")


def test_no_option_is_declared_twice_in_other_words() -> None:
    """An option of several commands means the same in each, so its help is the same."""
    helps: dict[str, set[str | None]] = {}
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for parser in subparsers.choices.values():
        for action in parser._actions:
            for flag in action.option_strings:
                helps.setdefault(flag, set()).add(action.help)
    differing = {flag for flag, texts in helps.items() if len(texts) > 1}
    assert differing <= {"--plan", "--out", "--batch-size", "--max-length"}
