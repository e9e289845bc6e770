"""Lists of what a data set is built from: prompts, prompts with images, videos with captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotrain.codecs.text import clean

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
_FIELDS = {"prompt": str, "caption": str, "image": str, "video": str, "start": (int, float)}


@dataclass(frozen=True)
class Item:
    """One sample to be. image: the first frame of image-to-video. video, start: a clip from that second on."""

    prompt: str
    image: Path | None = None
    video: Path | None = None
    start: float = 0.0


def read_items(source: Path) -> list[Item]:
    """The items that `source` lists, in its order.

    A folder: its videos by name, each beside a `.txt` of the same name that holds its caption. A `.jsonl`: an object a line with
    `prompt` (or `caption`), `image` or `video` (paths from the list's folder), and `start` in seconds. Any other file: a prompt a
    line; empty lines are left out.

    Raises:
        ValueError: nothing there, or a line that is none of these.
    """
    if source.is_dir():
        items = [_beside(video) for video in sorted(source.rglob("*")) if video.suffix.lower() in VIDEO_SUFFIXES]
    elif source.suffix == ".jsonl":
        lines = _text(source).splitlines()
        items = [_object(line, source, number) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        items = [Item(line) for line in _text(source).splitlines() if clean(line)]
    if not items:
        kind = f"videos ({', '.join(VIDEO_SUFFIXES)})" if source.is_dir() else "prompts"
        raise ValueError(f"{source}: no {kind} in it")
    return items


def fingerprint(items: Sequence[Item]) -> str:
    """Tells lists apart: what is built from another one must not be mixed in."""
    return hashlib.sha256("\n".join(map(repr, items)).encode("utf-8", "surrogatepass")).hexdigest()


def _text(source: Path) -> str:
    try:
        return source.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason}); a list of prompts is text or .jsonl") from error


def _beside(video: Path) -> Item:
    caption = video.with_suffix(".txt")
    if not caption.is_file():
        raise ValueError(f"{video}: no caption; write it to {caption.name} beside it, or list the videos in a .jsonl")
    return Item(_text(caption).strip(), video=video)


def _object(line: str, source: Path, number: int) -> Item:
    where = f"{source}, line {number}"
    try:
        said: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(said, dict):
        raise ValueError(f'{where}: expected an object such as {{"prompt": "...", "image": "a.jpg"}}')
    for key, value in said.items():
        if key not in _FIELDS:
            raise ValueError(f"{where}: unknown field {key!r}; known are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key}={value!r} is of the wrong type")
    prompt = said.get("prompt", said.get("caption", ""))
    if not clean(prompt):
        raise ValueError(f"{where}: no prompt")
    places = {key: source.parent / said[key] if key in said else None for key in ("image", "video")}
    return Item(prompt, places["image"], places["video"], float(said.get("start", 0.0)))
