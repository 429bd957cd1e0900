"""The first of torchrun's ranks has the plan; the others check it against what they were given, before they load."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING

from llmpq import __version__
from llmpq.checkpoint.model_files import Model
from llmpq.cli.options import read_model, read_plan
from llmpq.progress import Notify
from llmpq.spec import Plan, UsageError

if TYPE_CHECKING:
    from llmpq.runtime.torchrun import Rank


def share_plan(rank: Rank, plan: Plan, model: Model, notify: Notify, *, runs: bool) -> None:
    """Tell the other ranks the plan; if it `runs`, its weights are first made where they find them.

    Raises UsageError if they are fewer than its stages.
    """
    from llmpq.measure.quantized_model import as_served

    if rank.world_size < len(plan.stages):
        raise UsageError(
            f"the plan has {len(plan.stages)} stages, but there are {rank.world_size} ranks; start one for each stage"
        )
    if rank.one_host and runs:
        as_served(model, plan, notify)  # into the cache
    rank.share(json.dumps({"version": __version__, "model": model.spec.content_hash, "plan": plan.to_dict()}))


def receive_plan(rank: Rank, arguments: Namespace) -> tuple[Plan, Model] | None:
    """At another rank: the first one's plan, and this one's model for it; None if there is nothing to do.

    Raises UsageError if the first has another version of llmpq, another model, or another plan than --plan.
    """
    shared = json.loads(rank.share(None))
    if shared["version"] != __version__:
        raise UsageError(
            f"rank 0 runs llmpq {shared['version']}, and rank {rank.rank} {__version__}; install one version on "
            "all hosts"
        )
    plan = Plan.from_dict(shared["plan"])
    if arguments.plan is not None and (own := read_plan(arguments)[0]) != plan:
        raise UsageError(
            f"rank 0 has another plan ({plan.digest()}) than {arguments.plan} of rank {rank.rank} ({own.digest()}); "
            "copy its file, or leave out --plan at all ranks but 0"
        )
    if arguments.dry_run or rank.rank >= len(plan.stages):
        return None
    model = read_model(arguments)
    if model.spec.content_hash != shared["model"]:
        raise UsageError(
            f"rank 0 has another model ({shared['model']}) than {arguments.model} of rank {rank.rank} "
            f"({model.spec.content_hash}); give all ranks the same files"
        )
    return plan, model
