"""Everything that reaches the screen: spectrograms, players, curves, source code, sliders, figures with their data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"plots": ["STYLE", "bars", "claims_table", "compare", "explore", "loss_by_timestep", "loss_curve", "play", "plot_budget", "plot_mel", "plot_mels", "plot_waveform", "read_json", "running_mean", "save_figure", "save_table", "set_style", "show_source", "table_rows"]})
