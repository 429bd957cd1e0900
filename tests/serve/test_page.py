"""The page of the server, in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpq.spec.layers import KV_BLOCK, blocks_for
from tests.support import browser
from tests.support.served import KEY, ROOM, SLOTS, Served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.executable() is None, reason="no Chromium here; LLMPQ_CHROMIUM names one"),
]

CACHE = "document.getElementById('cache').textContent"


def test_the_page_draws_the_plan_streams_an_answer_and_updates(served: Served, tmp_path: Path) -> None:
    with browser.page(tmp_path) as page:
        page.open(served.root)
        page.wait("!document.getElementById('key').hidden")  # it asks for the key
        page.value(f"sessionStorage.setItem('llmpq-key', '{KEY}')")
        page.wait("document.querySelectorAll('.stage').length == 2 && document.getElementById('key').hidden")
        assert page.value("document.getElementById('model').textContent") == served.name
        assert page.value("document.querySelectorAll('.unit').length") == 5  # embedding, layers, head
        page.value("document.getElementById('text').value = 'hello'; document.getElementById('send').click()")
        page.wait("(window.told = document.querySelectorAll('#talk p')[1]?.textContent.length) > 40")
        page.wait("document.querySelectorAll('#talk p')[1].textContent.length > window.told")  # it grows
        page.wait("/1 of 4 slots/.test(document.getElementById('queue').textContent)")
        page.wait(f"/[1-9]\\d* of {SLOTS * KV_BLOCK * blocks_for(ROOM)} tokens/.test({CACHE})")
        stages = "[...document.querySelectorAll('.stage')]"
        page.wait(f"{stages}.every(s => /busy.*\\d+ %, bubble \\d+ %/.test(s.textContent))")
        page.wait("Number(document.getElementById('rate').textContent) > 0")
        page.wait(f"{stages}.every(s => /memory[1-9][\\d.]* MiB/.test(s.textContent))")
        page.value("document.getElementById('stop').click()")
        page.wait("/0 of 4 slots/.test(document.getElementById('queue').textContent)")
        assert page.problems == []
