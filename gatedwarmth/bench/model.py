"""`bench model`: prefill and decoding of the gated model, its base and PEFT's mixtures, interleaved in one process."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedwarmth import bases
from gatedwarmth.bench.rows import Row, dtype_of, row_of
from gatedwarmth.bench.subjects import BASE, SUBJECTS, Subject, Workshop
from gatedwarmth.errors import GatedWarmthError
from gatedwarmth.kernels.bench import Clock, Contender, Measured, clock_for, measure
from gatedwarmth.kernels.bench.measure import describe_error
from gatedwarmth.kernels.bench.memory import live_bytes, peak_bytes

NAME = "model"


@dataclass(frozen=True)
class ModelSettings:
    """What is run.

    rank: of each of the two random adapters, which sit on every linear layer. prefill: (rows, tokens).
    decode: batch sizes; `steps` decode steps over a warm cache of `context` tokens are timed, and divided by `steps`.
    contenders: names of SUBJECTS; the base is always among them. autocast: PEFT's own default for a bfloat16 base.
    """

    base: str = bases.DEFAULT
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    runs: int = 9
    warmup: int = 2
    rank: int = 8
    prefill: tuple[int, int] = (8, 256)
    decode: tuple[int, ...] = (1, 8)
    context: int = 64
    steps: int = 8
    contenders: tuple[str, ...] = tuple(SUBJECTS)
    autocast: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.contenders if name not in SUBJECTS]
        if unknown:
            raise GatedWarmthError(f"unknown contender {unknown[0]!r}; they are {'; '.join(SUBJECTS)}")


@dataclass(frozen=True)
class Case:
    """A name, and how a subject becomes a contender in it."""

    name: str
    contender: Callable[[str, Subject], Contender]


def run_model(settings: ModelSettings) -> Iterator[Row]:
    """Rows of every dtype, case by case."""
    for dtype in settings.dtypes:
        yield from measure_model(bases.load(settings.base, dtype_of(dtype), settings.device), settings, dtype)
        gc.collect()


# no_grad for all, as transformers' generate does
@torch.no_grad()
def measure_model(base: bases.Base, settings: ModelSettings, dtype: str, clock: Clock | None = None) -> Iterator[Row]:
    """Rows of a base that is loaded already; its weights are left as they are."""
    cases = cases_of(settings, base.model)
    clock = clock or clock_for(settings.device)
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop.open(base, Path(folder), settings.rank, settings.autocast)
        built = _Built(workshop, settings, cases)
        for case in cases:
            contenders = [case.contender(name, subject) for name, subject in built.subjects.items()]
            measured = measure(case.name, contenders, BASE, settings.runs, clock, settings.warmup)
            for row in _with_memory(measured, contenders, built, settings.device):
                yield row_of(NAME, row, base.name, dtype, settings.device)
            for name, error in built.errors.items():
                failed = Measured(case.name, name, baseline=BASE, error=error)
                yield row_of(NAME, failed, base.name, dtype, settings.device)


class _Built:
    """The subjects, what each holds on top of the base's weights, and why some could not be made."""

    def __init__(self, workshop: Workshop, settings: ModelSettings, cases: list[Case]) -> None:
        self.subjects: dict[str, Subject] = {}
        self.held: dict[str, int] = {}
        self.errors: dict[str, str] = {}
        weights = weight_bytes(workshop.base.model)
        by_module: dict[int, int] = {}
        for name in dict.fromkeys((BASE, *settings.contenders)):
            before = live_bytes(settings.device)
            try:
                subject = SUBJECTS[name](workshop)
                for case in (cases[0], cases[-1]):  # prefill and decoding may each make something at first use
                    _use(case.contender(name, subject))
            except Exception as error:  # other people's code: what it raises belongs in the table
                self.errors[name] = describe_error(error)
                continue
            grown = live_bytes(settings.device) - before
            by_module.setdefault(id(subject.module), grown if name == BASE else grown - weights)
            self.subjects[name], self.held[name] = subject, by_module[id(subject.module)]


def _use(contender: Contender) -> None:
    """Run once."""
    contender.prepare()
    contender.run()


def _with_memory(
    measured: list[Measured], contenders: list[Contender], built: _Built, device: str
) -> Iterator[Measured]:
    peaks: dict[str, int] = {}
    for row, contender in zip(measured, contenders, strict=True):
        if not row.error:
            contender.prepare()
            peaks[contender.name] = peak_bytes(contender.run, device)
    for row in measured:
        held = built.held[row.contender]
        peak = peaks[row.contender] - peaks[BASE] if row.contender in peaks and BASE in peaks else None
        yield dataclasses.replace(row, held=held, peak=peak)


def cases_of(settings: ModelSettings, model: nn.Module) -> list[Case]:
    """Prefill first, then decoding at every batch size; all subjects get the same random tokens."""
    rows, tokens = settings.prefill
    cases = [prefill_case(random_ids(model, rows, tokens))]
    for batch in settings.decode:
        ids = random_ids(model, batch, settings.context + settings.steps)
        cases.append(decode_case(ids, settings.context))
    return cases


def prefill_case(ids: Tensor) -> Case:
    """One pass over ids [batch, tokens] that keeps the cache and the logits of the last column."""

    def contender(name: str, subject: Subject) -> Contender:
        arguments = subject.arguments(ids.shape[0])

        def run() -> Any:
            with subject.session(*ids.shape):
                return subject.module(input_ids=ids, use_cache=subject.cached, logits_to_keep=1, **arguments)

        return Contender(name, run, note=subject.note)

    return Case(f"prefill {ids.shape[0]}×{ids.shape[1]}", contender)


def decode_case(ids: Tensor, context: int) -> Case:
    """Steps of one token a row, from column `context` on."""

    def contender(name: str, subject: Subject) -> Contender:
        decoding = Decoding(subject, ids, context)
        return Contender(name, decoding.run, decoding.prepare, ids.shape[1] - context, subject.note)

    return Case(f"decode, batch {ids.shape[0]}, after {context} tokens", contender)


class Decoding:
    """Steps over a warm cache, which `prepare` sets back to where it was."""

    def __init__(self, subject: Subject, ids: Tensor, context: int) -> None:
        self.subject, self.ids, self.context = subject, ids, context
        self.arguments = subject.arguments(ids.shape[0])
        self.cache: Any = None

    def prepare(self) -> None:
        if not self.subject.cached:
            return
        if self.cache is None:
            head = self.ids[:, : self.context]
            self.cache = self.subject.module(input_ids=head, use_cache=True, logits_to_keep=1, **self.arguments).cache
        grown = self.cache.get_seq_length() - self.context
        if grown:
            self.cache.crop(-grown)

    def run(self) -> None:
        with self.subject.session(self.ids.shape[0], self.context):
            self._steps()

    def _steps(self) -> None:
        for column in range(self.context, self.ids.shape[1]):
            if self.subject.cached:
                token = self.ids[:, column : column + 1]
                self.subject.module(input_ids=token, cache=self.cache, use_cache=True, **self.arguments)
            else:
                seen = self.ids[:, : column + 1]
                self.subject.module(input_ids=seen, use_cache=False, logits_to_keep=1, **self.arguments)


def random_ids(model: nn.Module, rows: int, tokens: int, seed: int = 0) -> Tensor:
    """int64 [rows, tokens] of the model's vocabulary, the same every time, on the model's device."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(next(model.parameters()).device)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())
