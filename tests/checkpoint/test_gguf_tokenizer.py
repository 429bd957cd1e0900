"""Tokenizers of GGUF files, and sentencepiece models alone: what their own library makes of a text, or a person."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from tokenizers import pre_tokenizers

from llmpq.checkpoint import gguf_tokenizer
from llmpq.checkpoint.tokenizer import open_tokenizer
from llmpq.spec import UsageError
from tests.support.tiny_models import save_model

TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "abc", "ab", "<s>"]
TEXT = "I'LL say HeLLo12345, don't\n\n  (x_y)  été 東京. a..b\t99"
TEXTS = ["Hello world, 東京 é 123", "the model of a plan", "  two  spaces", "a\n\tb", "<think>x", ""]


def _write(path: Path, kind: str, tokens: list[str], architecture: str = "olmo2", **keys: Any) -> None:
    """A GGUF file with a tokenizer and nothing else, of an architecture that transformers does not read."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", "Ġb", "'s", "Ċ", "Ġ(", "c"]),
        ("llama-bpe", ["a", "Ġ", "123", "4", "Ġb", "'s", "Ċ", "Ġ(", "c"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "Ġb", "'s", "Ċ", "Ġ(", "c"]),
        ("gpt-4o", ["a", "Ġ", "123", "4", "Ġb's", "Ċ", "Ġ(", "c"]),
        ("gpt-2", ["a", "Ġ1234", "Ġb", "'s", "Ċ", "Ġ(", "c"]),
        ("falcon", ["a", "Ġ", "123", "4", "Ġb", "'", "s", "ĊĠ", "(", "c"]),
        ("bloom", ["a", "Ġ1234", "Ġb's", "ĊĠ(", "c"]),
        ("deepseek-v3", ["a", "Ġ", "123", "4", "Ġb", "'s", "Ċ", "Ġ(", "c"]),
    ],
)
def test_text_is_split_as_the_file_names_it(name: str, pieces: list[str], tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf", "gpt2", TOKENS, tokenizer_pre=name, token_merges=["a b"])
    splitting = open_tokenizer(tmp_path / "m.gguf")._tokenizer.backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitting.pre_tokenize_str("a 1234 b's\n (c")] == pieces


def test_ways_that_transformers_knows_are_its_own(tmp_path: Path) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    shared = mapping.GGUF_PRE_TOKENIZER_SPLITS.keys() & gguf_tokenizer._SPLITS.keys()
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= shared
    for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o"):
        _write(tmp_path / "m.gguf", "gpt2", TOKENS, tokenizer_pre=name, token_merges=["a b"])
        own = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="m.gguf").backend_tokenizer
        ours = open_tokenizer(tmp_path / "m.gguf")._tokenizer.backend_tokenizer
        assert ours.pre_tokenizer.pre_tokenize_str(TEXT) == own.pre_tokenizer.pre_tokenize_str(TEXT)


def test_a_word_that_is_a_token_is_one_where_no_merges_are_looked_up(tmp_path: Path) -> None:
    first, c, ab, abc = map(TOKENS.index, ("<s>", "c", "ab", "abc"))
    keys = {"token_merges": ["a b"], "bos_token_id": first}
    for name, more, expected in (
        ("llama-bpe", {}, [first, abc]),  # its texts begin with the first token, unless the file says otherwise
        ("llama-bpe", {"add_bos_token": False}, [abc]),
        ("gpt-2", {}, [ab, c]),
        ("gpt-2", {"add_bos_token": True}, [first, ab, c]),
    ):
        _write(tmp_path / "m.gguf", "gpt2", TOKENS, tokenizer_pre=name, **keys, **more)
        assert open_tokenizer(tmp_path / "m.gguf").encode("abc") == expected


def test_what_is_not_known_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    for kind, name, message in (
        ("gpt2", "martian", r"m.gguf has tokenizer.ggml.pre = 'martian', a way to split text that is not known; known"),
        ("bert", "default", "the tokenizer of .*m.gguf cannot be read: .*bert"),
    ):
        _write(tmp_path / "m.gguf", kind, TOKENS, tokenizer_pre=name, token_merges=["a b"])
        with pytest.raises(UsageError, match=message) as caught:
            open_tokenizer(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)


def _train(**options: Any) -> Any:
    """A sentencepiece model of a few words, and its own processor."""
    library = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    model = io.BytesIO()
    lines = ["the model of the plan", "a plan is a model of the world", "hello world, the plan"] * 3
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<think>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue(), library.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_the_same_in_a_gguf_file(prefix: bool, tmp_path: Path) -> None:
    _, own = _train(add_dummy_prefix=prefix)
    ids = range(own.vocab_size())
    kinds = [(own.is_unknown, 2), (own.is_control, 3), (lambda i: own.id_to_piece(i) == "<think>", 4), (own.is_byte, 6)]
    _write(
        tmp_path / "m.gguf",
        "llama",
        list(map(own.id_to_piece, ids)),
        token_scores=list(map(own.get_score, ids)),
        token_types=[next((kind for holds, kind in kinds if holds(i)), 1) for i in ids],
        bos_token_id=own.bos_id(),
        eos_token_id=own.eos_id(),
        unk_token_id=own.unk_id(),
        add_space_prefix=prefix,
    )
    tokenizer = open_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        if prefix and "<think>" in text:
            continue  # the library puts the space before it, llama.cpp behind it
        assert tokenizer.encode(text) == [own.bos_id(), *own.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


MISTRAL = "{{bos_token}}{% for m in messages %}[INST] {{m['content']}} [/INST]{{eos_token}}[INST]{% endfor %}"
PHI = "{{bos_token}}{% for m in messages %}<|user|>\n{{m['content']}}<|end|>\n{% endfor %}{{eos_token}} "


@pytest.mark.parametrize(
    ("architecture", "name", "template", "keys", "expected"),
    [
        ("llama", "mistral-7b", MISTRAL, {}, "<s> ▁[ INST ] ▁hi ▁[ / INST ] </s> ▁[ INST ]"),
        ("llama", "m", MISTRAL, {"add_space_prefix": False}, "<s> [ INST ] ▁hi ▁[ / INST ] </s> [ INST ]"),
        ("gemma", "gemma-2b", MISTRAL, {}, "<s> [ INST ] ▁hi ▁[ / INST ] </s> [ INST ]"),
        ("phi3", "Phi3", PHI, {}, "<s> <|user|> ▁hi <|end|> </s>"),
        ("phi3", "a fine one", PHI, {}, "<s> <|user|> ▁hi <|end|> </s>"),
        ("llama", "unsloth_Phi-3-mini", PHI, {}, "<s> <|user|> ▁hi <|end|> </s>"),
        # The same but for its name, which is no part of the tokenizer.
        ("llama", "mistral-7b", PHI, {}, "<s> <|user|> ▁ <0x0A> hi <|end|> ▁ <0x0A> </s> ▁ ▁"),
    ],
)
def test_spaces_of_a_chat_are_where_llama_cpp_has_them(
    architecture: str, name: str, template: str, keys: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    words = {"▁[": -1.0, "IN": -2.0, "ST": -3.0, "INST": -2.5, "▁h": -4.0, "hi": -1.5, "▁hi": -1.2}
    letters = ["▁", *map(chr, range(33, 127))]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *words,
        "<|user|>",
        "<|end|>",
    ]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(words)), 3, 4]
    scores = [*[0.0] * 259, *(-10.0 - i for i in range(len(letters))), *words.values(), 0.0, 0.0]
    keys = {**keys, "name": name, "token_scores": scores, "token_types": kinds, "chat_template": template}
    keys |= {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    _write(tmp_path / "m.gguf", "llama", tokens, architecture, **keys)
    tokenizer = open_tokenizer(tmp_path / "m.gguf")
    assert " ".join(tokens[token] for token in tokenizer.encode_chat("hi")) == expected
    for text in ("hi", "  hi x", "\nhi", "hi\n\n hi", " é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_model_is_a_tokenizer_by_itself(tmp_path: Path) -> None:
    model, own = _train()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = open_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text, special=False) == own.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_packages_that_a_sentencepiece_model_takes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpq.checkpoint.tokenizer.find_spec", lambda name: None)
    save_model(tmp_path, "llama-gqa")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05")
    open_tokenizer(tmp_path)  # tokenizer.json is there
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.model takes the packages sentencepiece and protobuf; install"):
        open_tokenizer(tmp_path)
