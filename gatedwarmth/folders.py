"""The model folder: gatedwarmth.json, adapters/ as PEFT folders, router/, and a model card."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatedwarmth.adapters import save_adapter
from gatedwarmth.card import model_card
from gatedwarmth.errors import ModelFolderError
from gatedwarmth.files import write_folder_atomic, write_json_atomic
from gatedwarmth.gates import Policy, Scope, policy_from_name

if TYPE_CHECKING:
    from gatedwarmth.model import GatedWarmthModel

FILE = "gatedwarmth.json"
SCHEMA = 1


@dataclass(frozen=True)
class SavedModel:
    base: str
    adapters: dict[str, Path]
    router: Path | None
    policy: Policy
    scope: Scope


def is_model_folder(folder: str | Path) -> bool:
    return (Path(folder).expanduser() / FILE).is_file()


def read(folder: Path) -> SavedModel:
    """Read a model folder.

    Raises
    ------
    ModelFolderError: broken JSON, a missing part, or a schema that this version does not know.
    """
    path = folder.expanduser() / FILE
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelFolderError(
            f"{folder} is no model folder (no {FILE}); give one that `save_pretrained` or `gatedwarmth demo` wrote"
        ) from None
    except ValueError as error:  # JSON or UTF-8
        raise ModelFolderError(f"{path} is not JSON: {error}; save the model again") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} holds a {type(value).__name__}, not an object; save the model again")
    schema = value.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "upgrade gatedwarmth" if newer else "build the folder anew from its adapters with save_pretrained"
        raise ModelFolderError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; {advice}")
    try:
        return SavedModel(
            base=value["base"],
            adapters={name: path.parent / "adapters" / name for name in value["traits"]},
            router=path.parent / "router" if value["router"] else None,
            policy=policy_from_name(value["policy"]),
            scope=value["scope"],
        )
    except (KeyError, TypeError) as error:
        raise ModelFolderError(f"{path} lacks or garbles {error}; save the model again") from None


def write(model: GatedWarmthModel, folder: Path) -> None:
    """Write a model folder, whole or not at all."""

    def fill(target: Path) -> None:
        for trait in model.traits:
            save_adapter(model.adapter(trait), target / "adapters" / trait)
        if model.router is not None:
            model.router.save(target / "router")
        value = {
            "schema": SCHEMA,
            "base": model.base_name,
            "traits": list(model.traits),
            "router": model.router is not None,
            "policy": model.policy.to_json(),
            "scope": model.scope,
        }
        write_json_atomic(target / FILE, value)
        (target / "README.md").write_text(model_card(model), encoding="utf-8")

    write_folder_atomic(folder, fill)


def push(model: GatedWarmthModel, repo: str, private: bool) -> str:
    """Upload a model folder to the hub."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="gatedwarmth-") as scratch:
        folder = Path(scratch) / "model"
        write(model, folder)
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    return str(address)
