"""The Python interface: `LLM("demo").generate(["..."], SamplingParams(max_tokens=32))`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType

import planner
from llmpq import demo
from llmpq.checkpoint.model_files import LoadFormat, open_model
from llmpq.kernels.backends import cpu
from llmpq.measure.quantized_model import as_served
from llmpq.runtime.completion import Completion, Completions, outputs
from llmpq.runtime.engine import Engine
from llmpq.runtime.request import check_prompts
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Cluster, Output, Plan, Prediction, UsageError, Workload, parse_devices
from llmpq.workflow import make_plan, make_problem, workload_of


class LLM:
    """A model served by a pipeline over the given devices.

    `devices` is a Cluster, or its short form ("cpu:threads=1,memory=90MiB;cuda:0"); by default the demo's two. The plan
    is made, and the workers are started, at the first `generate`; they are kept for later calls until one has more or
    longer prompts, which is planned anew. A plan of your own is used as it is, on its own devices. Close it, or use it
    as a context manager, to end the workers.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        devices: str | Cluster | None = None,
        plan: Plan | None = None,
        constraints: planner.Constraints | None = None,
        load_format: LoadFormat = "auto",
    ) -> None:
        self._model = open_model(model, load_format)
        for note in self._model.notes:
            warnings.warn(note, stacklevel=2)
        if plan is not None and devices is not None:
            raise UsageError("both devices and a plan were given; a plan has its own devices")
        if devices is None:
            devices = demo.cluster(cpu.isa())
        self._cluster = parse_devices(devices) if isinstance(devices, str) else devices
        self._constraints = constraints or planner.Constraints()
        self._fixed_plan = plan is not None
        if plan is not None:
            plan.check_model(self._model.spec)
        self.plan = plan
        self.prediction: Prediction | None = None
        self._engine: Engine | None = None

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = True,
    ) -> list[Output]:
        """Completions in the order of the prompts, with one SamplingParams for all (None: greedy) or one for each.

        With `n`, those of one prompt are one after the other.

        With `chat`, prompts go through the model's chat template, if it has one. Else its text goes on where the prompt
        ends.

        Raises UsageError, before anything is generated, for a prompt that cannot be run; InfeasibleError,
        DeviceMemoryError, WorkerLostError.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            return []
        sampling = sampling or SamplingParams()
        tokenizer, spec = self._model.tokenizer, self._model.spec
        token_ids = [tokenizer.encode_chat(p) if chat else tokenizer.encode(p) for p in prompts]
        continued = not (chat and tokenizer.has_chat_template)
        asked = Completions(tokenizer, token_ids, sampling, [continued] * len(prompts))
        for params in asked.sampling:
            params.check_tokens(spec.vocab_size, spec.eos_token_ids)
        workload = workload_of(spec, asked.token_ids, max(params.max_tokens for params in asked.sampling), None)
        if self.plan is None or not (self._fixed_plan or _fits(workload, self.plan)):
            self.close()
            problem = make_problem(self._model, self._cluster, workload, self._constraints)
            solved = make_plan(self._model, problem)
            self.plan, self.prediction = solved.plan, solved.prediction
        check_prompts(token_ids, spec.vocab_size, self.plan.max_length, "the plan's slots")
        if self._engine is None or self._engine.closed:
            model, plan = as_served(self._model, self.plan)
            self._engine = Engine(plan, model.checkpoint, model.spec)
        answers: dict[int, list[Completion]] = {}
        asked.generate(self._engine, on_end=answers.__setitem__)
        return [output for i, prompt in enumerate(prompts) for output in outputs(answers[i], prompt, i)]

    def close(self) -> None:
        """End the workers; a later `generate` starts new ones."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fits(workload: Workload, plan: Plan) -> bool:
    """Whether a plan was made for as much as this."""
    return (
        workload.batch_size <= plan.slots
        and workload.longest_prompt <= plan.workload.longest_prompt
        and workload.max_length <= plan.max_length
    )
