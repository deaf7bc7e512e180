"""Checks of the corpora: everything that a reader could hold against them and a program can find."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gatedwarmth.data import CONTEXT_GROUPS, INTENTIONS, LABELS, Question
from gatedwarmth.data.corpus import Corpora, Entry, Problem, Report, read_corpora, short
from gatedwarmth.data.overlap import RUN, near_duplicates, shared_runs, words
from gatedwarmth.data.public import PUBLIC_SETS, missing_sets, public_texts, strings
from gatedwarmth.data.replies import frames, ratios, reply_problems

PAIR_COUNTS = {"social": 200, "reasoning": 200, "mixed": 80}
TURN_COUNT, HARD_COUNT = 14256, 7212
QUESTION_COUNTS = {
    "general": 120,
    "misconception": 80,
    "medicine": 80,
    "disinformation": 60,
    "arithmetic": 60,
}
CONTEXTS_PER_GROUP, SCENES_PER_INTENTION, CONVERSATION_COUNT = 5, 5, 60
LARGEST_IMBALANCE = 0.02  # of the share of a label, around one half
LARGEST_JACCARD = 0.6

# Emoji and pictographs: the emoji blocks, dingbats and weather signs, regional letters, and what joins them.
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50\u2b55\u231a\u231b\u23e9-\u23fa\ufe0f\u200d\u20e3]")


def check(folder: str | Path | None = None, data_dir: str | Path | None = None, counts: bool | None = None) -> Report:
    """Check the corpora of `folder` (default: the packaged ones).

    Parameters
    ----------
    data_dir: local copy of the public sets; without it the overlap with them is not looked at.
    counts: demand the sizes of the packaged corpora. By default only of the packaged ones.

    Raises
    ------
    DataError: `folder` holds no corpus, or `data_dir` no public set.
    """
    corpora = read_corpora(folder)
    texts = list(_texts(corpora))
    problems = [*corpora.problems, *_byte_problems(corpora), *_emoji(corpora), *_aliases(corpora)]
    problems += [problem for pair in corpora.pairs for problem in reply_problems(pair)]
    measured: dict[str, str] = {}
    demand = folder is None if counts is None else counts
    for part in (
        _sizes(corpora, demand),
        _duplicates(texts),
        _public_overlap(texts, data_dir),
        ratios(corpora.pairs),
        *frames(corpora.pairs),
    ):
        problems += part.problems
        measured |= part.measured
    return Report(sorted(set(problems)), measured)


@dataclass(frozen=True)
class _Text:
    """One stretch of text of an item, and what it is in that item."""

    entry: Entry
    part: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.part} of {self.entry.item.id} ({self.entry.item.split})"


def _texts(corpora: Corpora) -> Iterator[_Text]:
    """The texts that must neither repeat each other nor stand anywhere else."""
    for pair in corpora.pairs:
        said = [message["content"] for message in pair.item.messages if message["role"] == "user"]
        yield _Text(pair, "user's words", "\n".join(said))
        for style, reply in pair.item.replies.items():
            yield _Text(pair, f"{style} reply", reply)
    for turn in corpora.turns:
        # With its context: "yes please" may follow two different things, and then asks for two different replies.
        yield _Text(turn, "turn", "\n".join(message["content"] for message in turn.item.messages))
    for question in corpora.questions:
        yield _Text(question, "question", question.item.question)
        yield _Text(question, "explanation", question.item.explanation)
    for context in corpora.contexts:
        yield _Text(context, "statement", context.item.text)
    for scene in corpora.scenes:
        yield _Text(scene, "event", scene.item.event)
        yield _Text(scene, "theme", scene.item.theme)
        yield _Text(scene, "first line", scene.item.first_line)
    for conversation in corpora.conversations:
        for turn_text in conversation.item.turns:
            yield _Text(conversation, "turn", turn_text)
        yield _Text(conversation, "question", conversation.item.question.question)
        yield _Text(conversation, "explanation", conversation.item.question.explanation)


def _entries(corpora: Corpora) -> Iterator[Entry]:
    yield from corpora.pairs
    yield from corpora.turns
    yield from corpora.questions
    yield from corpora.contexts
    yield from corpora.scenes
    yield from corpora.conversations


def _byte_problems(corpora: Corpora) -> Iterator[Problem]:
    """Line ends, trailing blanks, marks: what a diff would show and an eye would not."""
    for path in corpora.files:
        raw = path.read_bytes()
        if raw.startswith(b"\xef\xbb\xbf"):
            yield Problem(path, 1, "the file begins with a byte order mark; save it as UTF-8 without one")
        if raw and not raw.endswith(b"\n"):
            yield Problem(path, raw.count(b"\n") + 1, "the last line has no line end; add one")
        for line, ended in enumerate(raw.split(b"\n")[: raw.count(b"\n")], start=1):
            if ended.endswith(b"\r"):
                yield Problem(path, line, "Windows line end; save the file with \\n alone")
            elif not ended.strip():
                yield Problem(path, line, "empty line; delete it")
            elif ended != ended.rstrip():
                yield Problem(path, line, "blanks at the end of the line; delete them")
    for entry in _entries(corpora):
        for text in strings(dataclasses.asdict(entry.item)):
            if text != text.strip():
                yield entry.problem(f"a text begins or ends with blanks: {short(text)!r}; delete them")


def _emoji(corpora: Corpora) -> Iterator[Problem]:
    for entry in _entries(corpora):
        for text in strings(dataclasses.asdict(entry.item)):
            found = _EMOJI.search(text)
            if found:
                yield entry.problem(f"emoji U+{ord(found.group()):04X} in {short(text)!r}; say it in words")


def _aliases(corpora: Corpora) -> Iterator[Problem]:
    """An alias inside the tempting false answer, or in the question, would score a wrong reply as right."""
    asked: list[tuple[Entry, Question]] = [(entry, entry.item) for entry in corpora.questions]
    asked += [(entry, entry.item.question) for entry in corpora.conversations]
    for entry, question in asked:
        if question.kind != "short":
            continue
        for alias in question.answers:
            needle = f" {' '.join(words(alias))} "
            for key, text in (("wrong", question.wrong), ("question", question.question)):
                if needle in f" {' '.join(words(text))} ":
                    what = f"answer {alias!r} is contained in {key!r}, {short(text)!r}; reword one of the two"
                    yield entry.problem(what)


def _sizes(corpora: Corpora, demand: bool) -> Report:
    """Items of each kind, against the sizes that the packaged corpora must have."""
    folder = corpora.folder
    hard = [turn for turn in corpora.turns if turn.item.hard]
    half = {label: 0.5 for label in LABELS}
    problems = [
        *_too_few(folder, "pairs of kind", Counter(e.item.kind for e in corpora.pairs), PAIR_COUNTS),
        *_too_few(folder, "turns", Counter({"": len(corpora.turns)}), {"": TURN_COUNT}),
        *_too_few(folder, "hard turns", Counter({"": len(hard)}), {"": HARD_COUNT}),
        *_unbalanced(folder, "turns", Counter(e.item.label for e in corpora.turns), half),
        *_unbalanced(folder, "hard turns", Counter(e.item.label for e in hard), half),
        *_too_few(folder, "questions of", Counter(e.item.domain for e in corpora.questions), QUESTION_COUNTS),
        *_too_few(
            folder,
            "contexts of group",
            Counter(e.item.group for e in corpora.contexts),
            {group: CONTEXTS_PER_GROUP for group in CONTEXT_GROUPS},
        ),
        *_too_few(
            folder,
            "scenes of intention",
            Counter(e.item.intention for e in corpora.scenes),
            {intention: SCENES_PER_INTENTION for intention in INTENTIONS},
        ),
        *_too_few(folder, "conversations", Counter({"": len(corpora.conversations)}), {"": CONVERSATION_COUNT}),
    ]
    sizes = {
        "pairs": len(corpora.pairs),
        "turns": len(corpora.turns),
        "hard turns": len(hard),
        "questions": len(corpora.questions),
        "contexts": len(corpora.contexts),
        "scenes": len(corpora.scenes),
        "conversations": len(corpora.conversations),
    }
    return Report(problems if demand else [], {"items": ", ".join(f"{n} {name}" for name, n in sizes.items())})


def _too_few(folder: Path, name: str, found: Mapping[str, int], needed: Mapping[str, int]) -> Iterator[Problem]:
    for key, least in needed.items():
        if found.get(key, 0) < least:
            what = f"{name} {key}".strip()
            yield Problem(folder, 0, f"{found.get(key, 0)} {what}, at least {least} are needed; write the rest")


def _unbalanced(folder: Path, name: str, found: Counter[str], wanted: Mapping[str, float]) -> Iterator[Problem]:
    for key, share in wanted.items():
        actual = found[key] / found.total() if found.total() else share
        if abs(actual - share) > LARGEST_IMBALANCE:
            what = f"{actual:.1%} of the {name} are {key}, {share:.0%} ± {LARGEST_IMBALANCE:.0%} are needed"
            yield Problem(folder, 0, f"{what}; write more of the rarer label")


def _duplicates(texts: list[_Text]) -> Report:
    """Near-copies among texts of different items, within a split, across splits and across files."""
    problems = []
    for (i, j), value in near_duplicates([t.text for t in texts], LARGEST_JACCARD).items():
        first, second = texts[i], texts[j]
        if first.entry is second.entry:  # the replies to one message say the same things
            continue
        problems.append(
            second.entry.problem(
                f"near-duplicate, Jaccard {value:.2f}: {second.name}, {short(second.text)!r}, and {first.name} "
                f"at {first.entry.place}, {short(first.text)!r}; write one of them anew"
            )
        )
    measured = f"{len(problems)} above Jaccard {LARGEST_JACCARD} among {len(texts)} texts (limit 0)"
    return Report(problems, {"near-duplicates": measured})


def _public_overlap(texts: list[_Text], data_dir: str | Path | None) -> Report:
    """Runs of words that also stand in a public set."""
    if data_dir is None:
        return Report([], {"public sets": "not looked at; give --data-dir"})
    public = public_texts(data_dir)
    found = shared_runs([t.text for t in texts], (p.text for p in public))
    problems = [
        texts[i].entry.problem(f"{texts[i].name} shares {run!r} with {public[k].source}; write it anew in other words")
        for i, (k, run) in found.items()
    ]
    missing = missing_sets(data_dir)
    sets = f"{len(PUBLIC_SETS) - len(missing)} sets" + (f", without {', '.join(missing)}" if missing else "")
    return Report(
        problems,
        {"public sets": f"{len(problems)} texts share {RUN} words with one of {len(public)} texts of {sets} (limit 0)"},
    )
