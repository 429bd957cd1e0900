"""A second model for figures of quality: a small OPT, trained here in a few minutes on the text that quantizers read.

    python -m bench.quality.small_opt [--work FOLDER]

Learned positions, ReLU, biases and a tied table, where the demo model has only the last. Only the calibration part of
the text is seen, by the tokenizer too. Prints the perplexity of the test part, and that of a model that only counts
tokens.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bench.quality.evaluation import Windows
from llmpq.measure.text import calibration_text, evaluation_text
from llmpq.temporary import working_folder

END = "</s>"  # where OPT's texts begin, end and are filled up; none is in the training text
SEED = 0


@dataclass(frozen=True)
class Training:
    """A network's size, and how long it learns; `steps` of `batch` windows of `length` tokens each."""

    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 8
    heads: int = 4
    length: int = 512
    batch: int = 1
    steps: int = 1200
    learning_rate: float = 1.5e-3
    dropout: float = 0.1
    spread: float = 1.5  # of channels, see spread_channels


def train(text: str, folder: Path, training: Training | None = None) -> None:
    """Write an OPT that has learned a text, and its tokenizer, to a folder that llmpq and transformers open.

    The same weights each time, on one machine. Raises ValueError for a text of less than a window.
    """
    training = training or Training()
    tokenizer = learn_tokenizer(text, training.vocab_size)
    token_ids = torch.tensor(tokenizer.encode(text))
    if len(token_ids) <= training.length:
        raise ValueError(f"the text has {len(token_ids)} tokens, which is no more than a window of {training.length}")
    network = _network(len(tokenizer), training)
    _learn(network, token_ids, training)
    spread_channels(network, training.spread)
    with working_folder() as partial:  # a folder with config.json is a whole one
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            (folder / path.name).write_bytes(path.read_bytes())


def learn_tokenizer(text: str, size: int) -> Any:
    """transformers' form of a byte-level BPE of at most `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _network(vocab_size: int, training: Training) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(SEED)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab_size,
            hidden_size=training.hidden_size,
            word_embed_proj_dim=training.hidden_size,
            ffn_dim=4 * training.hidden_size,
            num_hidden_layers=training.layers,
            num_attention_heads=training.heads,
            max_position_embeddings=training.length,
            dropout=training.dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def _learn(network: Any, token_ids: torch.Tensor, training: Training) -> None:
    generator = torch.Generator().manual_seed(SEED)
    matrices = [parameter for parameter in network.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))
    warm_up = max(1, training.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / training.steps)),
    )
    network.train()
    for step in range(training.steps):
        starts = torch.randint(len(token_ids) - training.length, (training.batch,), generator=generator)
        windows = token_ids[starts[:, None] + torch.arange(training.length + 1)]
        with torch.autocast("cpu", torch.bfloat16):  # takes less time on most processors
            logits = network(windows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {training.steps}: loss {loss.item():.2f}", flush=True)
    network.eval()


@torch.no_grad()
def spread_channels(network: Any, deviation: float) -> None:
    """Scale what goes into linears, channel by channel, and the weights that read it back: the same function.

    Large networks have channels of very different sizes, which is what makes few bits hurt; one trained for minutes has
    not. Factors are log-normal. Norms take theirs, rows of values too, and those of fc1, since ReLU lets them through.
    """
    generator = torch.Generator().manual_seed(SEED)

    def spread(writes: Any, *reads: Any) -> None:
        factors = torch.randn(len(writes.weight), generator=generator).mul(deviation).exp()
        for tensor in (writes.weight, writes.bias):
            tensor.mul_(factors if tensor.dim() == 1 else factors[:, None])
        for linear in reads:
            linear.weight.div_(factors)

    for layer in network.model.decoder.layers:
        attention = layer.self_attn
        spread(layer.self_attn_layer_norm, attention.q_proj, attention.k_proj, attention.v_proj)
        spread(attention.v_proj, attention.out_proj)
        spread(layer.final_layer_norm, layer.fc1)
        spread(layer.fc1, layer.fc2)


def counting_perplexity(seen: Sequence[int], read: Sequence[int], vocab_size: int) -> float:
    """Perplexity of the tokens `read` to whoever knows how often each was `seen`; one more is added to each count."""
    counts = torch.bincount(torch.tensor(seen), minlength=vocab_size).double() + 1
    return float((-(counts / counts.sum()).log()[torch.tensor(read)]).mean().exp())


@torch.inference_mode()
def perplexities(folder: Path, seen: str, text: str) -> tuple[float, float]:
    """Of a text: the network's in a folder, and that of counting the tokens of the text `seen`."""
    from transformers import AutoTokenizer, OPTForCausalLM

    network, tokenizer = OPTForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer.encode(text)
    windows = Windows.spread("test", token_ids, len(token_ids), network.config.max_position_embeddings).token_ids
    losses = [F.cross_entropy(network(ids[None]).logits[0, :-1], ids[1:]) for ids in windows]
    counting = counting_perplexity(tokenizer.encode(seen), windows[:, 1:].flatten().tolist(), len(tokenizer))
    return float(torch.stack(losses).mean().exp()), counting


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-quality", metavar="FOLDER")
    folder = parser.parse_args(argv).work / "OPT"
    if not (folder / "config.json").exists():
        start = time.process_time()
        train(calibration_text(), folder)
        print(f"trained in {time.process_time() - start:.0f} s of a processor")
    found, counting = perplexities(folder, calibration_text(), evaluation_text())
    print(f"perplexity of the test text: {found:.1f}; of counting tokens: {counting:.1f}")


if __name__ == "__main__":
    main()
