"""What a Turbo checkpoint says about itself: JSON under the key `turbotrain` of the safetensors metadata. No torch here."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from turbotrain.checkpoint.header import CheckpointProblem

METADATA_KEY = "turbotrain"


@dataclasses.dataclass
class CheckpointMeta:
    """Everything that inference needs besides the tensors.

    variant: a name of `VARIANTS`, "" when the dimensions are of none. config: `WanConfig.to_dict()`.
    attention: `AttentionConfig.to_dict()`. quantization: None for floating-point weights, else at least {"scheme": ...}.
    sampler: {"sigma_max", "times", "ode"} of a distilled network, None for a teacher.
    lineage: one entry per stage that made it, oldest first. license: of the base weights, "" when unknown.
    components: vae, text_encoder, tokenizer: paths relative to the checkpoint's folder, absolute paths or hub ids.
    dtype: of the weights outside the float32 islands, for example "bfloat16".
    """

    variant: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    sampler: dict[str, Any] | None = None
    lineage: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    license: str = ""
    components: dict[str, str] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"

    @property
    def undistilled(self) -> bool:
        """Whether it is known to be no few-step network: a teacher or an SLA network of our own. Of other projects' files,
        converted or not, nothing is known."""
        stages = {entry.get("stage") for entry in self.lineage}
        return self.sampler is None and not stages.isdisjoint(("teacher", "sla"))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "checkpoint") -> CheckpointMeta:
        """Raises CheckpointProblem for fields that this version does not know, rather than to drop what they say."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointProblem(
                f"{source}: its turbotrain metadata has unknown fields {', '.join(unknown)}; it was written by another "
                "version: load it with that one"
            )
        return cls(**values)
