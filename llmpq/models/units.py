"""The loaded units of a process, which its next stage takes over where it has them in the same form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

from torch import nn

from llmpq import kernels
from llmpq.models.ends import Embedding
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.spec import ModelSpec, Plan, UnitPrecision

M = TypeVar("M", bound=nn.Module)


class Form(NamedTuple):
    """What a loaded unit depends on, beside the model, its device and its backend."""

    precision: UnitPrecision
    activations: str
    compute_dtype: str
    positions: int  # for which it has learned embeddings


def forms_of(spec: ModelSpec, plan: Plan, stage_index: int) -> dict[str, Form]:
    """The forms of a stage's units."""
    stage = plan.stages[stage_index]

    def positions(unit: str) -> int:
        return plan.max_length if unit == "embedding" and spec.position_offset is not None else 0

    return {
        unit: Form(plan.precision(unit), stage.activations, stage.compute_dtype, positions(unit))
        for unit in plan.units_of(stage_index)
    }


class Units:
    """Modules by unit, each with its form. `before_load` is called before one is loaded, and may raise."""

    def __init__(self, before_load: Callable[[], None] = lambda: None) -> None:
        self._held: dict[str, tuple[Form, nn.Module]] = {}
        self._before_load = before_load

    def keep(self, forms: dict[str, Form]) -> int:
        """Let go of all that are not among these. Returns how many are left."""
        self._held = {unit: held for unit, held in self._held.items() if held[0] == forms.get(unit)}
        return len(self._held)

    def find(self, unit: str, form: Form) -> nn.Module | None:
        """A unit, if it is here in this form."""
        found, module = self._held.get(unit, (None, None))
        return module if found == form else None

    def get(self, unit: str, form: Form, load: Callable[[], M]) -> M:
        """A unit in this form, loaded if it is not here yet."""
        module = self.find(unit, form)
        if module is None:
            self._before_load()
            module = load()
            self._held[unit] = form, module
        return cast(M, module)

    @property
    def nbytes(self) -> int:
        """Of their weights; a table that two of them share counts once."""
        weights = {id(weight): weight for _, module in self._held.values() for weight in weights_of(module)}
        return sum(weight.nbytes for weight in weights.values())


def weights_of(module: nn.Module) -> list[kernels.PreparedWeight]:
    """All that a module and its parts multiply by or look up."""
    weights = list[kernels.PreparedWeight]()
    for part in module.modules():
        if isinstance(part, Embedding):
            weights.append(part.table)
        elif isinstance(part, QuantLinear):
            weights.append(part.weight)
        elif isinstance(part, ExpertLinear):
            weights += part.weights
    return weights
