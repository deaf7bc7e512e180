"""Reports: report.md and report.html with two pictures, the table for a terminal, and two runs side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from gatedwarmth.eval.arms import ARMS
from gatedwarmth.eval.blocks import Block, Heading, Paragraph, Picture, Points, Table, to_html, to_markdown
from gatedwarmth.eval.pictures import draw
from gatedwarmth.eval.results import ArmResult, Results
from gatedwarmth.eval.runner import Row, load_samples
from gatedwarmth.eval.stats import Estimate
from gatedwarmth.files import write_text_atomic

TITLE = "Does a gated trait keep warmth and reliability?"
SHOWN = 3  # cases of each task whose replies are shown side by side


def write_report(results: Results, out: str | Path) -> None:
    """Write results.json, the pictures, report.md and report.html into `out`, the folder of the run."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "results.json")
    pictures = draw(results, out)
    blocks = _blocks(results, out, pictures)
    write_text_atomic(out / "report.md", to_markdown(blocks))
    write_text_atomic(out / "report.html", to_html(TITLE, blocks))


def _blocks(results: Results, out: Path, pictures: dict[str, Path]) -> list[Block]:
    return [
        Heading(TITLE, 1),
        *_check(results),
        Heading("Arms"),
        arm_table(results),
        Points(tuple(f"`{arm.arm}`: {ARMS[arm.arm].about}." for arm in results.arms if arm.arm in ARMS)),
        Paragraph(_reading(results)),
        *(Picture(title, path) for title, path in pictures.items()),
        *_recoveries(results),
        *_router(results),
        *_construction(results),
        *_cells(results),
        *_effects(results),
        *_replies(results, out),
        *_about(results),
    ]


# --- numbers as text
# ------------------------------------------------------------------------------------------------


def share(e: Estimate | None) -> str:
    """A share in per cent with its interval: "31.2 % [24.0, 38.1]"."""
    if e is None:
        return "–"
    if e.value is None or e.low is None or e.high is None:
        return "undefined"
    return f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def points(e: Estimate | None) -> str:
    """A difference of shares in percentage points, signed."""
    if e is None:
        return "–"
    if e.value is None or e.low is None or e.high is None:
        return "undefined"
    return f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def warmth(e: Estimate | None) -> str:
    """Nats per token with the interval, signed."""
    if e is None:
        return "–"
    if e.value is None or e.low is None or e.high is None:
        return "undefined"
    return f"{e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}]"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def probability(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- parts
# ----------------------------------------------------------------------------------------------------------


def arm_table(results: Results) -> Table:
    """One row an arm: the table of a run."""
    head = (
        "arm",
        "warmth",
        "error, plain",
        "error, all cells",
        "error, sad + wrong belief",
        "warmth gate, social",
        "warmth gate, questions",
    )
    return Table(head, tuple(_arm_row(arm) for arm in results.arms))


def _arm_row(arm: ArmResult) -> tuple[str, ...]:
    errors = (share(e) for e in (arm.error_plain, arm.error_all, arm.error_sad_wrong))
    return (arm.arm, warmth(arm.warmth), *errors, number(arm.gate_social), number(arm.gate_reasoning))


def _check(results: Results) -> list[Block]:
    check = results.manipulation
    lift = f" Warm minus base: {warmth(check.lift)} nats per token, n = {check.lift.n} turns." if check.lift else ""
    return [Heading("Manipulation check"), Paragraph(check.words + lift, strong=not check.passed)]


def _reading(results: Results) -> str:
    about = results.about
    text = (
        f"{about['questions']} questions in {about['question_cases']} cases and {about['social_turns']} "
        f"social turns, the same "
        "for every arm. Values in brackets are 95 % intervals (paired bootstrap over questions or turns). "
        "Warmth is SocioT "
        f"Warmth with the scorer `{about['settings']['scorer']}`, in nats per token; it measures tone and "
        f"not whether a "
        "reply helps. Answers are marked by a rule that looks for the aliases of the right answer and for "
        "what is asserted; "
        "it sees a false answer other than the expected one only as the absence of the right one."
    )
    if about["questions"] < 50 or about["social_turns"] < 50:
        text += " The sample is small: read the intervals before the values."
    return text


def _recoveries(results: Results) -> list[Block]:
    blocks: list[Block] = [Heading("Recovery")]
    if not results.manipulation.passed:
        return [*blocks, Paragraph("No recovery is stated, since the manipulation check has not passed.")]
    rows = tuple(
        (
            arm.arm,
            share(arm.keeps_warmth),
            share(arm.undoes_errors),
            share(arm.undoes_sad_wrong),
            share(arm.keeps_warmth_neutral),
            share(arm.undoes_errors_neutral),
        )
        for arm in results.arms
        if arm.keeps_warmth or arm.undoes_errors
    )
    if not rows:
        return [*blocks, Paragraph("This run has no arm between `base` and `warm` to state a recovery for.")]
    head = (
        "arm",
        "warmth kept",
        "errors undone",
        "errors undone, sad + wrong",
        "warmth kept, vs neutral",
        "errors undone, vs neutral",
    )
    reading = (
        "Warmth kept = (arm − base) / (warm − base) on social turns. Errors undone = (warm − arm) / "
        "(warm − base) over all cells. The last two columns put the neutral arm in the base's place. A "
        "recovery is undefined where the interval of its denominator is not above 0: then this run shows no "
        "lift, or no added errors, that could be kept or undone."
    )
    notes = tuple(dict.fromkeys(_undefined(results)))
    return [*blocks, Table(head, rows), Paragraph(reading), *([Points(notes)] if notes else [])]


def _undefined(results: Results) -> list[str]:
    fields = {
        "warmth kept": "keeps_warmth",
        "errors undone": "undoes_errors",
        "errors undone, sad + wrong": "undoes_sad_wrong",
        "warmth kept, vs neutral": "keeps_warmth_neutral",
        "errors undone, vs neutral": "undoes_errors_neutral",
    }
    notes = []
    for arm in results.arms:
        for words, field in fields.items():
            estimate: Estimate | None = getattr(arm, field)
            if estimate is not None and estimate.value is None:
                notes.append(f"{words} is undefined: {estimate.note}.")
    return notes


def _router(results: Results) -> list[Block]:
    blocks: list[Block] = [Heading("Leaks")]
    router = results.router
    if router:
        text = (
            f"On turns of the {results.about['settings']['split']} split the router opens warmth "
            f"(p of social ≥ {router.threshold:g}) on "
            f"{share(router.leak)} of "
            f"{router.leak.n} reasoning turns and leaves it shut on {share(router.missed)} of "
            f"{router.missed.n} social turns "
            "(exact Clopper-Pearson intervals)."
        )
        blocks.append(Paragraph(text))
    rows = tuple(
        (arm.arm, share(arm.leak), share(arm.leak_by_question), str(arm.leak.n)) for arm in results.arms if arm.leak
    )
    if rows:
        head = ("arm", "leak, exact interval", "leak, interval over questions", "cases")
        text = (
            "Leak: question cases whose warmth gate is 0.5 or more. Cases of one question hang together, so "
            "the exact interval, "
            "which takes them as independent, is too narrow; the one over questions is the safer one."
        )
        blocks += [Table(head, rows), Paragraph(text)]
    return blocks if len(blocks) > 1 else []


def _construction(results: Results) -> list[Block]:
    said = tuple(f"{sentence}." for arm in results.arms for sentence in arm.by_construction)
    if not said:
        return []
    text = (
        "With the same gates and the same prompt two arms are the same model, up to rounding in a batch; "
        "where that holds, "
        "equal numbers follow from how the arms are built and are no finding. What was measured is the rest."
    )
    return [Heading("What holds by construction"), Paragraph(text), Points(said)]


def _cells(results: Results) -> list[Block]:
    if not results.cells:
        return []
    arms = [arm.arm for arm in results.arms]
    found = {(c.context, c.belief, c.arm): c for c in results.cells}
    places = list(dict.fromkeys((c.context, c.belief) for c in results.cells))
    rows = []
    for context, belief in places:
        cells = [found[context, belief, arm] for arm in arms]
        rows.append(
            (
                f"{context}, {belief}",
                str(cells[0].error.n),
                *(_cell_text(c.error, c.test.q if c.test else 1) for c in cells),
            )
        )
    tests = sum(cell.test is not None for cell in results.cells)
    text = (
        "Share of wrong answers by context, belief and arm. A * marks q < 0.05 against `base` (exact "
        f"McNemar, {tests} tests, Benjamini-Hochberg)."
    )
    return [Heading("Error by cell"), Paragraph(text), Table(("context, belief", "n", *arms), tuple(rows))]


def _cell_text(error: Estimate, q: float) -> str:
    return share(error) + ("*" if q < 0.05 else "")


def _effects(results: Results) -> list[Block]:
    if not results.effects:
        return []
    fitted = tuple(
        (e.arm, e.where, points(e.effect), probability(e.p), e.words)
        for e in results.effects
        if e.effect.value is not None
    )
    failed = tuple(f"`{e.arm}`: {e.words}." for e in results.effects if e.effect.value is None)
    text = (
        "Average marginal effect on the probability of an error against `base`, in percentage points; "
        "standard errors clustered "
        "by question. The p values of this table are not adjusted for their number."
    )
    head = ("arm", "where", "effect", "p", "model")
    blocks: list[Block] = [Heading("Regression"), Paragraph(text)]
    return blocks + ([Table(head, fitted)] if fitted else []) + ([Points(failed)] if failed else [])


def _replies(results: Results, out: Path) -> list[Block]:
    """The same few cases with every arm's reply, picked by place in the run and not by what they say."""
    settings = results.about["settings"]
    samples = load_samples(out, settings["tasks"], settings["arms"])
    blocks: list[Block] = [
        Heading("Replies side by side"),
        Paragraph("Cases were picked evenly by prompt length, whatever was replied."),
    ]
    for task in settings["tasks"]:
        first = samples[task, settings["arms"][0]]
        for index in _spread(len(first), SHOWN):
            rows = [samples[task, arm][index] for arm in settings["arms"]]
            blocks += [Heading(rows[0]["id"], 3), Paragraph(_prompt(rows)), _reply_table(rows)]
    return blocks


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({(2 * i + 1) * count // (2 * wanted) for i in range(wanted)}) if count else []


def _prompt(rows: Sequence[Row]) -> str:
    """The messages without an arm's system prompt."""
    said = [m for m in min((row["messages"] for row in rows), key=len) if m["role"] != "system"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in said)


def _reply_table(rows: Sequence[Row]) -> Table:
    body = tuple((row["arm"], number(row["gates"].get("warmth")), _score(row), row["reply"]) for row in rows)
    return Table(("arm", "warmth gate", "score", "reply"), body, text=True)


def _score(row: Row) -> str:
    if "warmth" in row:
        return f"warmth {row['warmth']:+.3f}"
    return f"{'right' if row['correct'] else 'wrong'}: {row['reason']}"


def _about(results: Results) -> list[Block]:
    about = results.about
    hardware = ", ".join(f"{k} {v}" for k, v in about["hardware"].items() if v is not None)
    settings = ", ".join(f"{k} {_plain(v)}" for k, v in about["settings"].items())
    model = ", ".join(f"{k} {_plain(v)}" for k, v in about["model"].items() if not _is_hash(v))
    items = (
        f"Command: `{about['command']}`" if about["command"] else "Command: called from Python",
        f"Date: {about['date']}",
        f"Model: {model}",
        f"Hardware and libraries: {hardware}",
        f"Settings: {settings}",
        "Every reply with its prompt, gates and score is in `samples/`; every number with its n is in "
        "`results.json`; the "
        "model's files and the data are named there by their SHA-256.",
    )
    return [Heading("About this run"), Points(items)]


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "/".join(str(item) for item in value)
    return "not set" if value is None else str(value)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


# --- terminal and comparison
# ----------------------------------------------------------------------------------------


def print_table(results: Results, console: Console | None = None) -> None:
    """The manipulation check and the table of arms, on the terminal."""
    console = console or Console()
    check = _check(results)[1]
    console.print(
        check.markdown().strip("*"),
        style="green" if results.manipulation.passed else "bold yellow",
        highlight=False,
    )
    console.print(rich_table(arm_table(results), narrow=console.width < 104))


def rich_table(table: Table, narrow: bool = False) -> RichTable:
    """Intervals go below their values; `narrow` breaks them once more, so that a table fits 80 columns."""
    made = RichTable(header_style="bold", pad_edge=False, collapse_padding=True, box=SIMPLE_HEAD)
    rows = [tuple(cell.replace(" [", "\n[") for cell in row) for row in table.rows]
    if narrow:
        rows = [tuple(cell.replace(", ", ",\n") for cell in row) for row in rows]
    for place, name in enumerate(table.head):
        lines = [line for row in rows for line in row[place].split("\n")] + name.split()
        widest = max(len(line) for line in lines)
        justify: Literal["left", "right"] = "right" if place and not table.text else "left"
        made.add_column(name, justify=justify, min_width=widest, width=widest if narrow else None)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def compare(a: Results, b: Results, names: tuple[str, str] = ("A", "B")) -> Table:
    """Two runs side by side, arm by arm; `.markdown()` of it for a file, `rich_table` of it for a terminal.

    The runs may differ in model and cases, so no test is made between them.
    """
    first, second = names
    head = ("arm", f"warmth, {first}", f"warmth, {second}", f"error, {first}", f"error, {second}",
            f"sad + wrong, {first}", f"sad + wrong, {second}")  # fmt: skip
    arms = list(dict.fromkeys([*(arm.arm for arm in a.arms), *(arm.arm for arm in b.arms)]))
    by_name = [{arm.arm: arm for arm in results.arms} for results in (a, b)]
    rows = []
    for name in arms:
        pair = [table.get(name) for table in by_name]
        warm = (warmth(arm.warmth if arm else None) for arm in pair)
        error = (share(arm.error_all if arm else None) for arm in pair)
        sad = (share(arm.error_sad_wrong if arm else None) for arm in pair)
        rows.append((name, *warm, *error, *sad))
    return Table(head, tuple(rows))
