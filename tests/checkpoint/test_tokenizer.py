"""Tokenizers: the checkpoint's own, and bytes in the place of one for random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from llmpq.checkpoint.model_files import load_tokenizer, open_model, resolve
from llmpq.checkpoint.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from llmpq.spec import UsageError
from tests.support.gguf_files import write_gguf
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


def test_a_text_is_encoded_with_its_first_token_or_without(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    bare = open_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path))
    begun = open_tokenizer(tmp_path)
    assert begun.encode("hé") == [0, *bare.encode("hé")]
    assert begun.encode("hé", special=False) == bare.encode("hé", special=False) == bare.encode("hé")
    assert begun.bos_token_id == bare.bos_token_id == 0
    assert ByteTokenizer(256).bos_token_id is None


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


def test_random_weights_do_not_hide_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    save_model(tmp_path, "opt")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(resolve(str(tmp_path), "dummy"))


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


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "demo"])
def test_a_vocabulary_has_the_bytes_of_what_is_encoded(kind: str, tmp_path: Path) -> None:
    if kind == "demo":
        tokenizer = open_model("demo").tokenizer
    else:
        (save_tokenizer if kind == "bytes" else sentencepiece_like)(tmp_path)
        tokenizer = open_tokenizer(tmp_path)
    for text in ("a b  ab", 'x{"a": [1, 2]}\n\té 日本 \U0001f389'):
        ids = tokenizer.encode(text, special=False)
        spelled = b"".join(tokenizer.vocabulary[token] for token in ids)
        assert spelled.removeprefix(b" ") == text.encode(), ids
    special = [token for token, found in enumerate(tokenizer.vocabulary) if not found]
    assert set(special) >= set(tokenizer._tokenizer.all_special_ids)


def edit_tokenizer_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "fails: System role not supported"),
        ([{"name": "rag", "template": "R"}], "has the chat templates 'rag', and none of them is named default"),
        ("{% for", "fails: unexpected 'end of template'"),
        ("{{ messages[9].content }}", "fails: list object has no element 9"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ 'a' * 10**7 }}", "fails: it makes 10000000 characters of 5"),
        ("{{ raise_exception('\x1b[2J') }}", r"fails: \x1b[2J"),
        ([1], "cannot be read"),
    ],
)
def test_what_a_chat_template_raises_is_one_line(template: Any, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    edit_tokenizer_config(tmp_path, chat_template=template)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_tokenizer(resolve(str(tmp_path))).encode_chat("hello")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "tool_call_id": "c", "content": "2"},
]
ASKING = (
    "{% if tools is not none and tools %}{{ tools | tojson }}{% endif %}{{ strftime_now('%Y') }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.mark.parametrize("kind", ["configuration", "file", "named", "gguf"])
def test_a_conversation_is_written_as_transformers_writes_it(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        write_tokenizer(tmp_path / "m.gguf", sorted(pre_tokenizers.ByteLevel.alphabet()), ASKING)
        tokenizer = open_tokenizer(tmp_path / "m.gguf")
        own = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="m.gguf")
    else:
        save_model(tmp_path, "llama-gqa")
        if kind == "file":
            (tmp_path / "chat_template.jinja").write_text(ASKING)
        else:
            named = [{"name": "default", "template": ASKING}, {"name": "rag", "template": "R"}]
            edit_tokenizer_config(tmp_path, chat_template=named if kind == "named" else ASKING)
        tokenizer = open_tokenizer(tmp_path)
        own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in (CONVERSATION, CONVERSATION[1:2]):
        expected = own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.has_chat_template and tokenizer.encode_chat(messages) == expected
    text = tokenizer.decode(tokenizer.encode_chat(CONVERSATION))
    assert text[4:] == '<system>be brief<user>hé<assistant>{"x": 1}<tool>2<answer>' and text[:4].isdecimal()


IN_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>"
    "{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.mark.parametrize(
    "template", [IN_PARTS, "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"]
)
def test_a_template_that_knows_contents_as_parts_gets_them_so(template: str, tmp_path: Path) -> None:
    """Where older programs of models that see images have it. One that changes texts gets these as they are."""
    save_model(tmp_path, "llama-gqa")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = open_tokenizer(tmp_path)
    text = tokenizer.decode(tokenizer.encode_chat(CONVERSATION[:2]))
    in_parts = template == IN_PARTS
    assert text == ("<system>be brief<user>hé<answer>" if in_parts else "<system>BE BRIEF<user>HÉ")


@pytest.mark.parametrize("said", ["a", "user", ""])
@pytest.mark.parametrize("fails", [False, True])
def test_contents_get_into_a_template_of_parts_whatever_they_are(said: str, fails: bool, tmp_path: Path) -> None:
    """Also words that the template has itself, and where it fails with a text."""
    save_model(tmp_path, "llama-gqa")
    template = "{{ messages[0].content[0]['text'] + '' }}" + IN_PARTS if fails else IN_PARTS
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = open_tokenizer(tmp_path)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": said}]
    text = tokenizer.decode(tokenizer.encode_chat(messages))
    assert text == ("be brief" if fails else "") + f"<system>be brief<user>{said}<answer>"


def test_a_chat_template_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "llama-gqa")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}"
    edit_tokenizer_config(tmp_path, chat_template=endless)
    monkeypatch.setattr("llmpq.checkpoint.tokenizer.TEMPLATE_S", 0.2)
    tokenizer = load_tokenizer(resolve(str(tmp_path)))
    for _ in range(3):
        with pytest.raises(UsageError, match=r"the chat template of .* fails: it takes longer than 0\.2 s"):
            tokenizer.encode_chat("hello")
    assert tokenizer.encode("still there") == tokenizer.encode("still there")


@pytest.mark.parametrize(
    "model",
    [{"type": "BPE", "vocab": {"a": "x"}, "merges": 3}, {}, {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(model: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": model}))
    with pytest.raises(UsageError, match=r"the tokenizer of .* cannot be read: ") as caught:
        load_tokenizer(resolve(str(tmp_path)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


def test_a_text_that_cannot_be_encoded_is_one_line(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    with pytest.raises(UsageError, match=r"the tokenizer of .* cannot encode '\\ud800'"):
        load_tokenizer(resolve(str(tmp_path))).encode("\ud800")


def test_what_a_library_raises_as_it_writes_is_one_line(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: str) -> None:
            raise Exception("No space left on device (os error 28)")  # as tokenizers does, in Rust

    with pytest.raises(UsageError, match=r"the tokenizer of tiny cannot be written to .*: No space left"):
        Tokenizer(Full(), "tiny").save(tmp_path)


def test_code_beside_a_tokenizer_is_never_run_and_nobody_is_asked(tmp_path: Path, capfd: Any) -> None:
    save_model(tmp_path, "llama-gqa")
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    edit_tokenizer_config(tmp_path, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    with pytest.raises(UsageError, match="it needs code from its own folder, which is never run"):
        load_tokenizer(resolve(str(tmp_path)))
    assert not (tmp_path / "executed").exists()
    assert "[y/N]" not in "".join(capfd.readouterr())


def write_tokenizer(path: Path, tokens: list[str], template: str | None = None, architecture: str = "llama") -> None:
    """A GGUF file with a byte-level tokenizer of these tokens and "ab", and no model."""
    tokens = [*tokens, "ab"]
    writer = gguf.GGUFWriter(path, architecture)
    for add, number in [(writer.add_block_count, 1), (writer.add_context_length, 8), (writer.add_embedding_length, 8)]:
        add(number)
    for add in (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length):
        add([1, 1])  # a value for each layer, which is no business of the tokenizer
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_tokenizer_of_a_gguf_file_is_the_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tokenizer(path, ["<s>", "a", "b", "c"])
    # What lies beside the file belongs to another model, or to nobody.
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": "Z", "auto_map": {"AutoTokenizer": ["x.X", null]}}'
    )
    (tmp_path / "added_tokens.json").write_text('{"abc": 9}')
    (tmp_path / "config.json").write_text("broken")
    (tmp_path / "chat_template.jinja").write_text("Z")
    tokenizer = open_tokenizer(path)
    assert tokenizer.encode_chat("cba") == tokenizer.encode("cba") == [3, 2, 1]


@pytest.mark.parametrize("architecture", ["gptneox", "gemma", "falcon"])
def test_the_tokenizer_is_that_of_its_own_kind_in_any_architecture(architecture: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "m.gguf", ["<s>", "a", "b", "c"], architecture=architecture)
    assert open_tokenizer(tmp_path / "m.gguf").encode("cab") == [3, 4]


def test_a_gguf_file_without_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match=r"m\.gguf holds no tokenizer: it has no tokenizer\.ggml\.model"):
        open_tokenizer(tmp_path / "m.gguf")


def test_a_converted_tokenizer_is_kept_under_the_whole_header(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = ["<s>", "a", "b", "c"]
    write_tokenizer(path, tokens, "{{ messages[0]['content'] }}")
    assert open_tokenizer(path).encode_chat("ba") == [2, 1]
    write_tokenizer(path, ["<s>", "c", "b", "a"], "{{ messages[0]['content'] }}")
    assert open_tokenizer(path).encode_chat("ba") == [2, 3]
    filling = "{#" + "c" * 2**24 + "#}"  # what follows is far behind the file's beginning
    for text, ids in (("b", [2]), ("c", [3])):
        write_tokenizer(path, tokens, filling + text)
        assert open_tokenizer(path).encode_chat("a") == ids


def test_a_kept_tokenizer_is_taken_as_it_was_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.5 makes one of a family of it, with other tokens for what is no word."""
    path = tmp_path / "m.gguf"
    write_tokenizer(path, ["<s>", "a", "b", "c"], "{{ messages[0]['content'] }}")
    first = open_tokenizer(path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("made anew"))
    again = open_tokenizer(path)
    assert again.encode_chat("cab") == first.encode_chat("cab") == [3, 4]
    assert again.decode([3, 1]) == first.decode([3, 1]) and again.bos_token_id == first.bos_token_id


def test_what_a_library_prints_of_a_file_is_not_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"][0]["\x1b[2J"] = 1
    path.write_text(json.dumps(value))
    open_tokenizer(tmp_path)
    assert "\x1b" not in "".join(capfd.readouterr())
