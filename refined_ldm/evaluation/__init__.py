"""Evaluation: distances between sets of sounds, adherence to captions, the error of each stage, pitch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adherence": ["fit_probe", "measure_adherence", "rendered_clips"],
        "budget": ["error_budget"],
        "folders": ["compare_folders"],
        "metrics": ["bootstrap_interval", "frechet_distance", "kernel_distance", "real_vs_real"],
        "pitch": ["Crepe"],
    },
)
