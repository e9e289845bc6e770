"""Networks that stages train: whole ones in float32, or with `lora.rank` changes of the weights that everybody shares."""

from __future__ import annotations

from turbotrain.checkpoint import read_meta
from turbotrain.checkpoint.lora import LORA_FILE, read_lora
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.lora import add_lora, load_change, over_same_weights
from turbotrain.model.wan import WanTransformer
from turbotrain.records import hash_path
from turbotrain.stages.context import StageContext
from turbotrain.training.seeding import derive_seed


def trainable(context: StageContext, role: str, attention: AttentionConfig | None = None) -> WanTransformer:
    """A network to train that begins as the input `role`, with another attention if one is given."""
    lora = context.config.lora
    network = over_same_weights(context.frozen(role)) if lora.rank else context.load(role)
    if attention is not None:
        network.set_attention(attention)
    if not lora.rank:
        return network
    # Student and critic may begin alike: B is zero, so that A shows in nothing yet.
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return add_lora(network, lora.rank, alpha, lora.targets, derive_seed(context.seed, "lora"))


def after_sla(context: StageContext) -> WanTransformer:
    """The SLA stage's network, to be trained on. Its adapter, where it has one, goes on over the teacher's weights; a network
    that was trained whole becomes the frozen part of the student alone.

    Raises:
        ValueError: an adapter of another rank, of other layers, or trained over another teacher.
    """
    folder = context.inputs["sla"]
    adapter = folder.parent / "lora" / LORA_FILE
    if not context.config.lora.rank:
        return context.load("sla")
    if not adapter.is_file():
        return trainable(context, "sla")
    meta = read_meta(folder)
    if meta.lineage[-1]["inputs"]["teacher"] != hash_path(context.inputs["teacher"]):
        raise ValueError(
            f"{adapter} was trained over another teacher than {context.inputs['teacher']}: name that one as model.teacher, or "
            "run the sla stage again"
        )
    student = trainable(context, "teacher", AttentionConfig.from_dict(meta.attention))
    return load_change(student, read_lora(adapter)[0], str(adapter))
