"""Quantizers on the same network and calibration text, judged by one evaluator on the weights that they leave.

    python -m bench.quality.rivals [--beds A,B,OPT,QWEN] [--bits 3,4,8] [--groups 32,64,128] [--methods NAME,...]
                                   [--thirds] [--work FOLDER] [--json-out FILE]

Networks are the beds of bench/quality/beds.py. The built-in text has a part for calibration and one for the test, which
share no paragraph. With --thirds every third topic is for the test instead, and paragraphs that topics share are in
both; such rows are those of another bed. Rivals: pip install '.[rivals-quality]'; what is missing is listed. FILE
is written after each row, and what it holds already is not measured again, so that a long comparison is made in parts.
Bits per weight are those of the layers' linears; embedding and head stay as they are for everyone.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

from bench.machine import commit, describe, versions, write_results
from bench.quality import rivals
from bench.quality.beds import BEDS, USUAL, Bed, network, open_bed
from bench.quality.evaluation import Evaluator, Windows, fields
from llmpq.checkpoint.model_files import Model
from llmpq.measure.text import calibration_text, evaluation_text, read_text

LENGTH = 512
CALIBRATION_WINDOWS, TEST_WINDOWS, OTHER_WINDOWS = 32, 16, 8
OTHER_TEXT = Path("/usr/share/common-licenses/GPL-3")  # on every Debian; far from the calibration's domain


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def thirds() -> tuple[str, str]:
    """Two thirds of the topics for calibration, one for the test."""
    names = sorted(topics.topics)
    test = names[::3]
    read = [name for name in names if name not in test]
    return "\n\n".join(topics.topics[name] for name in read), "\n\n".join(topics.topics[name] for name in test)


def judged_texts(model: Model, test: str, arguments: argparse.Namespace) -> list[Windows]:
    """The test text, of thirds its beginning, and the other one if it is there."""
    token_ids = model.tokenizer.encode(test)
    if arguments.thirds:
        token_ids = token_ids[: arguments.windows * LENGTH]
    found = [Windows.spread("test", token_ids, arguments.windows, LENGTH)]
    if arguments.other_text.exists():
        token_ids = model.tokenizer.encode(read_text(arguments.other_text))
        found.append(Windows.spread("other", token_ids, arguments.other_windows, LENGTH))
    return found


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int | None]]:
    for name in arguments.methods:
        for bits, group in rivals.sizes(name, arguments.bits, arguments.groups):
            yield name, bits, group


def measure(task: rivals.Task, evaluator: Evaluator, name: str) -> dict[str, Any]:
    """What a row says of a method. Raises what the method raises."""
    started, cpu_started = time.perf_counter(), time.process_time()
    quantized = rivals.quantize(name, task)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    found = fields(evaluator.measure(quantized.weights))
    return {
        "bits_per_weight": quantized.bits_per_weight,
        **found,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "commit": commit(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", type=words, default=list(USUAL), metavar=",".join(BEDS))
    parser.add_argument("--bits", type=numbers, default=[3, 4, 8], metavar="B,...")
    parser.add_argument("--groups", type=numbers, default=[32, 64, 128], metavar="G,...")
    parser.add_argument("--methods", type=words, default=list(rivals.METHODS), metavar="NAME,...")
    parser.add_argument("--thirds", action="store_true", help="another split of the built-in text")
    parser.add_argument("--windows", type=int, default=TEST_WINDOWS, help="of the test text")
    parser.add_argument("--other-windows", type=int, default=OTHER_WINDOWS)
    parser.add_argument("--calibration-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--other-text", type=Path, default=OTHER_TEXT, metavar="FILE")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-quality", metavar="FOLDER")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    kept = json.loads(arguments.json_out.read_text()) if arguments.json_out and arguments.json_out.exists() else {}
    results = {
        **describe(),
        "versions": kept.get("versions", {}) | versions(rivals.DISTRIBUTIONS),
        "texts": kept.get("texts", {}),
        "missing": kept.get("missing", {}),
        "rows": kept.get("rows", []),
    }
    for name in arguments.beds:
        measure_bed(open_bed(name, arguments.work), arguments, results)


def measure_bed(bed: Bed, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Add the rows of a bed that are not there yet, and write after each. Raises SystemExit if the texts are others."""
    rows, missing = results["rows"], results["missing"]
    name = f"{bed.name}, thirds" if arguments.thirds else bed.name
    read, test = thirds() if arguments.thirds else (calibration_text(), evaluation_text())
    judged, token_ids = judged_texts(bed.model, test, arguments), bed.model.tokenizer.encode(read)
    calibration = Windows.spread("calibration", token_ids, arguments.calibration_windows, LENGTH)
    about = {
        "digests": {text.name: text.digest for text in (calibration, *judged)},
        "calibration_tokens": calibration.token_ids.numel(),
        "predictions": {text.name: text.predictions for text in judged},
    }
    if results["texts"].setdefault(f"bed {name}", about) != about:
        raise SystemExit(f"{arguments.json_out} holds figures of other texts; name another file")
    evaluator = Evaluator(network(bed.folder), judged, bed.folder)
    plain = {"model": BEDS[bed.name], "bed": name, "method": "16 bits", "bits": 16, "group_size": None}
    if plain not in [{field: row[field] for field in plain} for row in rows]:
        rows.append({**plain, "bits_per_weight": 16.0, **fields(evaluator.measure({})), "seconds": 0.0})
    for method, bits, group in wanted(arguments):
        key = {**plain, "method": method, "bits": bits, "group_size": group}
        if key in [{field: row[field] for field in key} for row in rows]:
            continue
        where = f"{method}, {bits} bits, groups of {group}, bed {name}" if group else f"{method}, bed {name}"
        try:
            task = rivals.Task(bed, token_ids, calibration.token_ids, bits, group or 0)
            rows.append({**key, **measure(task, evaluator, method)})
            missing.pop(where, None)
            print(json.dumps(rows[-1]), flush=True)
        except Exception as error:  # whatever a library raises: the others are measured all the same
            missing[where] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            print(f"{where}: {missing[where]}", flush=True)
        if arguments.json_out:
            write_results(arguments.json_out, results)
        gc.collect()


if __name__ == "__main__":
    main()
