"""Captioned recordings from folders, tables, known data sets, shards and lists; resumable batches; caches; a report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": ["loader"],
        "captioned_audio": ["CaptionedAudio"],
        "caches": ["cache_clips", "cache_latents"],
        "sources": ["open_recordings"],
        "report": ["report_data"],
    },
)
