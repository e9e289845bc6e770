"""docs/evidence.md, its figures and README's table, from JSON alone: what is not in the files is not on the page."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotrain.evaluation.video import write_bytes
from turbotrain.evidence.claims import CLAIMS, TEACHER, WORDS, Key, Rows, Verdict, difference, judge_claim
from turbotrain.evidence.figures import caption, figures
from turbotrain.evidence.forms import Latencies, read_latencies


@dataclass(frozen=True)
class Group:
    """A section. first: rows of other sections that its table begins with: what the others are measured against is the first.
    order: key by which its own rows are sorted; None: they stand as the matrix has them."""

    title: str
    about: str = ""
    first: tuple[Key, ...] = ()
    order: Callable[[Mapping[str, Any]], tuple[int, float]] | None = None


def _by_training(row: Mapping[str, Any]) -> tuple[int, float]:
    """SLA fine-tuned by rising top-k, sparse attention alone likewise, what differs in something else, what is not fine-tuned.

    By what trained a row's network, not by how the row runs it: rows that are called "the same" stay behind their first.
    """
    topks = [said for said in row["train"] if said.startswith("attention.topk=")]
    beside = tuple(said for said in row["train"] if said not in topks)
    kind = {(): 0, ("sla.linear_branch=false",): 1}.get(beside, 2) if row["train"] else 3
    return kind, float(topks[0].partition("=")[2]) if topks else row["attention"]["topk"]


GROUPS = {
    "teacher": Group(
        "The teacher",
        "In its own sampler (UniPC, guidance: two passes a step), and undistilled in the Turbo sampler.",
        (("teacher", "s50"),),
    ),
    "turbo": Group(
        "Turbo",
        "Everything at once: sparse-linear attention, four steps or fewer, 8 bits.",
        (("teacher", "s50"), ("rcm_staged", "s4")),
    ),
    "distillation": Group(
        "Distillation",
        "Dense attention; all methods make the same number of updates of the student, but for those whose title has another.",
        (("teacher", "s50"),),
    ),
    "sla": Group(
        "Sparse-linear attention",
        "In the teacher's sampler at 20 steps, so that nothing but attention differs. Sparse attention alone is SLA with a "
        "projection of zero: it takes SLA's time.",
        (("teacher", "s20"),),
        _by_training,
    ),
    "composition": Group(
        "Composition",
        "Three ways to bring SLA and rCM together; the first three rows are the sequential one.",
        (("turbo", "s4"), ("turbo", "s2"), ("turbo", "s1")),
    ),
    "quantization": Group(
        "Quantisation", "The Turbo student at 4 steps: in float, then in every scheme.", (("turbo", "s4"),)
    ),
}
COLUMNS = (
    ("accuracy", "accuracy"),
    ("against", "against the first"),
    ("motion", "motion"),
    ("steady", "steady"),
    ("coverage", "coverage"),
    ("spread", "spread, px"),
    ("frechet", "Frechet"),
    ("psnr", "PSNR, dB"),
    ("ssim", "SSIM"),
    ("latent_error", "latent error"),
    ("kept_float", "in float"),
    ("latency_s", "latency"),
)
ATTRIBUTES = ("shape", "colour", "size", "direction", "speed", "background")
HEADLINE = (("teacher", "s50"), ("teacher", "s4"), ("sla010", "s20"), ("rcm_staged", "s4"), ("rcm_staged", "s1"), ("turbo", "s4"),
            ("turbo", "int8_4"), ("turbo", "int8_2"), ("turbo", "int8_1"))  # fmt: skip
TWICE = (("sla010", "s20"), ("sla010_again", "s20"))  # the same settings, two seeds
# Beside the results: what `tools/evidence.py latency` wrote.
LATENCIES = "h200_evidence_latency.json"
README_MARKS = "<!-- evidence -->", "<!-- /evidence -->"


def write_page(results: Path, page: Path) -> list[Path]:
    """Write the page, its figures (beside it, in figures/) and, if the README.md one folder up has `README_MARKS`, the block
    between them; returns the files.

    Raises:
        ValueError: `results` is no file that `run` wrote, or the file of latencies beside it is another.
    """
    try:
        document = json.loads(results.read_text(encoding="utf-8"))
        rows: dict[Key, Mapping[str, Any]] = {(row["cell"], row["row"]): row for row in document["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{results}: not the results of an evidence run ({error!r})") from error
    latencies = read_latencies(results.parent / LATENCIES)
    rows = {key: {**row, "latency_s": latencies.of(row)} for key, row in rows.items()}
    drawn = figures(rows)
    written = []
    for name, svg in drawn.items():
        written.append(write_bytes(page.parent / "figures" / name, svg.encode()))
    text = "\n".join(_page(document, rows, list(drawn), latencies, results))
    written.append(write_bytes(page, (text.rstrip() + "\n").encode()))
    readme = page.parent.parent / "README.md"
    if (block := readme_block(document, rows, latencies)) and readme.is_file():
        before = readme.read_text(encoding="utf-8")
        if (after := between_marks(before, block)) != before:
            written.append(write_bytes(readme, after.encode()))
    return written


def readme_block(document: Mapping[str, Any], rows: Rows, latencies: Latencies) -> str:
    """The headline for README.md; "" where none of its rows has been measured."""
    table = _headline(document, rows, latencies)
    if not table:
        return ""
    prompts, seeds = document["prompts"], document["seeds"]
    facts = [
        f"{len(rows)} of the matrix's {document['planned_rows']} rows are in. Verdicts on {len(CLAIMS)} claims: "
        f"{_tally([judge_claim(claim, rows) for claim in CLAIMS])}.",
        f"{prompts * seeds:,} videos a row ({prompts:,} held-out prompts, {seeds} seeds), 95% intervals over prompts.",
        *_once(rows),
        *_chance(rows),
        "Everything else, with figures and what each published claim comes to: [docs/evidence.md](docs/evidence.md).",
    ]
    return "\n".join([*table, *_about_latency(latencies, "docs/measurements"), *facts])


def _once(rows: Rows) -> list[str]:
    """What no interval holds, and the one measure of it that there is."""
    lines = ["Every row is of one training: what another run of it would give is in no interval."]
    trained, again = rows.get(TWICE[0]), rows.get(TWICE[1])
    if trained and again:
        apart = abs(trained["metrics"]["accuracy"][0] - again["metrics"]["accuracy"][0])
        lines += [f"{trained['title']}, trained a second time with another seed, differs by {apart:.3f} in accuracy."]
    return lines


def _chance(rows: Rows) -> list[str]:
    found = rows.get(TEACHER, {}).get("metrics", {}).get("shuffled")
    return (
        [f"By other prompts' captions the teacher's videos have an accuracy of {found[0]:.3f}: chance."]
        if found
        else []
    )


def _tally(verdicts: Sequence[Verdict | None]) -> str:
    """`holds (2); fails, not significantly (1); waits for rows (8)`: what its interval does not decide is counted apart."""
    counted = Counter("waits for rows" if verdict is None else verdict.word for verdict in verdicts)
    return "; ".join(f"{word} ({counted[word]})" for word in (*WORDS, "waits for rows") if counted[word])


def between_marks(text: str, block: str) -> str:
    """`text` with `block` between its `README_MARKS`; as it is where it has not exactly one such pair."""
    start, end = README_MARKS
    before, first, rest = text.partition(start)
    _, last, after = rest.partition(end)
    if not first or not last or start in after or end in before:
        return text
    return f"{before}{start}\n{block}\n{end}{after}"


def _page(
    document: Mapping[str, Any], rows: Rows, drawn: Sequence[str], latencies: Latencies, results: Path
) -> list[str]:
    environment = document.get("environment", {})
    videos = document["prompts"] * document["seeds"]
    lines = [
        "# Evidence",
        "",
        "What each acceleration costs in quality, measured on a world whose videos code can judge. Written by",
        f"`python tools/evidence.py render docs/measurements/{results.name}` from that file and the latencies beside it: not",
        "edited by hand.",
        "",
        f"{document['prompts']:,} held-out prompts, {document['seeds']} seeds each: {videos:,} videos a row, from the same noise",
        "in every row. Values with 95% intervals over prompts (all seeds of a prompt are resampled together).",
        *_once(rows),
        f"{environment.get('device', 'Unknown device')}, torch {environment.get('torch', '?')}. {len(rows)} of the",
        f"{document['planned_rows']} rows of `configs/evidence/{document['name']}.yaml` are in.",
        *([document["note"]] if "note" in document else []),
        "",
        f"The world and the recipe: [{document['recipe']}](../recipes/{document['recipe']}.md). It is small: what holds here",
        "holds in kind, and says nothing about how Wan's own videos look; those take VBench's protocol (`tools/vbench.py`).",
        "",
        *_headline(document, rows, latencies),
        *_about_latency(latencies, "measurements"),
        *_claims(rows),
    ]
    for name in drawn:
        told = caption(name, rows)
        lines += [f"![{told}](figures/{name})", "", f"*{told}*", ""]
    sections = _sections(rows)
    for group, members in sections:
        first = [rows[key] for key in group.first if key in rows and rows[key] not in members]
        against = rows.get(group.first[0]) if group.first else None
        about = [group.about, ""] if group.about else []
        lines += [f"## {group.title}", "", *about, *_table([*first, *members], against), ""]
    lines += ["## By attribute", "", *_attributes([row for _, members in sections for row in members]), ""]
    return lines + _how(document, rows)


def _sections(rows: Rows) -> list[tuple[Group, list[Mapping[str, Any]]]]:
    """Every group of which there are rows, and these as its table lists them; groups that are not known come last."""
    members: dict[str, list[Mapping[str, Any]]] = {name: [] for name in GROUPS}
    for row in rows.values():
        members.setdefault(row["group"], []).append(row)
    groups = {name: GROUPS.get(name, Group(name)) for name in members}
    return [
        (group, sorted(members[name], key=group.order) if group.order else members[name])
        for name, group in groups.items()
        if members[name]
    ]


def _headline(document: Mapping[str, Any], rows: Rows, latencies: Latencies) -> list[str]:
    shown = [rows[key] for key in HEADLINE if key in rows]
    if not shown:
        return []
    device = latencies.document.get("environment", {}).get("device", "")
    column = f"latency on {device.removeprefix('NVIDIA ')}" if device else "latency"
    lines = [
        f"| method | steps | accuracy [95%] | coverage [95%] | {column} | command |",
        "|---|---|---|---|---|---|",
    ]
    for row in shown:
        values = " | ".join(_value(row, name) for name in ("accuracy", "coverage", "latency_s"))
        lines.append(f"| {row['title']} | {row['steps']} | {values} | `--only {row['cell']}` |")
    return [*lines, "", f"A row is made by `{_command(document)}` with its options.", ""]


def _command(document: Mapping[str, Any]) -> str:
    """What trains cells, with all that they need, and measures their rows."""
    shipped = f"asset:{document['recipe']}"
    # Where the matrix trained none, it started from those that ship.
    given = [f"--{part} {shipped}" for part in ("teacher", "codec") if part not in document.get("base", {})]
    run = f"python tools/evidence.py run configs/evidence/{document['name']}.yaml"
    return " ".join([run, *given])


def _about_latency(latencies: Latencies, folder: str) -> list[str]:
    document = latencies.document
    if not document:
        return []
    settings, device, ratio = document["settings"], document["environment"]["device"], latencies.worst_ratio
    lines = [
        "Latency is arithmetic on measured times: the row's passes (guidance takes two a step) times one pass of",
        f"{settings['variant']} in the row's form (attention, top-k, 8-bit scheme). {document['video']}, one at a time,",
        f"{settings['dtype']}, random weights, {device}; text encoder and VAE are not in it. Blocks are Wan's 128x64 where the",
        "small world has smaller ones.",
        f"[`{LATENCIES}`]({folder}/{LATENCIES}) has the times; a form that was not timed has none.",
    ]
    if ratio is not None:
        lines.append(f"Samplings of 4 steps, timed whole as a check, took {ratio:.2f} of it where they differed most.")
    return [*lines, ""]


def _claims(rows: Rows) -> list[str]:
    verdicts = [verdict for claim in CLAIMS if (verdict := judge_claim(claim, rows)) is not None]
    if not verdicts:
        return []
    lines = [
        "## Claims",
        "",
        "| claim | measured | by [95%] | verdict |",
        "|---|---|---|---|",
    ]
    for one in verdicts:
        against = f"{one.left:.3f} against {one.right:.3f}"
        by = f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
        lines.append(f"| {one.claim.text} | {against} | {by} | {one.word} |")
    open_ones = len(CLAIMS) - len(verdicts)
    lines += [
        "",
        "by: how far the claim is met, its margin or factor counted; below 0 it fails. An interval around 0 decides nothing.",
        "Intervals are paired, prompt by prompt: a bootstrap over the differences (of coverage and spread: of jackknife",
        f"pseudo-values){_unpaired(verdicts)}. Each interval is for its claim alone, and says how two networks differ, not",
        "two methods: each is of one training.",
    ]
    if open_ones:
        lines += [f"{open_ones} more claims wait for rows that have not been run."]
    return [*lines, ""]


def _unpaired(verdicts: Sequence[Verdict]) -> str:
    """What is to be said of claims on rows that have no numbers by prompt."""
    metrics = dict.fromkeys(verdict.claim.metric for verdict in verdicts if not verdict.paired)
    return f"; those of {' and '.join(metrics)} take the two rows as independent here" if metrics else ""


def _table(members: Sequence[Mapping[str, Any]], against: Mapping[str, Any] | None) -> list[str]:
    """against: the row that the others' accuracies are compared with."""
    if against is not None:
        members = [
            {**row, "against": None if row is against else difference(row, against, "accuracy")} for row in members
        ]
    shown = [(name, title) for name, title in COLUMNS if any(_value(row, name) for row in members)]
    lines = [
        f"| method | steps | {' | '.join(title for _, title in shown)} |",
        f"|---|---|{'---|' * len(shown)}",
    ]
    for row in members:
        values = " | ".join(_value(row, name) for name, _ in shown)
        lines.append(f"| {_title(row)} | {row['steps']} | {values} |")
    return lines


def _title(row: Mapping[str, Any]) -> str:
    """With what a row's settings do not say: the top-k of every layer where they were shared out (the uniform one may have come
    of it), and that fine-tuning lowered no error, so that the row is of the untuned weights."""
    topks, tuned = row["attention"].get("layer_topk"), row["facts"].get("finetune")
    shared = f": {', '.join(f'{topk:g}' for topk in topks)}" if topks else ""
    undone = " (no lower error: the untuned weights)" if tuned and not tuned["kept"] else ""
    return f"{row['title']}{shared}{undone}"


def _attributes(members: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"| method | steps | {' | '.join(ATTRIBUTES)} |", f"|---|---|{'---|' * len(ATTRIBUTES)}"]
    for row in members:
        values = " | ".join(_value(row, name) for name in ATTRIBUTES)
        lines.append(f"| {_title(row)} | {row['steps']} | {values} |")
    return lines


def _value(row: Mapping[str, Any], name: str) -> str:
    """`0.951 [0.940, 0.962]`; `0.55 s`; `0.021`; `3 of 40`; empty where it was not measured."""
    facts = row["facts"]
    if name == "against":
        by = row.get(name)
        return "" if by is None else f"{by.value:+.3f} [{by.low:+.3f}, {by.high:+.3f}]"
    if name == "latency_s":
        seconds = row.get(name)
        return "" if seconds is None else f"{seconds:.2f} s"
    if name == "latent_error":
        errors = facts.get("latent_errors")
        return f"{statistics.median(errors):.3f}" if errors else ""
    if name == "kept_float":
        return f"{len(facts[name])} of {len(facts['sqnr_db'])}" if facts.get(name) else ""
    values = row["metrics"].get(name)
    if not values or values[0] is None:
        return ""
    digits = 1 if name in ("psnr", "spread") else 3
    value, low, high = (f"{number:.{digits}f}" if number is not None else "?" for number in values)
    return f"{value} [{low}, {high}]"


def _how(document: Mapping[str, Any], rows: Rows) -> list[str]:
    lines = [
        "## How it was measured",
        "",
        "- accuracy: the share of captioned attributes (shape, colour, size, direction, speed of both objects; background) that",
        "  code reads back from the pixels; motion: objects whose direction and speed are both right.",
        "  About 40 frames of a clip are read, evenly spaced from its first to its last.",
        *(f"  {line}" for line in _chance(rows)),
        "- against the first: accuracy less that of the table's first row, prompt by prompt: what two rows differ by is known",
        "  better than either, since their prompts and noise are the same.",
        "- steady (temporal consistency): the share of those frames in which an object lies within a pixel of its straight",
        "  path and covers its usual area within a fifth.",
        "- coverage: exp(entropy) of the 4 x 4 start cells of objects read right, over 16; captions leave the start free.",
        "  spread: mean distance in pixels between the starts of one object in two seeds of a prompt.",
        "- Frechet: between Gaussians fitted to features of a fixed random convolutional network (seeded, untrained, 128 numbers",
        f"  a clip), against {document['real']:,} rendered clips of other captions. PSNR, SSIM: to the teacher at 50 steps,",
        "  every fourth frame.",
        "- latent error: |8 bits - float| / |float| of the latents after 4 steps, whatever the row's own, the median over",
        "  captions of the training split that calibration did not see; in float: linears that stay so.",
        "- Means and ratios: bootstrap over prompts, 1,000 resamples; coverage: jackknife over prompts; Frechet: over 16 groups",
        "  of prompts.",
        "",
    ]
    training = {**document.get("base", {}), **document.get("training", {})}
    if training:
        lines += ["| trained | seconds |", "|---|---|"]
        lines += [f"| {name} | {facts.get('seconds', 0):.0f} |" for name, facts in training.items()]
        lines += ["", "Seconds of runs that shared a GPU with others."]
    overrides = [*document.get("common", ()), *document.get("overrides", ())]
    if overrides:
        lines += ["", f"Overrides of every training: {', '.join(f'`{item}`' for item in overrides)}."]
    return lines
