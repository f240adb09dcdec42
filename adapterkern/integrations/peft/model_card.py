"""What a saved folder's README.md says of adapterkern, beside what PEFT writes into it."""

import os

from huggingface_hub import ModelCard

from adapterkern import __version__

MODEL_CARD = "README.md"
TAG = "adapterkern"
_HEADING = "## Loading with adapterkern"
_SECTION = f"""{_HEADING}

```python
import peft
import adapterkern.integrations.peft  # tells PEFT the method

model = peft.PeftModel.from_pretrained(base_model, "the folder or repository of this file")
```

Without that import PEFT knows no such method and says `KeyError: 'BOTTLENECK'`. A bottleneck
adapter follows each of the layers that `adapter_config.json` names: `y = base_layer(x)`, then
`y + scaling * (act(y @ down.T + down_bias) @ up.T + up_bias)`.
"""
_VERSIONS = "### Framework versions"


def describe(folder: str) -> None:
    """Add the tag, how to load, the formula and the version to the card; each of them once."""
    path = os.path.join(folder, MODEL_CARD)
    if not os.path.isfile(path):  # not the main process, which alone writes
        return
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    lines = card.text.splitlines()
    version = f"- adapterkern {__version__}"
    if version not in lines and _VERSIONS in lines:  # PEFT's heading, with its own version
        lines.insert(lines.index(_VERSIONS) + 2, version)
    text = "\n".join(lines) + "\n"
    card.text = text if _HEADING in lines else f"{text}\n{_SECTION}"
    card.save(path)
