"""Train one trait's adapter on pairs, in the scope that it will serve in, with a loss on reply tokens only.

    gatedwarmth train adapter --style warm --out runs/warmth

The result is a plain PEFT folder. A killed run goes on from its last checkpoint when the same command is given again;
a finished one is not trained again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from gatedwarmth import GatedWarmthModel, bases
from gatedwarmth.adapters import save_adapter
from gatedwarmth.data import Pair
from gatedwarmth.errors import TrainingError
from gatedwarmth.files import write_json_atomic
from gatedwarmth.gates import Scope
from gatedwarmth.hardware import faster_dtype
from gatedwarmth.injection import fresh_adapter
from gatedwarmth.templates import prompt_of, render

log = logging.getLogger("gatedwarmth")
IGNORE = -100  # the label that transformers' losses leave out
REPORT = "training.json"


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter is trained.

    style: which reply of each pair is the target. rank, alpha: of the LoRA; its scaling is alpha / rank.
    lr: AdamW, linear warm-up over 5 % of the steps, cosine decay. epochs: passes over the pairs.
    max_steps: stop earlier; 0 for no limit. max_length: longer examples lose the start of their conversation.
    save_steps: optimiser steps between checkpoints. targets: names of linear layers, empty for all.
    """

    style: str
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    lr: float = 5e-4
    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 8
    max_length: int = 512
    scope: Scope = "response"
    targets: tuple[str, ...] = ()
    seed: int = 0
    save_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "lr", "epochs", "batch_size", "max_length", "save_steps"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class Example:
    """Token ids, labels (IGNORE outside the reply), prompt length and first gated token of one conversation."""

    ids: list[int]
    labels: list[int]
    prompt: int
    gate_start: int


class Examples(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def check_styles(pairs: Sequence[Pair], style: str) -> None:
    """Raise TrainingError where a pair has no reply in this style."""
    for pair in pairs:
        if style not in pair.replies:
            raise TrainingError(f"pair {pair.id} has no reply in style {style!r}, only {sorted(pair.replies)}")


def example_of(tokenizer: PreTrainedTokenizerBase, pair: Pair, settings: AdapterSettings) -> Example:
    """Render one pair as the base will see it at serving time, the reply and its end marker as target."""
    check_styles([pair], settings.style)
    prompt = prompt_of(tokenizer, pair.messages)
    answered = [*pair.messages, {"role": "assistant", "content": pair.replies[settings.style]}]
    whole = render(tokenizer, answered, header=False)  # type: ignore[arg-type]
    if whole[: len(prompt.ids)] != prompt.ids:
        whole = prompt.ids + tokenizer.encode(pair.replies[settings.style], add_special_tokens=False)
        whole.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    cut = max(0, len(whole) - settings.max_length)
    labels = [IGNORE] * len(prompt.ids) + whole[len(prompt.ids) :]
    start = prompt.response_start if settings.scope == "response" else prompt.turn_start
    return Example(whole[cut:], labels[cut:], max(1, len(prompt.ids) - cut), max(0, start - cut))


@dataclass(frozen=True)
class Collator:
    """Examples → a batch whose replies begin in one column: prompts padded on the left, replies on the right.

    input_ids, attention_mask, position_ids, labels int64 [batch, columns]; gates float32 [batch, columns, 1];
    split: the first column in which any row is gated.
    """

    pad: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        prompt = max(example.prompt for example in examples)
        reply = max(len(example.ids) - example.prompt for example in examples)
        shape = (len(examples), prompt + reply)
        ids, mask = torch.full(shape, self.pad), torch.zeros(shape, dtype=torch.long)
        labels, gates = torch.full(shape, IGNORE), torch.zeros(*shape, 1)
        for row, example in enumerate(examples):
            first = prompt - example.prompt
            last = first + len(example.ids)
            ids[row, first:last], mask[row, first:last] = torch.tensor(example.ids), 1
            labels[row, first:last] = torch.tensor(example.labels)
            gates[row, first + example.gate_start : last] = 1.0
        split = min(prompt - e.prompt + e.gate_start for e in examples)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        return {**batch, "gates": gates, "split": split}


class LengthBatches(Sampler[int]):
    """Batches of like length in an order that depends on seed and epoch alone, so that a resumed run sees the same."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class AdapterTrainer(Trainer):
    """transformers' Trainer on a gated model: prompts without gradients, batches of like length, small checkpoints."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss on the replies. The columns before the first gated one are the bare base's, which no gradient can
        reach: they run without one and leave their keys and values, which saves a third of a step.
        """
        split = inputs["split"]
        if not split:
            output = model(**{key: value for key, value in inputs.items() if key != "split"})
            return (output.loss, output) if return_outputs else output.loss
        head = {key: inputs[key][:, :split] for key in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            cache = model(**head, use_cache=True, logits_to_keep=1).cache
        tail = {key: inputs[key][:, split:] for key in ("input_ids", "position_ids", "labels", "gates")}
        output = model(**tail, attention_mask=inputs["attention_mask"], cache=cache, use_cache=True)
        return (output.loss, output) if return_outputs else output.loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(example.ids) for example in self.train_dataset.examples]  # type: ignore[union-attr]
        return LengthBatches(lengths, self.args.train_batch_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable(self.model), folder / "adapter.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / "adapter.safetensors")
        with torch.no_grad():
            for name, parameter in (model or self.model).named_parameters():
                if name in saved:
                    parameter.copy_(saved[name])


def train_adapter(
    base: bases.Base,
    pairs: Sequence[Pair],
    out: str | Path,
    settings: AdapterSettings,
    dev: Sequence[Pair] = (),
) -> dict[str, Any]:
    """Train an adapter and write it to `out` as a PEFT folder with a report, training.json.

    base: float32 weights train best (bfloat16 autocast does the speed); unchanged afterwards.
    dev: pairs whose loss is reported before and after.

    Raises
    ------
    TrainingError: no pairs, a missing style, a loss that is not finite.
    """
    out = Path(out)
    if not pairs:
        raise TrainingError("there is no pair to train on; check the pairs file and its split")
    identity = {
        **dataclasses.asdict(settings),
        "base": base.name,
        "data": target_hash(pairs, settings.style),
        "dev": target_hash(dev, settings.style),
    }
    identity["targets"] = list(settings.targets)
    done = finished(out, identity)
    if done:
        log.info("%s is finished already with these settings; not trained again", out)
        return done
    examples = [example_of(base.tokenizer, pair, settings) for pair in pairs]
    held_out = [example_of(base.tokenizer, pair, settings) for pair in dev]
    adapter = fresh_adapter(base.model, settings.rank, settings.alpha, settings.targets, settings.seed)
    config = {**adapter.config, "base_model_name_or_path": base.name, "lora_dropout": settings.dropout}
    model = GatedWarmthModel(base, {"trait": dataclasses.replace(adapter, config=config)}, scope=settings.scope)
    try:
        report = _run(model, Examples(examples), Examples(held_out), out, settings, identity)
        save_adapter(model.adapter("trait"), out)
        write_json_atomic(out / REPORT, report)
    finally:
        model.unwrap()
    shutil.rmtree(checkpoints(out), ignore_errors=True)
    return report


def _run(
    model: GatedWarmthModel,
    train: Examples,
    dev: Examples,
    out: Path,
    settings: AdapterSettings,
    identity: dict[str, Any],
) -> dict[str, Any]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.injection.layers.values():
        layer.a.requires_grad_(True)
        layer.b.requires_grad_(True)
        layer.dropout = settings.dropout
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(out, settings, model.device.type),
        train_dataset=train,
        data_collator=Collator(int(model.tokenizer.pad_token_id or 0)),
    )
    before = _loss(trainer, dev)
    trainer.train(resume_from_checkpoint=_resume_point(out, identity))
    after = _loss(trainer, dev)
    if not all(torch.isfinite(v).all() for v in trainable(model).values()):
        raise TrainingError(f"training diverged at lr {settings.lr}: the adapter holds NaN; lower lr")
    model.eval()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **identity,
        "pairs": len(train),
        "steps": trainer.state.global_step,
        "loss": [[entry["step"], round(entry["loss"], 4)] for entry in history],
        "dev_pairs": len(dev),
        "dev_loss_before": before,
        "dev_loss_after": after,
    }


def _arguments(out: Path, settings: AdapterSettings, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints(out)),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        bf16=faster_dtype(device) is torch.bfloat16,
        use_cpu=device == "cpu",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=5,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed,
        dataloader_pin_memory=False,
        disable_tqdm=False,
    )


def _loss(trainer: AdapterTrainer, dev: Examples) -> float | None:
    if not len(dev):
        return None
    metrics = trainer.evaluate(dev)  # type: ignore[arg-type]
    return round(float(metrics["eval_loss"]), 4)


def _resume_point(out: Path, identity: dict[str, Any]) -> str | None:
    """The last whole checkpoint of a run with these very settings; anything else is cleared away."""
    folder = checkpoints(out)
    stamp = folder / "run.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == json.loads(json.dumps(identity)):
        # trainer_state.json is what the Trainer writes last: a checkpoint without it was cut short by a kill
        whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        if whole:
            last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
            log.info("going on from %s", last)
            return str(last)
    elif any(folder.glob("checkpoint-*")):  # the Trainer makes the folder itself
        log.warning("%s belongs to other settings or data; starting anew", folder)
    shutil.rmtree(folder, ignore_errors=True)
    write_json_atomic(stamp, identity)
    return None


def trainable(model: Any) -> dict[str, Tensor]:
    """Name → trainable parameter, detached."""
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def checkpoints(out: Path) -> Path:
    return out.with_name(f".{out.name}.checkpoints")


def finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run with these very settings and data."""
    path = out / REPORT
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(report.get(key) == value for key, value in json.loads(json.dumps(identity)).items())
    return report if same else None


def target_hash(pairs: Sequence[Pair], style: str) -> str:
    """SHA-256 over what training sees of the pairs: prompts and the replies of one style."""
    digest = hashlib.sha256()
    for pair in pairs:
        seen = [pair.id, pair.messages, pair.replies.get(style)]
        digest.update(json.dumps(seen, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
