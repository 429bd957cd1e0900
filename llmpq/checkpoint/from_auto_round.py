"""AutoRound's own configuration of linears in the forms of GPTQ and AWQ: its packing_format says in which they are.

Files that transformers writes have other names of them, and the oldest have them as their backend, with the name of the
kernel: "auto_round:gptq:exllamav2". Source: auto-round 0.2 to 0.16.1.
"""

from __future__ import annotations

from llmpq.checkpoint.from_awq import AwqLinears
from llmpq.checkpoint.from_gptq import GptqLinears
from llmpq.checkpoint.linear_settings import LinearSettings
from llmpq.checkpoint.method_config import MethodConfig

_AWQ = ("awq", "auto_awq")
_LESS_ONE = {"gptq": True, "auto_gptq": True, "gptqmodel": False, "auto_round": False}


def auto_round_linears(config: MethodConfig) -> GptqLinears | AwqLinears:
    """Those of AutoRound's configuration. Raises UsageError for a packing_format that is neither form's."""
    key = next((key for key in ("packing_format", "backend") if config.values.get(key) is not None), "packing_format")
    packing = str(config.values.get(key)).lower().removeprefix("auto_round:").partition(":")[0]
    if packing not in (*_AWQ, *_LESS_ONE):
        raise config.refusal(key, "is not supported")
    settings = LinearSettings(config, ("packing_format",))
    return AwqLinears(settings) if packing in _AWQ else GptqLinears(settings, _LESS_ONE[packing])
