"""Tokenizers: the checkpoint's own, and bytes in the place of one for random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from llmpq.checkpoint.model_files import load_tokenizer, open_model, resolve
from llmpq.checkpoint.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from llmpq.spec import UsageError
from tests.support.tiny_models import make_model, save_model, save_tokenizer


def test_the_demos_cached_tokenizer_equals_the_one_that_transformers_converts() -> None:
    checkpoint = resolve("demo")
    path = checkpoint.path
    slow = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    load_tokenizer(checkpoint)
    cached = load_tokenizer(checkpoint)
    texts = ["What is the capital of France?", " two  spaces\n\tand\ttabs", "naïve 東京 🦊", "<|im_end|> 12345"]
    for text in texts:
        chat = slow.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert cached.encode_chat(text) == chat
        assert cached.encode(text) == slow.encode(text)
        assert cached.decode(slow.encode(text)) == slow.decode(slow.encode(text), skip_special_tokens=True)
    assert cached.decode(cached.encode("Paris<|im_end|>")) == "Paris"
    assert slow.decode(cached.encode_chat("hello")).endswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_chat_template_encodes_plain_text(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    tokenizer = load_tokenizer(resolve(str(tmp_path)))
    assert tokenizer.encode_chat("hé") == tokenizer.encode("hé")
    assert tokenizer.decode([0, *tokenizer.encode("hé, you"), 1]) == "hé, you"


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_a_model_without_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    for path in tmp_path.glob("token*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"the tokenizer of .* cannot be read") as caught:
        load_tokenizer(resolve(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama-gqa", "mistral", "opt"])
@pytest.mark.parametrize("vocab_size", [272, 50])
def test_random_weights_of_a_configuration_alone_take_bytes_for_tokens(
    kind: str, vocab_size: int, tmp_path: Path
) -> None:
    make_model(kind, vocab_size=vocab_size).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert not list(tmp_path.glob("*token*"))
    tokenizer = open_model(str(tmp_path), "dummy").tokenizer
    for text in ("hello", "naïve 東京"):
        tokens = tokenizer.encode(text)
        assert tokens == tokenizer.encode_chat(text) == [byte % vocab_size for byte in text.encode()]
        assert vocab_size < 256 or tokenizer.decode(tokens) == text


def test_random_weights_take_the_tokenizer_that_is_there(tmp_path: Path) -> None:
    save_model(tmp_path, "opt")
    (tmp_path / "model.safetensors").unlink()
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert open_model(str(tmp_path), "dummy").tokenizer.encode("hello") == own.encode("hello") != list(b"hello")


def sentencepiece_like(folder: Path) -> None:
    """A tokenizer whose words begin with a mark for the space before them, and that has a token for each byte."""
    marked = ["▁", "▁Once", "▁upon", "▁a", "▁time"]
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *marked, "."]
    model = models.Unigram([(word, -1.0) for word in words], unk_id=2, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def test_what_continues_a_text_joins_it(tmp_path: Path) -> None:
    sentencepiece_like(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    for text in ("Once upon a time. a 東京é", " a time", "Once é"):
        whole = [0, *tokenizer.encode(text)]
        for cut in range(1, len(whole)):
            start = tokenizer.decode(whole[:cut])
            if "\ufffd" not in start:  # cut between two characters
                assert start + tokenizer.decode(whole[cut:], after=whole[:cut]) == text.removeprefix(" ")
    words = tokenizer.encode("upon a")
    assert tokenizer.decode(words) == "upon a"
    assert tokenizer.decode(words, after=tokenizer.encode("Once")) == " upon a"


@pytest.mark.parametrize("kind", ["pieces", "bytes", "none"])
@pytest.mark.parametrize("character", ["é", "東", "🦊"])
def test_a_character_that_is_cut_is_one_replacement(character: str, kind: str, tmp_path: Path) -> None:
    if kind == "none":
        tokenizer: Tokenizer = ByteTokenizer(300)
    else:
        sentencepiece_like(tmp_path) if kind == "pieces" else save_tokenizer(tmp_path)
        tokenizer = open_tokenizer(tmp_path)
    prompt, rest = tokenizer.encode("é"), tokenizer.encode("a." + character)
    for cut in range(1, len(character.encode())):
        assert tokenizer.decode(rest[:-cut], after=prompt).endswith("a.\ufffd")
        assert tokenizer.decode([*rest[:-cut], *rest]).count("\ufffd") == 1
    assert tokenizer.decode(rest, after=prompt).endswith("a." + character)
