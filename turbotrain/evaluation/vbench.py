"""VBench's protocol for who has the weights: its prompt list in, videos named as its scripts look for them out.

The list is `VBench_full_info.json` (entries with `prompt_en` and `dimension`) or plain text with one prompt a line. Videos are
`{prompt}-{index}.mp4`, five a prompt, 25 for prompts of the dimension temporal_flickering. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FLICKERING = "temporal_flickering"
SAMPLES, FLICKERING_SAMPLES = 5, 25
LONGEST_NAME = 255  # bytes of a file's name on common file systems


@dataclass(frozen=True)
class Prompt:
    """One entry. dimensions: what it is judged by; () in a plain list."""

    text: str
    dimensions: tuple[str, ...] = ()

    def samples(self, samples: int = SAMPLES, flickering: int = FLICKERING_SAMPLES) -> int:
        return flickering if FLICKERING in self.dimensions else samples


def read_prompts(path: Path, dimensions: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a list, each text once, in its order; of `dimensions` alone where some are named.

    Raises:
        ValueError: a file that is no such list, dimensions that it does not have, a prompt that cannot be a file's name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"prompts={str(path)!r}: {reason}; name VBench_full_info.json or a text file") from error
    found: dict[str, tuple[str, ...]] = {}
    for prompt in _entries(path, text):
        before = found.get(prompt.text, ())
        found[prompt.text] = tuple(dict.fromkeys((*before, *prompt.dimensions)))
    known = sorted({name for names in found.values() for name in names})
    strange = [name for name in dimensions if name not in known]
    if strange:
        raise ValueError(f"dimensions={strange}: {path} knows {', '.join(known) or 'none'}")
    prompts = [Prompt(text, names) for text, names in found.items() if not dimensions or set(dimensions) & set(names)]
    if not prompts:
        raise ValueError(f"prompts={str(path)!r}: holds no prompt")
    for prompt in prompts:
        _check_name(prompt)
    return prompts


def _entries(path: Path, text: str) -> list[Prompt]:
    if path.suffix.lower() != ".json":
        return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    try:
        entries = json.loads(text)
        return [Prompt(str(entry["prompt_en"]), _dimensions(entry.get("dimension"))) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'prompts={str(path)!r}: expected a list of {{"prompt_en": ..., "dimension": [...]}} ({error!r})'
        ) from error


def _dimensions(value: object) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list):
        raise TypeError(f"dimension is {value!r}")
    return tuple(str(name) for name in value)


def _check_name(prompt: Prompt) -> None:
    name = video_name(prompt.text, FLICKERING_SAMPLES)
    if "/" in name or "\0" in name or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"prompt {prompt.text[:60]!r}: cannot be a file's name (no '/', at most {LONGEST_NAME} bytes with its number), as "
            "VBench's protocol wants; leave it out"
        )


def video_name(prompt: str, index: int) -> str:
    return f"{prompt}-{index}.mp4"


def missing_videos(
    prompts: Sequence[Prompt], folder: Path, samples: int = SAMPLES, flickering: int = FLICKERING_SAMPLES
) -> list[tuple[str, int, Path]]:
    """(prompt, index, file) of every video that is not in `folder` yet, in the order of the list."""
    wanted = [
        (prompt.text, index, folder / video_name(prompt.text, index))
        for prompt in prompts
        for index in range(prompt.samples(samples, flickering))
    ]
    return [job for job in wanted if not job[2].is_file()]
