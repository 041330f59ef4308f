"""The arms, which differ in named switches only; the plan of their runs; which of their numbers may be compared.

Notebook: 06
"""

import math
from dataclasses import dataclass, replace

from refined_ldm.base.integers import whole

RENAMED = {  # settings of arms in records that were written before these names
    "wide": "unet", "weighting": "loss_weighting", "extra_drop": "conditioner_dropout",
}  # fmt: skip
EARLIER_LABELS = {
    "D, formula deaf to captions": "D, unconditional linear denoiser", "D, no formula": "D, no linear denoiser",
}  # fmt: skip
EARLIER_PARTS = {"formula": "linear", "ladder": "ablations"}
EARLIER_MACHINES = {  # precision in records without a card of it: the machine, which training of the conditioners
    "no": ("CPU without fast bfloat16", "first"), "bf16": ("CPU with fast bfloat16", "second"),
}  # fmt: skip
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Arm:
    """One way to train the U-Net. The defaults are arm B: AudioLDM's recipe with its defects fixed, and tuned."""

    conditioner: str = "laion"  # or "ms"; with "-plain", towers that were not pretrained, with "-details", trained on
    # details too; "random"; "oracle"
    tokens: bool = False  # cross-attention on the states of the text tower beside the pooled embedding
    parameterization: str = "v"  # which gains a tuned baseline most; AudioLDM predicts eps
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    ema_decay: float = 0.999
    gain: float = 0.0  # norm that embeddings of unit length are given; 0: sqrt(D); 1: as LAION's have it
    timesteps: str = "stratified"
    loss_weighting: str = "prediction"
    drop: float = 0.1  # captions blanked for guidance
    conditioner_dropout: float = 0.0  # and those the conditioner blanks beside them, which it never stops
    audio_share: float = 0.0  # of clips steered by their own sound
    scale_from: str = "fixed subset"  # or "first batch"
    guidance: float = 4.0  # when sampling: the best of several for each recipe (06_guidance)
    unet: str = "small"  # or "preset": the U-Net of the preset itself, with twice the channels at `tiny`

    @classmethod
    def from_record(cls, record: dict) -> "Arm":
        """The arm of a stored record, under the names that it was written with. Raises TypeError for other names."""
        record = {RENAMED.get(name, name): value for name, value in record.items()}
        if isinstance(record.get("unet"), bool):
            record["unet"] = "preset" if record["unet"] else "small"
        if record.get("loss_weighting") == "own":
            record["loss_weighting"] = "prediction"
        return cls(**record)


PUBLISHED = Arm(parameterization="eps", lr=1e-4, lr_schedule="constant", ema_decay=0.9999, gain=1.0,
                timesteps="uniform", conditioner_dropout=0.1, audio_share=0.5, scale_from="first batch",
                guidance=3.0)  # fmt: skip
RECIPE = {"parameterization": "caption-gaussian", "optimizer": "muon", "lr": 3e-3, "guidance": 2.0}
ARMS = {
    "A": PUBLISHED,
    "B": Arm(),
    "C": Arm("ms"),
    "D": Arm("ms", **RECIPE),
    "E": Arm(**RECIPE),
    "F": Arm("ms-details", **RECIPE),
    "G": Arm("laion-details", **RECIPE),
    "random": Arm("random", **RECIPE),
    "oracle": Arm("oracle", **RECIPE),
    "tokens": Arm("ms", tokens=True, **RECIPE),
    "plain": Arm("ms-plain", **RECIPE),
}

# The recipe with one ingredient taken out, by the labels of the records; figures.ARM_NAMES has what figures show.
ABLATIONS = {
    "D": {},
    "D, unconditional linear denoiser": {"parameterization": "gaussian", "guidance": 4.0},
    "D, no linear denoiser": {"parameterization": "v", "guidance": 4.0},
    "D, AdamW": {"optimizer": "adamw", "lr": 1e-3},
    "D, faint captions": {"gain": 1.0},
    "D, uniform timesteps": {"timesteps": "uniform"},
    "D, last weights": {"ema_decay": 0.0},
    "C": ARMS["C"].__dict__,
}
STORED = {"preset": "tiny", "iterations": 1500, "clips": 8000, "judged": 192}  # settings of the repository's tables
BRANCH = ", wsd"  # ends the labels of runs that branch off a trunk
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of which the second is the baseline's


@dataclass(frozen=True)
class Run:
    """One training of the plan: an arm, what is changed in it, for how long, and its seed."""

    label: str
    arm: Arm
    iterations: int
    seed: int
    part: str  # linear, arms, target, controls, plateau, ablations, rates, wide or branches

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.label}-{self.iterations}-{self.seed}".replace(", ", "-").replace(" ", "-")


def plan(iterations: int = 1500, seeds: int = 3) -> list[Run]:
    """Every run of the experiment, the most informative ones first. Raises ValueError unless both are 1 or more."""
    iterations, seeds = whole("iterations", iterations, 1), whole("seeds", seeds, 1)
    runs, short = [], [iterations // k for k in (10, 5, 3)]
    runs += [Run(f"C lr {lr:g}", replace(ARMS["C"], lr=lr), iterations // 3, 0, "rates") for lr in RATES]
    runs += [Run(f"B wide lr {lr:g}", replace(ARMS["B"], unet="preset", lr=lr), iterations // 3, 0, "rates")
             for lr in RATES[:3]]  # fmt: skip
    runs.append(Run("D", ARMS["D"], 0, 0, "linear"))  # an untrained U-Net behind the linear denoiser
    for seed in range(seeds):
        runs += [Run(label, ARMS[label], iterations, seed, "arms") for label in "CBA"]
        runs += [Run("D", ARMS["D"], n, seed, "target") for n in short] + [
            Run("E", ARMS["E"], short[0], seed, "target")
        ]
    for seed in range(seeds):
        runs += [Run(label, ARMS[label], iterations, seed, "arms") for label in "DE"]
    runs += [Run(label, ARMS[label], short[2], 0, "controls") for label in ("tokens", "oracle", "random", "plain")]
    runs.append(Run("tokens", ARMS["tokens"], iterations, 0, "controls"))  # is order learned with more iterations?
    runs += [Run(label, replace(ARMS["D"], **change), short[1], 0, "ablations") for label, change in ABLATIONS.items()
             if change]  # fmt: skip
    long = 4 * iterations  # is the baseline at its plateau?
    for seed in range(seeds):
        runs += [Run("B", ARMS["B"], long, seed, "plateau"), Run("D", ARMS["D"], long // 10, seed, "plateau")]
    for seed in range(seeds):
        runs += [Run(label, ARMS[label], long, seed, "plateau") for label in "CADE"]
    wide = [replace(ARMS[label], unet="preset") for label in "BD"]  # is the small U-Net the limit?
    for seed in range(seeds):
        runs += [Run("D, wide", wide[1], long // part, seed, "wide") for part in (10, 6, 3)]
        runs.append(Run("B, wide", wide[0], long, seed, "wide"))
    runs += [Run("B, wide", wide[0], 2 * long, 0, "wide"), Run("D, wide", wide[1], 2 * long // 3, 0, "wide")]
    # Decays that branch off one trunk a seed: time to target as a curve, and a balanced table wherever it is stopped.
    half = max(1, iterations // 2)
    for labels, lengths in (("DEFGB", (half, iterations)), ("C", (half, iterations)), ("B", (2 * iterations, long)),
                            ("CDEFG", (2 * iterations,))):  # fmt: skip
        for seed in range(seeds):
            runs += [Run(f"{label}{BRANCH}", replace(ARMS[label], lr_schedule="wsd"), n, seed, "branches")
                     for n in lengths for label in labels]  # fmt: skip
        if labels == "C":  # does a branch end as a run of its own?
            runs += [Run("B, cosine", ARMS["B"], iterations, seed, "branches") for seed in range(seeds)]
    return runs


@dataclass(frozen=True)
class Card:
    """Everything a measured number depends on besides the quality of the model."""

    latent_scale: float  # latents are multiplied by it: it sets the noise levels of a run
    parameterization: str  # the prediction target
    weighting: str  # of timesteps in the mean
    audio_share: float  # of conditions that are embeddings of sounds
    drop: float  # share of blanked conditions, all causes together
    norm: float  # of an embedding
    width: int  # D of an embedding
    timesteps: str  # how they are drawn
    held_out: str  # the clips of the validation loss
    precision: str  # of the training: a value of PRECISIONS
    machine: str  # its kind: devices.machine_kind
    conditioner_weights: str  # its kind, and a digest of its weights: another training is another conditioner
    lr_schedule: str
    iterations: int

    @classmethod
    def from_record(cls, record: dict) -> "Card":
        """The card in a stored record of a run, under the names of its time. Raises TypeError for other names."""
        card = {"latent_scale" if name == "scale" else name: value for name, value in record["card"].items()}
        precision = record.get("precision", "no")
        machine, training = EARLIER_MACHINES.get(precision, ("", ""))
        arm = record["arm"]
        earlier = {"precision": PRECISIONS[precision], "machine": machine, "lr_schedule": arm["lr_schedule"],
                   "conditioner_weights": f"{arm['conditioner']}, {training} training",
                   "iterations": record["iterations"]}  # fmt: skip
        return cls(**earlier | card)


FOOTING = ("precision", "machine", "conditioner_weights", "lr_schedule", "iterations")
TRAINING_LOSS = tuple(Card.__dataclass_fields__)
VALIDATION_LOSS = ("latent_scale", "held_out")  # captions only, none blanked, converted to eps, on fixed timesteps


def comparable(a: Card, b: Card, fields: tuple[str, ...] = VALIDATION_LOSS, but: tuple[str, ...] = ()) -> None:
    """Raise ValueError, naming every difference, unless two cards agree in `fields`.

    but: fields that may differ, as they are what is tested.
    """
    values = {name: (getattr(a, name), getattr(b, name)) for name in fields if name not in but}
    different = [f"{name}: {x} and {y}" for name, (x, y) in values.items()
                 if not (math.isclose(x, y, rel_tol=1e-6) if isinstance(x, float) else x == y)]  # fmt: skip
    if different:
        raise ValueError(f"these losses cannot be compared, the runs differ in {'; '.join(different)}")
