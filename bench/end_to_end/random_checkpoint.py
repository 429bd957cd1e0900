"""A checkpoint of random weights as a hub model has it: safetensors, configuration, tokenizer.

python -m bench.end_to_end.random_checkpoint FOLDER [--model short] [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.end_to_end import gpu_models


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(gpu_models.CONFIGS), default="short")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the weights are made")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """What is there already is left as it is."""
    arguments = parse(argv)
    if (arguments.folder / "tokenizer.json").exists():  # written last
        return 0
    config = transformers.LlamaConfig(**gpu_models.config(arguments.model))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(arguments.device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(arguments.folder)
    save_tokenizer(arguments.folder, config.vocab_size)
    return 0


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """One whose tokens are <s>, </s>, the 256 bytes, and as many more as the model can say."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"t{i}" for i in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
