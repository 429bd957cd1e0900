"""What a model's KV cache of 16 and of 8 bits loses on the evaluation text, with weights in 16 bits.

    python -m bench.quality.kv_cache [--model demo] [--max-tokens 4096] [--json-out FILE]

It is compared with the model whose keys and values are float32, as `llmpq eval --kv-bits 8` does. The standard error of
the share of likeliest tokens counts tokens as independent; the others are by how much windows differ.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, get_args

from bench.machine import describe, write_results
from llmpq.checkpoint.model_files import DEMO, open_model
from llmpq.measure.served_quality import TextQuality
from llmpq.measure.text import digest, evaluation_text
from llmpq.spec import W16, Device, KvBits, Plan


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, metavar="MODEL")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model, text = open_model(arguments.model), evaluation_text()
    quality = TextQuality(model, text, arguments.max_tokens)
    rows = []
    for bits in get_args(KvBits):
        plan = Plan.single(model.spec, Device("cpu0", "cpu"), W16, slots=1, max_length=1, kv_bits=bits)
        found = quality.of(plan)
        row: dict[str, Any] = {"kv_bits": bits, **found.to_dict()}
        row["perplexity"] = found.reference_perplexity * (1 + found.perplexity_increase)
        share = found.top1_agreement
        row["top1_agreement_error"] = math.sqrt(share * (1 - share) / quality.tokens)
        rows.append(row)
        print(row, flush=True)
    if arguments.json_out:
        header = {"model": model.spec.name, "text": digest(text), "tokens": quality.tokens}
        write_results(arguments.json_out, describe() | header | {"rows": rows})


if __name__ == "__main__":
    main()
