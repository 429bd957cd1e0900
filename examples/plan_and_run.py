"""The demo model on two devices of your own: planned, and run as a pipeline of two processes.

Here both are this machine's CPU, and neither may hold the whole model. GPUs are written cuda:0, cuda:1 and so on, other
instruction sets isa=avx2. The first time devices and model are measured, which takes a while. The sensitivity of all
units together is bounded: with 4 bits everywhere it would be 0.34, and answers poor; as the file stores them, it is 0.
"""

from llmpq import LLM, SamplingParams
from planner import Constraints

DEVICES = "cpu:name=first,memory=80MiB; cpu:name=second,memory=80MiB"
PROMPTS = ["What is the capital of France?", "Name three countries in Europe."]

if __name__ == "__main__":  # the workers are processes of their own
    with LLM("demo", devices=DEVICES, constraints=Constraints(omega_budget=0.001)) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24))
        assert llm.plan is not None and llm.prediction is not None
        for stage, size in zip(llm.plan.stages, llm.prediction.memory_bytes):
            widths = ", ".join(sorted({str(width) for width in stage.widths}))
            print(f"{stage.device}: {len(stage.widths)} layers, {widths} bits, {size / 2**20:.1f} MiB")
    for output in outputs:
        print(f"> {output.prompt}\n{output.text.strip()}")
