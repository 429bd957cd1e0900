"""What a plan must keep to: each option is declared here once, with the field of planner.Constraints that it sets."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from llmpq.cli import parser
from llmpq.spec import ACTIVATION_MODES, BITS, DEFAULT_ACTIVATIONS, UsageError

if TYPE_CHECKING:
    import planner
    from llmpq.tuning.quality_budget import QualityBudget


class ConstraintOption:
    """An option, and the field it sets; `keywords` are those of argparse, `collect` makes the field's value."""

    def __init__(self, flag: str, field: str, *, collect: Callable[[Any], Any] | None = None, **keywords: Any) -> None:
        self.flag, self.field, self._collect = flag, field, collect
        self._keywords = keywords if collect is None else {"action": "append", **keywords}

    def add(self, group: argparse._ActionsContainer) -> None:
        """Declare it. Not given, it leaves no attribute: defaults are those of planner.Constraints."""
        group.add_argument(self.flag, dest=self.field, default=argparse.SUPPRESS, **self._keywords)

    def value(self, arguments: argparse.Namespace) -> Any:
        """The field's value, where the option was given."""
        found = getattr(arguments, self.field)
        if self._collect is dict:
            self._check_distinct(name for name, _ in found)
        return found if self._collect is None else self._collect(found)

    def _check_distinct(self, names: Iterable[str]) -> None:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UsageError(f"{self.flag} is given twice for {twice[0]}; leave one out")


_OPTIONS = (
    ConstraintOption(
        "--objective", "objective", choices=["time", "cost"], help="cost needs price= of each device (default: time)"
    ),
    ConstraintOption(
        "--theta",
        "theta",
        type=parser.nonnegative,
        metavar="S",
        help="seconds a unit of sensitivity is worth (default: 0)",
    ),
    ConstraintOption(
        "--bits",
        "fixed_bits",
        type=parser.width,
        metavar="BITS",
        help="one width, or native, for all units; no quality budget then",
    ),
    ConstraintOption("--min-bits", "min_bits", type=int, choices=BITS, help="the least width of any unit (default: 3)"),
    ConstraintOption(
        "--unit-bits",
        "unit_bits",
        type=parser.unit_width,
        collect=dict,
        metavar="UNIT=BITS",
        help="width of a unit, such as head=8 or head=native; repeatable",
    ),
    ConstraintOption(
        "--group-size",
        "group_size",
        type=parser.group_size,
        metavar="G",
        help="weights that share a scale: 32, 64, 128, 256 or row (default: 32)",
    ),
    ConstraintOption(
        "--per-linear",
        "per_linear",
        action="store_true",
        help="also layers of two widths: some linears have the wider one",
    ),
    ConstraintOption(
        "--quantizer",
        "quantizer",
        choices=["auto", "rtn", "gptq"],
        metavar="NAME",
        help="rtn (at once) or gptq (better, minutes; default for quality budgets)",
    ),
    ConstraintOption(
        "--activations",
        "activations",
        choices=ACTIVATION_MODES,
        metavar="MODE",
        help=f"on CPUs: a16 (exact), a8x2 (near exact) or a8 (default: {DEFAULT_ACTIVATIONS})",
    ),
    ConstraintOption(
        "--kv-bits",
        "kv_bits",
        type=parser.kv_bits,
        metavar="16|8|auto",
        help="of the KV cache; auto: whatever is best for each stage (default: 16)",
    ),
    ConstraintOption("--all-devices", "all_devices", action="store_true", help="use every device, even a slow one"),
    ConstraintOption("--use", "required", collect=tuple, metavar="DEVICE", help="use this device; repeatable"),
    ConstraintOption("--without", "excluded", collect=tuple, metavar="DEVICE", help="leave it out; repeatable"),
    ConstraintOption(
        "--pin",
        "pinned",
        type=parser.pair,
        collect=dict,
        metavar="UNIT=DEVICE",
        help="place a unit, such as layer.3=cuda0; repeatable",
    ),
    ConstraintOption(
        "--prefill-microbatch",
        "prefill_microbatch",
        type=parser.positive,
        metavar="N",
        help="sequences in a step of prefill (default: searched)",
    ),
    ConstraintOption(
        "--decode-microbatch",
        "decode_microbatch",
        type=parser.positive,
        metavar="N",
        help="sequences in a step of decode (default: searched)",
    ),
    ConstraintOption(
        "--max-ttft",
        "max_ttft_s",
        type=parser.seconds,
        metavar="S",
        help="seconds until all sequences have a first token",
    ),
    ConstraintOption(
        "--max-tpot", "max_tpot_s", type=parser.seconds, metavar="S", help="seconds between two tokens of a sequence"
    ),
    ConstraintOption(
        "--max-sensitivity",
        "omega_budget",
        type=parser.nonnegative,
        metavar="OMEGA",
        help="summed sensitivity that a plan may have (default: that of 4 bits)",
    ),
    ConstraintOption(
        "--time-limit",
        "time_limit_s",
        type=parser.seconds,
        metavar="S",
        help="seconds until the answer, measuring aside (default: 60)",
    ),
    ConstraintOption(
        "--gap",
        "gap",
        type=parser.nonnegative,
        metavar="SHARE",
        help="a plan this close to the optimum is good enough (default: 0.001)",
    ),
)


def add_constraints(
    group: argparse._ActionsContainer, *, only: Collection[str] = (), without: Collection[str] = ()
) -> None:
    """Declare the options of all fields of planner.Constraints, of some only, or of all but some."""
    for option in _OPTIONS:
        if (not only or option.field in only) and option.field not in without:
            option.add(group)


def given_constraints(arguments: argparse.Namespace) -> list[ConstraintOption]:
    """The options that were given."""
    return [option for option in _OPTIONS if hasattr(arguments, option.field)]


def read_constraints(arguments: argparse.Namespace, *, takes_minutes: bool = False) -> planner.Constraints:
    """The constraints of the options that were given. Raises UsageError.

    The quantizer "auto" is gptq where the command takes minutes anyway, as one with a quality budget does; else rtn.
    """
    import planner

    given = {option.field: option.value(arguments) for option in given_constraints(arguments)}
    if given.get("quantizer", "auto") == "auto":
        budgets = (getattr(arguments, name, None) for name in ("max_ppl_increase", "max_kl"))
        given["quantizer"] = "gptq" if takes_minutes or any(budgets) else "rtn"
    constraints = planner.Constraints(**given)
    fixed = constraints.fixed_bits
    if isinstance(fixed, int) and fixed < constraints.min_bits:
        raise UsageError(f"--bits {fixed} is below --min-bits {constraints.min_bits}; drop one")
    if fixed is not None and constraints.omega_budget is not None:
        raise UsageError(f"--bits {fixed} leaves nothing to --max-sensitivity; drop one")
    return constraints


def add_quality(group: argparse._ActionsContainer) -> None:
    """Two options, one of which may be given."""
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--max-ppl-increase",
        type=parser.positive_number,
        metavar="PCT",
        help="percent by which perplexity may rise against 16 bits, measured",
    )
    either.add_argument(
        "--max-kl",
        type=parser.positive_number,
        metavar="X",
        help="nats by which predictions may diverge from those of 16 bits, measured",
    )


def read_quality(arguments: argparse.Namespace) -> QualityBudget | None:
    """The budget that is asked for. Raises UsageError if other options decide the quality."""
    from llmpq.tuning.quality_budget import QualityBudget

    percent: float | None = arguments.max_ppl_increase
    kl: float | None = arguments.max_kl
    if percent is not None:
        budget = QualityBudget("perplexity", percent / 100)
    elif kl is not None:
        budget = QualityBudget("kl", kl)
    else:
        return None
    for option in given_constraints(arguments):
        if option.field in ("fixed_bits", "omega_budget"):
            name = "--max-kl" if percent is None else "--max-ppl-increase"
            raise UsageError(f"{option.flag} and {name} both decide the quality; leave one of them out")
    return budget
