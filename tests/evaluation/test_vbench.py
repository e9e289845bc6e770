"""VBench's prompt list in, videos by its names out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from turbotrain.config import resolve
from turbotrain.evaluation.vbench import FLICKERING, Prompt, missing_videos, read_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
RED = "a small red circle moves left slowly on a black background"
BLUE = "a large blue square moves up fast on a white background"
# The published form: dimensions as a list, further fields that sampling does not need, one prompt in two entries.
ENTRIES = [
    {"prompt_en": RED, "dimension": ["subject_consistency", "dynamic_degree"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": BLUE, "dimension": ["color"], "auxiliary_info": {}},
    {"prompt_en": RED, "dimension": [FLICKERING]},
]  # fmt: skip


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def test_the_published_list_and_plain_text_are_read(entries: Path, tmp_path: Path) -> None:
    prompts = read_prompts(entries)
    assert prompts == [Prompt(RED, ("subject_consistency", "dynamic_degree", FLICKERING)), Prompt(BLUE, ("color",))]
    assert [prompt.samples() for prompt in prompts] == [25, 5]
    assert [prompt.text for prompt in read_prompts(entries, ["color"])] == [BLUE]
    plain = tmp_path / "prompts.txt"
    plain.write_text(f"{BLUE}\n\n{RED}\n{BLUE}\n")
    assert read_prompts(plain) == [Prompt(BLUE), Prompt(RED)]


def test_only_what_is_missing_is_sampled(tmp_path: Path) -> None:
    (tmp_path / f"{RED}-1.mp4").touch()
    found = missing_videos([Prompt(RED), Prompt(BLUE, (FLICKERING,))], tmp_path, samples=3, flickering=2)
    assert [(prompt, index) for prompt, index, _ in found] == [(RED, 0), (RED, 2), (BLUE, 0), (BLUE, 1)]
    assert found[0][2] == tmp_path / f"{RED}-0.mp4"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("list.json", "{", "expected a list"),
        ("list.json", '[{"prompt": "x"}]', "prompt_en"),
        ("list.json", '[{"prompt_en": "x", "dimension": 3}]', "dimension is 3"),
        ("list.json", "[]", "holds no prompt"),
        ("list.txt", "a/b\n", "cannot be a file's name"),
        ("list.txt", "x" * 250 + "\n", "at most 255 bytes"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / name)


def test_an_unknown_dimension_is_refused(entries: Path) -> None:
    with pytest.raises(ValueError, match=r"colour.*knows color, dynamic_degree"):
        read_prompts(entries, ["colour"])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    spec = importlib.util.spec_from_file_location("vbench_tool", REPOSITORY / "tools" / "vbench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_videos_are_sampled_by_the_protocol_and_a_second_call_goes_on(
    tool, entries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    teacher = str(resolve("asset:shapes_teacher"))
    listed = ["--prompts", str(entries), "--output", str(folder), "--samples", "2", "--flickering-samples", "1"]
    sampled = ["sampling=teacher", "steps=1", "frames=5", "batch_size=2", "device=cpu", "seed=7"]
    call = [*listed, f"checkpoint={teacher}", *sampled]
    assert tool.main(call) == 0
    names = [f"{RED}-0.mp4", f"{BLUE}-0.mp4", f"{BLUE}-1.mp4"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert "seed 8" in capsys.readouterr().out
    kept = (folder / names[0]).read_bytes()
    (folder / names[1]).unlink()
    assert tool.main(call) == 0
    assert "3 videos, 1 of them" in capsys.readouterr().out
    assert (folder / names[1]).is_file()
    assert (folder / names[0]).read_bytes() == kept
    with pytest.raises(SystemExit):
        tool.main([*call, "prompt=x"])
    assert "--prompts" in capsys.readouterr().err
