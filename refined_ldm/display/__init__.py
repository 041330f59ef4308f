"""Everything that reaches the screen: spectrograms, players, curves, widgets, and figures that record their origin."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "spectrograms": ["mark_stretch", "plot_mel", "plot_mels", "plot_waveform", "plot_waveform_mels"],
        "players": ["compare", "play"],
        "curves": ["bars", "label_lines", "loss_curve", "plot_budget", "plot_edits", "running_mean"],
        "data_report": ["plot_data_report"],
        "widgets": ["claims_table", "explore", "report_unless", "show_source"],
        "figures": [
            "STYLE",
            "in_project",
            "read_json",
            "save_figure",
            "save_table",
            "set_style",
            "stored_figures",
            "table_rows",
        ],
    },
)
