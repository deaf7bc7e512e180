"""The model card of a saved folder, filled from what the model itself knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatedwarmth.model import GatedWarmthModel

HEADER = """---
base_model: {base}
library_name: gatedwarmth
tags: [lora, gated, warmth]
---
# Gated {traits} for {base}

LoRA traits on top of {base}, weighed token by token by gates that a router sets turn by turn.

```python
from gatedwarmth import GatedWarmthModel

model = GatedWarmthModel.from_pretrained("path/to/this/folder")
print(model.chat([{{"role": "user", "content": "My train is late again."}}]))
```

"""


def model_card(model: GatedWarmthModel) -> str:
    """Markdown with a YAML head, as the hub reads it."""
    lines = [HEADER.format(base=model.base_name, traits=" and ".join(model.traits) or "traits"), "## Traits\n"]
    for trait in model.traits:
        adapter = model.adapter(trait)
        ranks = sorted({layer.rank for layer in adapter.layers.values()})
        lines.append(
            f"- `{trait}`: {len(adapter.layers)} layers, rank {', '.join(map(str, ranks))} (`adapters/{trait}`)"
        )
    policy = ", ".join(f"{key} {value}" for key, value in model.policy.to_json().items())
    lines.append(f"\n## Gates\n\nScope `{model.scope}`. Policy: {policy}.")
    if model.router is not None:
        lines.append(f"\n## Router\n\n{model.router.describe()}")
    lines.append(
        "\n## Limits\n\nThe figures above are what was measured when the parts were trained. Warmth can come with "
        "agreement to false statements (arXiv:2507.21919): run `gatedwarmth eval run` before you rely on a model.\n"
    )
    return "\n".join(lines)
