"""Single modules of OpenDelta, SpeechBrain, LLM-Adapters and NeMo as `BottleneckAdapter`s.

from adapterkern.integrations import foreign
adapter = foreign.from_module(module)
"""

from adapterkern.integrations.foreign.modules import from_module

__all__ = ["from_module"]
