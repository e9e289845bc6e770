"""Modules that take turns in a few slots compute what they compute when all are there, and only what the slots hold counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from turbotrain.evaluation.random_weights import random_inputs
from turbotrain.model import elementwise
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import prepare_for_inference, quantize_block_linears
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.placement import swap as swap_module
from turbotrain.placement.budget import Setting
from turbotrain.placement.residence import Residence
from turbotrain.placement.swap import RING, Swap

CPU = torch.device("cpu")
LAYERS = 5
CONFIG = WanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=LAYERS, text_dim=32, text_len=8)
SCHEMES = (None, "int8_channel", "int8_block128")


def network(scheme: str | None = None, seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    model = WanTransformer(CONFIG, AttentionConfig("sla", block_q=16, block_k=16)).eval().requires_grad_(False)
    if scheme is not None:
        for block in model.blocks:
            quantize_block_linears(block, scheme)
    for parameter in (model.head.head.weight, *(block.get_parameter("modulation") for block in model.blocks)):
        nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return random_inputs(CONFIG, (16, 3, 8, 8), 1)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every copy of a module to its slot, in order."""
    copies: list[object] = []
    copy_to: Callable[..., None] = swap_module._copy
    monkeypatch.setattr(swap_module, "_copy", lambda unit, memory: (copies.append(unit), copy_to(unit, memory)))
    return copies


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("scheme", "kept"),
    [
        (None, 0),
        (None, LAYERS),
        ("int8_channel", 0),
        ("int8_channel", 2),
        ("int8_channel", LAYERS),
        ("int8_block128", 1),
    ],
)
@torch.inference_mode()
def test_swapped_networks_give_the_same_numbers(scheme: str | None, kept: int, given: dict[str, Tensor]) -> None:
    first, second = network(scheme), network(scheme, seed=1)
    expected, other = first(**given), second(**given)
    assert not torch.equal(expected, other)
    swap = Swap([[first, *first.blocks], [second, *second.blocks]], CPU, kept=kept)
    for model, result in ((first, expected), (first, expected), (second, other), (first, expected)):
        assert torch.equal(model(**given), result)
    swap.release()
    assert torch.equal(second(**given), other)
    swap.close()
    assert torch.equal(first(**given), expected)


@torch.inference_mode()
def test_what_is_computed_is_what_the_slots_hold(given: dict[str, Tensor]) -> None:
    model = network()
    expected = model(**given)
    swap = Swap([[model, *model.blocks]], CPU, kept=LAYERS)
    assert torch.equal(model(**given), expected)
    for slot in swap._slots:
        assert slot.memory is not None
        slot.memory.fill_(1)
    assert not torch.equal(model(**given), expected)
    swap.release()
    assert torch.equal(model(**given), expected)


@pytest.mark.parametrize(
    ("kept", "first_pass", "later_pass"),
    [(LAYERS, LAYERS + 1, 0), (LAYERS - RING, LAYERS + 1, 0), (1, LAYERS + 1, LAYERS - 1), (0, LAYERS + 1, LAYERS)],
)
@torch.inference_mode()
def test_only_what_is_not_there_is_copied(
    kept: int, first_pass: int, later_pass: int, given: dict[str, Tensor], fetched: list[object]
) -> None:
    model = network()
    Swap([[model, *model.blocks]], CPU, kept=kept)
    counts = []
    for _ in range(3):
        model(**given)
        counts.append(len(fetched))
    ahead = RING if later_pass else 0  # the next pass's first blocks are fetched at the end of one
    assert first_pass <= counts[0] <= first_pass + ahead
    assert counts[1] - counts[0] == counts[2] - counts[1] == later_pass


@torch.inference_mode()
def test_each_copy_begins_a_block_before_it_is_needed(
    given: dict[str, Tensor], fetched: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    swap = Swap([[model, *model.blocks]], CPU, kept=0)
    model(**given)
    late: list[object] = []
    fetch, enter = swap._fetch, Swap._enter

    def entering(self: Swap, unit: swap_module._Unit) -> None:
        if unit.slot.holds is not unit:
            late.append(unit)
        enter(self, unit)

    monkeypatch.setattr(Swap, "_enter", entering)
    swap._fetch = fetch  # type: ignore[method-assign]
    model(**given)
    assert not late
    assert len(fetched) >= 2 * LAYERS


@torch.inference_mode()
def test_slots_take_what_the_arithmetic_says(given: dict[str, Tensor]) -> None:
    model = network("int8_channel")
    block = sum(
        -(-tensor.nbytes // swap_module.ALIGNMENT) * swap_module.ALIGNMENT
        for tensor in model.blocks[0].state_dict().values()
    )
    sizes = [Swap([list(network("int8_channel").blocks)], CPU, kept=kept).device_bytes for kept in range(LAYERS + 1)]
    assert sizes == [block * min(LAYERS, kept + RING) for kept in range(LAYERS + 1)]


@torch.inference_mode()
def test_outside_its_turn_a_module_holds_its_own_weights(given: dict[str, Tensor]) -> None:
    model = network("int8_channel")
    before = copy.deepcopy(model.state_dict())
    swap = Swap([[model, *model.blocks]], CPU, kept=2)
    home = addresses(model)
    model(**given)
    assert addresses(model) == home
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.blocks[3].ffn[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**given)
    hook.remove()
    assert addresses(model) == home
    expected = network("int8_channel")(**given)
    assert torch.equal(model(**given), expected)
    swap.close()


def test_weights_stay_usable_in_training_mode_after_inference(given: dict[str, Tensor]) -> None:
    model = network()
    swap = Swap([[model, *model.blocks]], CPU, kept=1)
    with torch.inference_mode():
        model(**given)
    swap.close()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(**given)


def test_bad_sequences_are_refused() -> None:
    blocks = list(network().blocks)
    with pytest.raises(ValueError, match=r"sequences of \[3, 5\] modules share slots"):
        Swap([blocks, blocks[:3]], CPU)
    with pytest.raises(ValueError, match="kept=6: there are 5 modules to keep"):
        Swap([blocks], CPU, kept=6)


@pytest.mark.parametrize("offload", ["none", "model", "blocks"])
@torch.inference_mode()
def test_a_residence_changes_no_number(offload: str, given: dict[str, Tensor]) -> None:
    model = network("int8_channel")
    expected = model(**given)
    residence = Residence([model], CPU, Setting(offload, kept_blocks=2, ffn_rows=128))
    assert {block.ffn_rows for block in model.blocks} == {128}
    for _ in range(2):
        assert torch.equal(model(**given), expected)
        residence.release()


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_a_feed_forward_in_pieces_gives_the_same_numbers(scheme: str | None) -> None:
    given = random_inputs(CONFIG, (16, 1, 40, 30), 2)  # 300 tokens: two whole pieces and a rest
    model = network(scheme)
    expected = model(**given)
    seen: list[int] = []
    model.blocks[0].ffn[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[1]))
    for block in model.blocks:
        block.ffn_rows = 128
    result = model(**given)
    assert seen == [128, 128, 44]
    # 8-bit sums are exact; those of floats may be ordered otherwise for fewer rows.
    assert torch.allclose(result, expected, rtol=0, atol=0 if scheme else 1e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_weights_that_are_multiplied_at_once_still_are(
    given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare_for_inference(network("int8_channel"))
    expected = model(**given)
    together: list[object] = []
    multiply = elementwise.multiply_together
    monkeypatch.setattr(
        elementwise, "multiply_together", lambda *args: (together.append(multiply(*args)), together[-1])[1]
    )
    swap = Swap([[model, *model.get_submodule("blocks").children()]], CPU, kept=1)
    assert torch.equal(model(**given), expected)
    assert len(together) == LAYERS
    assert all(result is not None for result in together)
    swap.close()


class PackedSwap(Swap):
    """Packs weights as for a GPU."""

    def _make_units(
        self, modules: Sequence[nn.Module], slots: Sequence[swap_module._Slot], pin: bool
    ) -> list[swap_module._Unit]:
        return super()._make_units(modules, slots, True)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_packed_weights_give_the_same_numbers(
    scheme: str | None, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[Tensor] = []
    monkeypatch.setattr(swap_module._Pinned, "lock", lambda _, memory: locked.append(memory))
    model = prepare_for_inference(network(scheme))
    expected = model(**given)
    swap = PackedSwap([[model, *model.get_submodule("blocks").children()]], CPU, kept=1)
    assert len(locked) == LAYERS + 1
    assert sum(memory.nbytes for memory in locked) < 1.2 * sum(tensor.nbytes for tensor in model.state_dict().values())
    assert torch.equal(model(**given), expected)
    swap.close()
    assert torch.equal(model(**given), expected)
