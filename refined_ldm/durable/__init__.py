"""Training that survives interruption: checkpoints, the CSV log, deferred signals, and loss spikes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run_state": ["load_run", "save_run"],
        "csv_log": ["CsvLogger"],
        "signals": ["Stopped", "defer_signals"],
        "loss_guard": ["SpikeWatch"],
    },
)
