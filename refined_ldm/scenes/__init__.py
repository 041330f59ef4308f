"""Captioned scenes of one or two sounds, rendered from a seed with exact metadata: the data set inside the package."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"dataset": ["KINDS", "SoundScenes"], "classes": ["CLASSES", "Event", "SoundClass"]}
)
