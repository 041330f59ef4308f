"""Write the tables and numbers of the documents from the stored measurements: `make tables`.

In a document everything between `<!-- NAME -->` and `<!-- /NAME -->` is written by the function `NAME` below, which
reads figures/data, the card of the shipped weights, or docs/sounds. `make test` fails where a document is not what this
writes.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import groupby, zip_longest
from pathlib import Path

import pandas as pd

from refined_ldm.config import preset
from refined_ldm.evaluation.budget import WAYS
from refined_ldm.experiment.arms import BRANCH, STORED, plan
from refined_ldm.experiment.ledger import read_ledger
from refined_ldm.experiment.measures import (
    DETAILS,
    arms_compared,
    branch_effects,
    branches_compared,
    encoder_effects,
    ended,
    plateau,
    targets_reached,
)
from refined_ldm.experiment.statistics import collect, unequal
from refined_ldm.training.loop import stable_steps

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"<!-- (\w+) -->.*?<!-- /\1 -->", re.DOTALL)
WRITERS: dict[str, Callable[[], str]] = {}


def writer(function: Callable[[], str]) -> Callable[[], str]:
    """Register a function under its name; in one process it is computed once."""
    WRITERS[function.__name__] = cache(function)
    return function


def render(text: str) -> str:
    """Return a document with every place filled anew. Raises ValueError for a name that no function here has."""

    def fill(place: re.Match) -> str:
        name = place[1]
        if name not in WRITERS:
            raise ValueError(f"no table {name!r}: there are {', '.join(WRITERS)}")
        return f"<!-- {name} -->{WRITERS[name]()}<!-- /{name} -->"

    return PLACE.sub(fill, text)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table with blank lines around it."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n\n"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / "data" / f"{name}.csv")


def card() -> dict:
    return json.loads((ROOT / "refined_ldm" / "weights" / "tiny" / "card.json").read_text(encoding="utf-8"))


def spread(value: float, low: float, high: float, decimals: int) -> str:
    """Return "value (low–high)", with a true minus sign."""
    return f"{value:.{decimals}f} ({low:.{decimals}f}–{high:.{decimals}f})".replace("-", "−")


# --- speed ---


@writer
def neighbour() -> str:
    """Seconds for each number of threads and each way in which they wait, alone and beside other programs."""
    header = ["work", "threads", "setting", "alone", "beside an idle loop", "beside a training"]
    table = pd.read_csv(ROOT / "figures" / "data" / "bench_neighbour.csv", dtype=str).fillna({"work": ""}).fillna("–")
    return markdown(header, ([work, threads, "**ours**" if setting == "ours" else f"`{setting}`", *seconds]
                             for work, threads, setting, *seconds in table.itertuples(index=False)))  # fmt: skip


# --- results ---


@writer
def adherence() -> str:
    """Share of the captioned classes that are recognised in a sound, by the source of the sound."""
    names = {
        "rendered": "the rendered clips themselves",
        "copied": "the same clips through mel, VAE and vocoder: the ceiling of this model",
        "generated": "**generated from the caption**",
        "shuffled": "generated, compared with another caption: chance",
    }
    kinds = ("one event", "all kinds")
    rows = {
        (row["sound"], row["clips of"]): spread(row["recall"], row["low"], row["high"], 3)
        for row in card()["adherence"]
    }
    lines = [
        [name, *(rows[sound, kind] for kind in kinds)] for sound, name in names.items() if (sound, kinds[0]) in rows
    ]
    return markdown(["class recall", "captions of one event", "captions of all kinds"], lines)


@writer
def frechet() -> str:
    """The Fréchet distance of generated sounds, beside that of the clips through VAE and vocoder."""
    table = read("05_adherence")
    of = table[table["clips of"] == "all kinds"].set_index("sound")["frechet"]
    return f"{of['generated']:.1f}, that of the clips through VAE and vocoder {of['copied']:.1f},"


@writer
def details() -> str:
    """Share of a caption's details that are right in the sound, by the detail classifier."""
    names = {
        "class": "the kinds of sound", "nothing else": "these kinds and no other",
        "number up to three": "number: once, twice or three times", "number": "number: all, up to six",
        "pitch": "pitch: low or high", "pace": "pace: slow or quick", "order": "order of two sounds",
        "loudness": "loudness beside another sound", "distance": "in the distance",
    }  # fmt: skip
    kinds = ("rendered", "copied", "generated", "chance")
    table = read("05_details").set_index(["detail", "sound"])
    teacher = read("05_details_teacher").set_index(["detail", "sound"])  # the same weights, two sounds of 8 steps
    before = read("05_details_before").set_index(["detail", "sound"])  # the weights that had not learned details
    others = (teacher, before)

    def generated(of, detail, decimals=2):
        row = (detail, "generated")
        return spread(*of.loc[row, ["value", "low", "high"]], decimals) if row in of.index else ""

    lines = [
        [name, int(table.loc[(detail, "generated"), "clips"])]
        + [spread(*table.loc[(detail, kind), ["value", "low", "high"]], 2) for kind in kinds]
        + [generated(of, detail) for of in others]
        for detail, name in names.items()
        if (detail, "generated") in table.index
    ]
    own, *shares = (generated(of, "silent", 3) for of in (table, *others))
    lines.append(["silent", int(table.loc[("silent", "generated"), "clips"]), "", "", own, "", *shares])
    header = ["share that is right", "captions", "rendered clips", "through VAE and vocoder", "**generated**", "chance",
              "by the teacher", "before details were learned"]  # fmt: skip
    return markdown(header, lines)


@writer
def edits() -> str:
    """An event exchanged by editing: what is in the result, and what changed that should not."""
    shares = ("new event", "kept event", "old event gone", "new and kept")
    change = "log-mel L1 of the kept stretch"
    table = read("edits")
    lines = []
    for (method, strength), group in table[table["task"] == "edit"].groupby(
        ["method", "strength"], sort=False, dropna=False
    ):
        own = group.set_index("measure")[["value", "low", "high"]]
        name = method if pd.isna(strength) else f"{method}, strength {strength:g}"
        lines.append([name, *(spread(*own.loc[m], 2) for m in shares), spread(*own.loc[change], 3)])
    clips = int(table.loc[table["task"] == "edit", "clips"].iloc[0])
    return markdown([f"{clips} scenes", *shares, change], lines)


GOALS = (  # function, task, sound, measure, decimals, goal
    ("`edit`, DiffEdit", "edit", "DiffEdit", "new event", 2, "≥ 0.8"),
    ("`edit`, DiffEdit", "edit", "DiffEdit", "kept event", 2, "≥ 0.8"),
    ("`edit`, DiffEdit", "edit", "DiffEdit", "log-mel L1 of the kept stretch", 3, "below SDEdit's"),
    ("`edit`, DiffEdit", "edit", "DiffEdit", "overlap of its stretch with the exchanged events", 2, "1"),
    ("`inpaint`", "inpaint", "inpainting", "missing event", 2, "≥ 0.8"),
    ("`inpaint`", "inpaint", "inpainting", "largest difference outside the mask", 3, "0"),
    ("`inpaint`", "inpaint", "inpainting", "seam within 95 % of random places", 2, "as real clips"),
    ("`extend`", "extend", "extend", "same class in the new half", 2, "≥ 0.8"),
    ("`extend`", "extend", "extend", "step at the join within 99 % of all steps", 2, "no click"),
    ("`super_resolve`", "upsample", "super-resolution", "log-mel L1 above 3600 Hz", 2, "below the input's"),
    ("`generate_long`, 30 s", "long", "MultiDiffusion", "class where it was asked for", 2, "≥ 0.8"),
    ("`generate_long`, 30 s", "long", "MultiDiffusion", "peak memory of 30 s, of that of 10 s", 2, "≤ 1.3"),
    ("`loop`", "loop", "loop", "step at the seam no larger than those within", 2, "no larger"),
    ("`variations`", "variations", "variations", "same class", 2, "≥ 0.8"),
    ("`variations`", "variations", "variations", "log-mel L1 to the sound", 2, "below the caption's"),
    ("`variations`", "variations", "variations", "log-mel L1 between two", 2, "above 0"),
    ("`interpolate`, captions", "interpolate", "captions", "class of each end", 2, "≥ 0.8"),
    ("`interpolate`, captions", "interpolate", "captions", "steps towards the other class", 2, "above 0.5"),
    ("`interpolate`, sounds", "interpolate", "sounds", "class of each end", 2, "≥ 0.8"),
    ("`interpolate`, sounds", "interpolate", "sounds", "steps towards the other class", 2, "above 0.5"),
)


@writer
def editing_goals() -> str:
    """Each function that takes a sound: its goal, what was measured, and the trivial answers."""
    found = {(r["task"], r["method"], r["measure"]): r for r in read("edits").to_dict("records")}

    def cell(task: str, methods: Iterable[str], measure: str, decimals: int) -> str:
        rows = [found[task, method, measure] for method in methods if (task, method, measure) in found]
        return spread(rows[0]["value"], rows[0]["low"], rows[0]["high"], decimals) if rows else "–"

    lines = [
        [function, measure, goal, cell(task, [sound], measure, decimals),
         cell(task, ["input unchanged", "input repeated"], measure, decimals),
         cell(task, ["caption alone"], measure, decimals), f"`{task}`"]
        for function, task, sound, measure, decimals, goal in GOALS
    ]  # fmt: skip
    return markdown(["function", "measure", "goal", "value", "input", "caption alone", "TASK"], lines)


@writer
def edits_others() -> str:
    """Inpainting, continuing, super-resolution, looping and long sounds, each beside the trivial answers."""
    ours = {"inpaint": "inpainting", "extend": "extend", "upsample": "super-resolution", "long": "MultiDiffusion",
            "loop": "loop", "variations": "variations"}  # fmt: skip
    lines = []
    for (task, measure), group in read("edits").query("task in @ours").groupby(["task", "measure"], sort=False):
        cells = {r["method"]: spread(r["value"], r["low"], r["high"], 2) for r in group.to_dict("records")}
        given = cells.get("input unchanged", cells.get("input repeated", "–"))
        others = (cells.get(sound, "–") for sound in (ours[task], "rendered", "caption alone"))
        lines.append([f"`{task}`", measure, *others, given, group["clips"].iloc[0]])
    return markdown(["task", "measure", "the function", "rendered", "caption alone", "input", "n"], lines)


@writer
def caption_seeds() -> str:
    """In how many seeds a caption is right in every detail."""
    rows = read("captions").sort_values("value", ascending=False, kind="stable").to_dict("records")
    lines = [[f"{r['caption']}{' (`make demo`)' * r['demo']}", f"{r['value'] * r['clips']:.0f} of {r['clips']}"]
             for r in rows]  # fmt: skip
    return markdown(["caption", "seeds in which all is right"], lines)


DISTANCES = ("Fréchet distance", "kernel distance")


@writer
def lora_gain() -> str:
    """Distances to held-out recordings, with and without a LoRA."""
    lines = []
    table = read("lora").query("measure in @DISTANCES")
    for (recordings, sound), group in table.groupby(["recordings", "sound"], sort=False):
        own = group.set_index("measure")[["value", "low", "high"]]
        cells = (spread(*own.loc[measure], 1) for measure in DISTANCES)
        lines.append([recordings, sound, int(group["clips"].iloc[0]), *cells])
    return markdown(["recordings", "sounds", "n", *(f"aiSFX {measure}" for measure in DISTANCES)], lines)


@writer
def lora_forgetting() -> str:
    """The share of right details of old captions, with and without a LoRA."""
    sounds, lines = ("base", "LoRA", "LoRA minus base"), []
    table = read("lora").query("sound in @sounds and measure not in @DISTANCES")
    for (recordings, detail), group in table.groupby(["recordings", "measure"], sort=False):
        own = group.set_index("sound")[["value", "low", "high"]]
        cells = (spread(*own.loc[sound], 2) for sound in sounds)
        lines.append([recordings, detail, int(group["clips"].iloc[0]), *cells])
    return markdown(["LoRA of", "detail", "captions", *sounds], lines)


@writer
def lora_facts() -> str:
    """What the training of each measured LoRA took."""
    facts = {"minutes of a core": 1, "step": 0, "megabytes": 2, "held-out loss, base": 3, "held-out loss, LoRA": 3}
    wide = read("lora").pivot_table("value", "recordings", "measure")
    lines = [[name, *(f"{row[fact]:.{n}f}" for fact, n in facts.items())] for name, row in wide.iterrows()]
    return markdown(["recordings", *facts], lines)


@writer
def budget() -> str:
    """The error of every way back from a mel spectrogram to sound, on rendered clips."""
    return _budget(pd.DataFrame(card()["budget"]))


@writer
def budget_recordings() -> str:
    """The same on real recordings."""
    return _budget(read("04_budget_recordings"), ("log-mel L1", "STFT distance", "Fréchet distance"))


def _budget(table: pd.DataFrame, measures: tuple[str, ...] | None = None) -> str:
    decimals = {"log-mel L1": 3, "STFT distance": 2, "Fréchet distance": 1, "kernel distance": 2, "pitch error": 1}
    units = {"pitch error": "pitch error, cents", "Fréchet distance": "aiSFX Fréchet distance"}
    measures = measures or tuple(table["measure"].unique())
    lines = []
    for way in [way for way in WAYS if way in set(table["way"])]:
        line = [WAYS[way]]
        for measure in measures:
            found = table[(table["way"] == way) & (table["measure"] == measure)]
            cells = [spread(r["value"], r["low"], r["high"], decimals[measure]) for r in found.to_dict("records")]
            line.append(cells[0] if cells else "–")
        lines.append(line)
    return markdown(["from the mel spectrogram back to sound", *(units.get(m, m) for m in measures)], lines)


@writer
def conditioners() -> str:
    """Retrieval and zero-shot classification of the two conditioners, before details were learned and as shipped."""
    before = read("conditioners_before").set_index(["conditioner", "measure"])["value"]
    lines = []
    for name, found in card()["conditioners"].items():
        measures = [measure for measure in found if measure != "twins"]
        lines.append([f"`{name}`", "before", *(f"{before[name, m]:.3f}" for m in measures)])
        lines.append([f"`{name}`", "as shipped", *(f"{found[m]:.3f}" for m in measures)])
    return markdown(["conditioner", "details", *measures], lines)


@writer
def twins() -> str:
    """Share of sounds nearer to their caption than to one with one detail changed, before and as shipped."""
    before = read("conditioners_before").set_index(["conditioner", "measure"])
    details = ("number", "pitch", "pace", "loudness", "order", "other scene")
    lines = []
    for name, found in card()["conditioners"].items():
        states = {"before": before.loc[name].to_dict("index"), "as shipped": found["twins"]}
        lines += [
            [f"`{name}`", state, *(spread(of[d]["value"], of[d]["low"], of[d]["high"], 2) for d in details)]
            for state, of in states.items()
        ]
    return markdown(["conditioner", "details", *details], lines)


@writer
def caption_map() -> str:
    """The gain of the caption map beside FiLM, after 400 steps of training from the same weights."""
    found = read("caption_map").query("steps == 400 and timestep == 950")
    networks = list(dict.fromkeys(found["network"]))
    table = found.set_index(["detail", "network"])
    lines = [
        [detail, *(f"{table.loc[(detail, n), 'gap']:.3f}; {table.loc[(detail, n), 'share']:.2f}" for n in networks)]
        for detail in ("order", "pitch", "pace", "number", "other scene")
    ]
    return markdown(["detail", *networks], lines)


@writer
def few_steps() -> str:
    """The quality of the shipped model by sampler and number of steps."""
    errors = read("bench_accuracy").dropna(subset="sampler").set_index("sampler")["latent_error"]
    return markdown(
        ["sampler and steps", "aiSFX Fréchet distance", "class recall", "distance from 1000 steps of DDIM"],
        [
            [
                r["sampler"].replace("dpmpp", "DPM-Solver++,").replace("ddim", "DDIM,"),
                spread(r["frechet"], r["low"], r["high"], 1),
                spread(r["recall"], r["recall_low"], r["recall_high"], 3),
                f"{errors[r['sampler']]:.1%}",
            ]
            for r in read("bench_few_steps").to_dict("records")
        ],
    )


# --- speed ---


@writer
def speed() -> str:
    """Our seconds beside those of other implementations, on two machines."""
    table, other = read("bench"), read("bench_without_bf16").set_index(["work", "peer"])["ratio"]
    ours = table[table["peer"].isna() & table["where"].notna()].set_index("work")
    lines = []
    for work, row in ours.iterrows():
        peers = table[(table["work"] == work) & table["peer"].notna()]
        for peer in peers.to_dict("records") or [{"peer": "–", "ratio": None, "goal": row["goal"], "seconds": None}]:
            alone = peer["seconds"] is None
            goal = "–" if pd.isna(peer["goal"]) else f"≤ {peer['goal']:g} s" if alone else f"≥ {peer['goal']:g}"
            ratio = "–" if alone else f"{peer['ratio']:.2f}"
            slow = other.get((work, peer["peer"]))
            lines.append(
                [
                    work,
                    f"{row['seconds']:.2f} s",
                    peer["peer"],
                    ratio,
                    goal,
                    "–" if slow is None or pd.isna(slow) else f"{slow:.2f}",
                ]
            )
    return markdown(["work", "ours", "other implementation", "times as fast", "goal", "without fast bfloat16"], lines)


@writer
def goals() -> str:
    """Ratios of one run beside their goals, each with its command."""
    rows = read("bench_goals").astype(object).where(lambda table: table.notna(), None).to_dict("records")
    return markdown(
        ["work", "ours", "beside it", "times as fast", "goal", "command"],
        [
            [
                r["work"],
                f"{r['seconds']:.3g} s",
                f"{r['other']}: {r['other_seconds']:.3g} s",
                f"{r['ratio']:.2f}",
                f"≥ {r['goal']:g}" if r["goal"] else "–",
                f"`{r['command']}`",
            ]
            for r in rows
        ],
    )


@writer
def deep_cache() -> str:
    """What DeepCache changes in the sounds of `tiny`, beside fewer steps."""
    return markdown(
        ["sampling", "relative error of the latent", "log-mel L1"],
        [
            [r["way"], f"{r['latent_error']:.1%}", f"{r['mel_l1']:.3f}"]
            for r in read("bench_deep_cache").to_dict("records")
        ],
    )


@writer
def quality() -> str:
    """Right details and Fréchet distance of every way of sampling, beside its cost."""
    lines = [
        [r["way"], f"{r['evaluations']:g}", f"{r['seconds']:.2f}", f"{r['memory_gb']:.2f}",
         spread(r["details"], r["low"], r["high"], 2), spread(r["frechet"], r["frechet_low"], r["frechet_high"], 1)]
        for r in read("bench_quality").sort_values("seconds").to_dict("records")
    ]  # fmt: skip
    header = ["way of sampling", "evaluations of the U-Net", "seconds", "GB", "details right", "aiSFX Fréchet distance"]
    return markdown(header, lines)


@writer
def precision() -> str:
    """Changes of the output by `optimize_for_inference`."""
    rows = read("bench_accuracy").dropna(subset="way").to_dict("records")
    return markdown(
        ["arithmetic", "relative error of the U-Net", "at the worst timestep", "log-mel L1 of VAE and vocoder"],
        [
            [
                r["way"],
                f"{r['unet_error']:g}",
                f"{r['unet_error_worst']:g}",
                f"{r['mel_l1']:.4f} ({r['mel_l1_change']:+.2%})",
            ]
            for r in rows
        ],
    )


@writer
def bf16_gain() -> str:
    """Speed of this machine's products in bfloat16 as a multiple of that in float32."""
    machine = read("bench").iloc[0]
    return f"{machine['bf16_gflops'] / machine['fp32_gflops']:.1f}"


# --- the experiment ---

ARM_ROWS = {  # conditioner, training
    "A": ("LAION-style", "AudioLDM's as published"),
    "B": ("LAION-style", "A corrected and tuned"),
    "C": ("MS-CLAP-style", "as B"),
    "D": ("MS-CLAP-style", "our recipe"),
    "E": ("LAION-style", "our recipe"),
    "F": ("MS-CLAP-style, trained on details", "our recipe"),
    "G": ("LAION-style, trained on details", "our recipe"),
}
MEASURES = {"error_250": ("noise error", 4), "frechet": ("Fréchet distance", 1), "recall": ("class recall", 3)}
NOT_RUN = "\n\nNot run yet.\n\n"
LENGTHS = (STORED["iterations"], 4 * STORED["iterations"])


@cache
def runs() -> pd.DataFrame:
    return collect(ROOT / "figures" / "data" / "experiment")


@writer
def arms() -> str:
    """Every arm at two numbers of iterations: mean and range over seeds, all of a column with equal cards."""
    header, columns = ["arm", "conditioner", "training"], []
    for n, rows in arms_compared(runs(), LENGTHS[0]).groupby("iterations"):
        (precision,) = rows["precision"].unique()
        if different := unequal(rows, but=("lr_schedule",)):
            raise ValueError(f"the arms after {n} iterations do not compare, they differ in {'; '.join(different)}")
        header += [f"{name}, {n:,} iterations ({precision})" for name, _ in MEASURES.values()]
        columns += [(rows, column, decimals) for column, (_, decimals) in MEASURES.items()]
    real = read("06_bounds").set_index("sound").loc["other real clips"]
    lines = [[label, *ARM_ROWS[label], *(_seeds(label, *of) for of in columns)] for label in "ABCDE"]
    lines.append(["other real clips", "", "", *2 * ["–", f"{real['frechet']:.1f}", f"{real['recall']:.3f}"]])
    return markdown(header, lines)


def _seeds(label: str, rows: pd.DataFrame, column: str, decimals: int) -> str:
    values = rows.loc[rows["label"] == label, column]
    if values.empty:
        return "not run yet"
    if label == "A" and column == "error_250":  # at another latent scale
        return "–"
    if len(values) == 1:
        return f"{values.iloc[0]:.{decimals}f}, one seed"
    return spread(values.mean(), values.min(), values.max(), decimals)


@writer
def branches() -> str:
    """Arms B to G by length, from branches of one trunk a seed: all measures, with the details that are right."""
    table, decimals = branches_compared(runs()), {name: d for name, (_, d) in MEASURES.items()}
    lines = [
        [label, *ARM_ROWS[label], f"{n:,}", len(rows)]
        + [_seeds(label, rows, column, decimals.get(column, 2)) for column in (*MEASURES, *DETAILS)]
        for (label, n), rows in table.groupby(["label", "iterations"])
    ]
    header = [
        "arm",
        "conditioner",
        "training",
        "iterations",
        "seeds",
        *(name for name, _ in MEASURES.values()),
        *DETAILS,
    ]
    return markdown(header, lines) if lines else NOT_RUN


@writer
def effects() -> str:
    """What the conditioner changes in every measure, seed by seed, at every length of the branches."""
    table, decimals, lines = branch_effects(branches_compared(runs())), dict.fromkeys(DETAILS, 2), []
    decimals |= {name: d + (name == "error_250") for name, (_, d) in MEASURES.items()}
    for (difference, n), group in table.groupby(["difference", "iterations"], sort=False):
        cells = {}
        for r in group.to_dict("records"):
            low, value, high = (
                f"{r[k]:+.{decimals[r['measure']]}f}".replace("-", "−") for k in ("low", "mean", "high")
            )
            cells[r["measure"]] = value if r["seeds"] == 1 else f"{value} ({low} to {high})"
        lines.append([difference.replace("-", "minus"), f"{n:,}", group["seeds"].iloc[0], *cells.values()])
    header = ["arms", "iterations", "seeds", *(name for name, _ in MEASURES.values()), *DETAILS]
    return markdown(header, lines) if lines else NOT_RUN


@writer
def doublings() -> str:
    """What each doubling of the baseline's iterations gained, and the factor of the recipe, also in seconds."""
    lines, cost = [], read("06_seconds").set_index("label")["times_the_first"]["D"]  # of an iteration, E's too
    for n, group in plateau(runs()).groupby("iterations"):
        cells = [
            f"{r['gained']:+.0%}; {'at least ' * r['at least']}{r['factor']:.1f} ({r['factor'] / cost:.1f})"
            for r in group.to_dict("records")
        ]
        lines.append([f"{n // 2:,} to {n:,}", group["seeds"].iloc[0], *cells])
    return markdown(["iterations of B", "seeds", *(name for name, _ in MEASURES.values())], lines) if lines else NOT_RUN


@writer
def encoder() -> str:
    """Effect of the conditioner alone, seed by seed, between runs with equal cards."""
    lines = []
    for r in encoder_effects(ended(runs()), LENGTHS[0]).to_dict("records"):
        name, d = MEASURES[r["measure"]]
        d += r["measure"] == "error_250"
        change, fewer = f"{r['mean']:+.{d}f}", f"{r['times fewer']:.2f}"
        if r["seeds"] > 1:
            change += f" ({r['low']:+.{d}f} to {r['high']:+.{d}f})"
            fewer += f" ({r['at least']:.2f}–{r['at most']:.2f})"
        lines.append([r["difference"].replace("-", "minus"), f"{r['iterations']:,}", r["precision"], r["seeds"], name,
                      change.replace("-", "−"), fewer + " *" * (not r["one law"])])  # fmt: skip
    return markdown(["arms", "iterations", "precision", "seeds", "measure", "difference, 95 % interval",
                     "times fewer iterations"], lines)  # fmt: skip


@writer
def reached() -> str:
    """Factor by which an arm needs fewer iterations than a baseline, within one precision."""
    table, lines = targets_reached(ended(runs()), LENGTHS[0]), []
    for (base, its, arm, precision), group in table.groupby(["baseline", "its iterations", "arm", "precision"],
                                                            sort=False):  # fmt: skip
        cells = {
            r["measure"]: f"at least {r['factor']:.0f}" if r["at least"]
            else f"{r['factor']:.1f}" if r["low"] == r["high"]
            else spread(r["factor"], r["low"], r["high"], 1)
            for r in group.to_dict("records")
        }  # fmt: skip
        lines.append([base, f"{its:,}", arm, precision, int(group["seeds"].iloc[0]),
                      *(cells.get(measure, "–") for measure in MEASURES)])  # fmt: skip
    names = (name for name, _ in MEASURES.values())
    return markdown(["baseline", "its iterations", "arm", "precision", "seeds", *names], lines)


@writer
def iteration_cost() -> str:
    """The seconds of an iteration of our recipe, in those of a baseline's."""
    times = read("06_seconds").set_index("label")["times_the_first"]
    return f"{times['D']:.2f} times the seconds of a baseline's, {times['D, wide']:.2f} times with twice the channels"


def _steps(part: str) -> dict[str, int]:
    """Return the steps of the runs of a part of the plan, by label; branches share the trunk of the longest."""

    def arm(run):
        return run.label, run.seed

    steps = {}
    for (label, _), runs in groupby(sorted((r for r in plan() if r.part == part), key=arm), key=arm):
        lengths = [run.iterations for run in runs]
        trunk = stable_steps(max(lengths))
        shared = trunk + sum(n - stable_steps(n) for n in lengths)
        steps[label] = steps.get(label, 0) + (shared if label.endswith(BRANCH) else sum(lengths))
    return steps


@writer
def branch_hours() -> str:
    """The hours of the branches, from the seconds of arms C and D after 6,000 iterations and of evaluating sounds."""
    stored = runs()[(runs()["iterations"] == LENGTHS[1]) & (runs()["precision"] == "bfloat16")]
    each = stored.groupby("label")["seconds"].min() / LENGTHS[1]  # seconds of an iteration
    seconds = sum(steps * each["C" if label[0] in "BC" else "D"] for label, steps in _steps("branches").items())
    evaluating = stored["judging_seconds"].mean() * sum(run.part == "branches" for run in plan())
    return (f"about {(seconds + evaluating) / 3600:.0f} hours of one core with fast bfloat16, reckoned from the "
            "measured seconds of C and D, without training the conditioners and the detail classifier")  # fmt: skip


@writer
def paper_hours() -> str:
    """The GPU hours of the whole plan at the published size, from the counted cost of a step."""
    steps = sum(sum(_steps(part).values()) for part in {run.part for run in plan()})
    batch = preset("paper").training["ldm"].batch_size
    hours = steps / 1e5 * read("training_costs_unet").set_index("batch").loc[batch, "GPU hours"]
    return f"{steps:,} steps of batch {batch}, {hours:.1f} GPU hours"


@writer
def claims() -> str:
    """The claims the project was started from and ours: verdict, finding and evidence."""
    return markdown(["claim", "verdict", "found", "evidence"], (
        [c["words"] + (f" Refuted if {c['refuted_if']}." if "refuted_if" in c else ""), c["verdict"], c["found"],
         "; ".join(f"{of['what']}: {of['is']}" for of in c.get("evidence", ()))]
        for c in read_ledger(ROOT / "figures" / "claims.yaml")
    ))  # fmt: skip


# --- training at scale, and something to hear ---


def _stored(name: str) -> str:
    table = pd.read_csv(ROOT / "figures" / "data" / f"{name}.csv", dtype=str)
    return markdown(table.columns, table.to_numpy())


WRITERS |= {
    name: partial(_stored, table)
    for name, table in {
        "scale_data": "training_costs_data",
        "scale_networks": "training_costs_networks",
        "scale_unet": "training_costs_unet",
        "memory": "memory",
    }.items()
}


# --- on a GPU ---


GPU_SECTIONS = (
    "facts", "against_cpu", "resumed", "unet", "vae_and_vocoder", "sampling", "half_precision", "what_helps",
    "notebooks", "training",
)  # fmt: skip


def measured_on_a_gpu() -> dict:
    """Return what `make gpu` wrote, copied to docs/gpu.json; without the file nothing was measured."""
    path = ROOT / "docs" / "gpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@writer
def gpu_machine() -> str:
    """The machine on which it was measured."""
    found = measured_on_a_gpu()
    if not found:
        return "**Not measured:** no run of it on a GPU is stored."
    return f"Measured on one {found['machine']}, torch {found['torch']}, {found['cores']} CPU cores."


def gpu_section(name: str) -> str:
    """Return the table of a section of `make gpu`, or that it was not measured, and why."""
    result = measured_on_a_gpu().get("sections", {}).get(name, {})
    if not result.get("rows"):
        return f"Not measured: {result['failed']}." if "failed" in result else "Not measured."
    header = list(dict.fromkeys(key for row in result["rows"] for key in row))
    return markdown(header, [["–" if row.get(k) is None else row[k] for k in header] for row in result["rows"]])


WRITERS |= {f"gpu_{name}": partial(gpu_section, name) for name in GPU_SECTIONS}


def _sounds() -> list[dict]:
    return pd.read_csv(ROOT / "docs" / "sounds" / "sounds.csv").to_dict("records")


def _with_sounds(cell: str) -> str:
    """Return the table of the sounds; cell: how one is linked, with {0} for its name."""
    lines = [[r["caption"], cell.format(r["name"]), f"**{r['verdict']}**: {r['reason']}"] for r in _sounds()]
    return markdown(["caption", "sound", "does it follow the caption?"], lines)


PLAYER = '<audio controls preload="none" src="sounds/{0}.mp3"></audio> [MP3](sounds/{0}.mp3)'
WRITERS |= {"listen": partial(_with_sounds, "[listen](docs/sounds/{0}.mp3)"), "players": partial(_with_sounds, PLAYER)}


def stale() -> list[tuple[str, str]]:
    """Return (document, line) of every line that differs from what is written here."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        lines = zip_longest(text.splitlines(), render(text).splitlines(), fillvalue="")
        found += [(path.relative_to(ROOT).as_posix(), old) for old, new in lines if old != new]
    return found


def main() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        written = render(text)
        if written != text:
            path.write_text(written, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
