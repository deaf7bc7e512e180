"""The commands that people type, on a tiny model folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import byte_tokenizer, tiny_llama
from typer.testing import CliRunner

from gatedwarmth import GatedWarmthModel
from gatedwarmth.bench.subjects import acting_adapter
from gatedwarmth.chat import Chat
from gatedwarmth.cli import app
from gatedwarmth.errors import (
    BaseModelError,
    ConversationError,
    DataError,
    GateError,
    ModelFolderError,
    TrainingError,
)
from gatedwarmth.files import read_jsonl
from gatedwarmth.folders import read
from gatedwarmth.gates import policy_from_name
from gatedwarmth.router import Card, Network, ProbeRouter, Router, TextRouter, TextSettings, TextWeights


def text_router() -> TextRouter:
    settings = TextSettings(bits=10)
    return TextRouter(TextWeights(np.zeros((settings.columns, 1), np.float32), settings), np.ones(1), Card())


def probe_router() -> ProbeRouter:
    network = Network(np.full((4 * 48, 2), 0.01), np.zeros(2), np.ones((2, 1)), np.zeros(1))
    return ProbeRouter(network, (1, 3), "tiny", Card())


def folder_with(router: Router | None, tmp_path: Path) -> Path:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapters = {"warmth": acting_adapter(base, 4, seed=1), "neutral": acting_adapter(base, 3, seed=2)}
    model = GatedWarmthModel.from_pretrained(tmp_path / "base", adapters, router)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("router", [text_router(), probe_router()])
def test_route_says_what_the_model_would_do(router: Router, tmp_path: Path) -> None:
    folder = folder_with(router, tmp_path)
    expected = GatedWarmthModel.from_pretrained(folder).route([{"role": "user", "content": "I got the job!"}])
    run = CliRunner().invoke(app, ["route", str(folder), "I got the job!"], catch_exceptions=False)
    assert run.exit_code == 0 and f"warmth {expected.gates['warmth']:.3f}" in run.output
    with pytest.raises(ConversationError, match="empty"):
        CliRunner().invoke(app, ["route", str(folder), "  "], catch_exceptions=False)


def test_check_proves_a_good_folder_and_names_what_fails(tmp_path: Path) -> None:
    folder = folder_with(None, tmp_path)
    good = CliRunner().invoke(app, ["check", str(folder)], catch_exceptions=False)
    assert good.exit_code == 0 and "FAILED" not in good.output and good.output.count("ok ") >= 4
    (folder / "adapters" / "warmth" / "adapter_model.safetensors").write_bytes(b"cut")
    bad = CliRunner().invoke(app, ["check", str(folder)], catch_exceptions=False)
    assert bad.exit_code == 1 and "FAILED" in bad.output
    missing = CliRunner().invoke(app, ["check", str(tmp_path / "none")], catch_exceptions=False)
    assert missing.exit_code == 1 and "no model folder" in missing.output


def test_chat_gates_undo_save_and_bad_commands(tmp_path: Path) -> None:
    model = GatedWarmthModel.from_pretrained(folder_with(text_router(), tmp_path))
    console = Console(file=(tmp_path / "screen.txt").open("w"), width=100)
    chat = Chat(model, {"max_new_tokens": 3, "do_sample": False}, console=console)
    chat.handle("/gate warmth 0")
    chat.handle("hello")
    assert chat.held == {"warmth": 0.0} and len(chat.conversation.messages) == 2
    assert chat.conversation.replies[0].opening["warmth"] == 0.0
    chat.handle(f"/save {tmp_path / 'talk'}")
    chat.handle("/undo")
    assert chat.conversation.messages == []
    chat.handle(f"/load {tmp_path / 'talk'}")
    assert len(chat.conversation.messages) == 2
    for line, said in (('/gate warmth "0', "quotation"), ("/gate warmth 7", "0, 1"), ("/nothing", "unknown command")):
        with pytest.raises(GateError, match=said):
            chat.handle(line)


def test_broken_files_and_devices_get_errors_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"id": "ä"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="latin.jsonl:1.*UTF-8"):
        list(read_jsonl(tmp_path / "latin.jsonl"))
    (tmp_path / "gatedwarmth.json").write_text("[]")
    with pytest.raises(ModelFolderError, match="not an object"):
        read(tmp_path)
    folder = folder_with(None, tmp_path)
    with pytest.raises(BaseModelError, match="'nowhere' cannot be used"):
        GatedWarmthModel.from_pretrained(folder, device="nowhere")


def test_a_style_that_no_pair_has_is_refused_before_a_base_is_loaded(tmp_path: Path) -> None:
    command = ["train", "adapter", "--style", "icy", "--base", str(tmp_path / "none"), "--out", str(tmp_path / "a")]
    with pytest.raises(TrainingError, match="no reply in style 'icy'"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_threshold_that_no_gate_could_reach_is_refused() -> None:
    with pytest.raises(GateError, match="found 2.0"):
        policy_from_name("hard:2")


def test_the_version_is_told() -> None:
    run = CliRunner().invoke(app, ["--version"])
    assert run.exit_code == 0 and run.output == f"gatedwarmth {version('gatedwarmth')}\n"
