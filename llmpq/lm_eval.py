"""`python -m llmpq.lm_eval` is `lm_eval`, of the package lm-eval, which knows the model `llmpq` then."""

import sys

from llmpq.cli.main import carry_out
from llmpq.spec import UsageError


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import llmpq.harness  # noqa: F401  makes the model known
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; install what is missing with pip install 'llmpq[eval]'") from None
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(carry_out(main))
