"""Captioned recordings from folders, tables, shards and JSON trees; resumable batches; caches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"captioned_audio": ["CaptionedAudio", "loader"], "caches": ["cache_clips", "cache_latents"]}
)
