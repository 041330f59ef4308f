"""The tables of notebook 06: from the tables of finished runs, or measured with the models that runs left behind.

`iterations` is the length of the main runs; the plan has others at tenths, thirds and four times of it (arms.plan).
Notebook: 06
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from refined_ldm.evaluation.adherence import evaluate_copied, evaluate_rendered, rendered_clips
from refined_ldm.evaluation.metrics import frechet_distance, share
from refined_ldm.experiment.arms import ABLATIONS, ARMS, BRANCH, Run, plan
from refined_ldm.experiment.confounds import ten_ways
from refined_ldm.experiment.probes import caption_distances, order_correct, probe_conditioner
from refined_ldm.experiment.protocol import Experiment
from refined_ldm.experiment.runs import iteration_seconds
from refined_ldm.experiment.statistics import interval, iterations_to, paired, same_machine, times_fewer, unequal

MEASURES = {"error_250": "noise error, t ≥ 250", "frechet": "Fréchet distance, aiSFX", "recall": "class recall"}
DETAILS = ("number", "pitch", "pace", "order")  # shares of captions in which the detail is right
GUIDANCES = (1.5, 2.0, 3.0, 4.0, 5.0)  # the same for every run that is compared
ORDERS = {  # name: (arm, share of the iterations that it was trained for)
    "pooled vector (D)": ("D", 3), "tokens beside it": ("tokens", 3), "the same, three times as long": ("tokens", 1),
    "oracle": ("oracle", 3),
}  # fmt: skip


def ended(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the arms themselves whose sounds were evaluated: no ablations, controls, rates and branches."""
    parts = ["arms", "target", "plateau", "wide", "linear"]
    return runs[runs["part"].isin(parts) & runs["frechet"].notna()]


def arms_compared(runs: pd.DataFrame, iterations: int) -> pd.DataFrame:
    """The runs of arms A to E after `iterations` and four times as many, of each length on the machine of most arms."""
    arms = runs[runs["label"].isin(list("ABCDE")) & runs["iterations"].isin([iterations, 4 * iterations])]
    return pd.concat([next(same_machine(rows))[1] for _, rows in arms.groupby("iterations")])


def branches(runs: pd.DataFrame) -> pd.DataFrame:
    """The branches of trunks, whatever they are compared with."""
    return runs[runs["label"].str.endswith(BRANCH)]


def branches_compared(runs: pd.DataFrame) -> pd.DataFrame:
    """The branches under the names of their arms: lengths and seeds that D, E, F and G all have, and B and C at these.

    Raises ValueError if their cards differ in more than their lengths.
    """
    own = branches(runs)
    own = own.assign(label=own["label"].str.removesuffix(BRANCH))
    complete = own.groupby(["iterations", "seed"])["label"].transform(lambda labels: set("DEFG") <= set(labels))
    own = own[complete.astype(bool)]
    if different := unequal(own, but=("iterations",)):
        raise ValueError(f"these branches do not compare, they differ in {'; '.join(different)}")
    return own.sort_values(["label", "iterations", "seed"])


def branch_effects(branches: pd.DataFrame) -> pd.DataFrame:
    """Differences of `branches_compared`, seed by seed, in MEASURES and DETAILS, with 95 % intervals."""
    rows = []
    for one, other in ("CB", "DE", "FD", "GE"):
        for at, group in branches[branches["label"].isin([one, other])].groupby("iterations"):
            if set(group["label"]) == {one, other}:
                for column in (*MEASURES, *DETAILS):
                    found = paired(group, column, {"label": one}, {"label": other})
                    row = {"difference": f"{one} - {other}", "iterations": at, "measure": column, "seeds": len(found)}
                    rows.append(row | dict(zip(("mean", "low", "high"), interval(found), strict=True)))
    return pd.DataFrame(rows, columns=["difference", "iterations", "measure", "seeds", "mean", "low", "high"])


def plateau(runs: pd.DataFrame) -> pd.DataFrame:
    """Branches of B, whose lengths double, beside E, the same with the recipe, by measure.

    "gained": what the last doubling of B improved, as a share; "factor": by how much B's iterations can be divided
    until E is only as good; "at least": whether E's shortest run was better already. Means over common seeds.
    """
    rows = []
    b, e = (runs[runs["label"] == f"{arm}{BRANCH}"] for arm in "BE")
    for n in sorted(b["iterations"].unique()) if len(e) else ():
        half, whole = b[b["iterations"] == n // 2], b[b["iterations"] == n]
        seeds = set(half["seed"]) & set(whole["seed"])
        if not seeds or unequal(pd.concat([b, e]), but=("iterations",)):
            continue
        for column in MEASURES:
            sign = -1 if column == "recall" else 1  # more recall is better
            before, after = (sign * part.loc[part["seed"].isin(seeds), column].mean() for part in (half, whole))
            at = iterations_to(e.assign(measure=sign * e[column]), "measure", after)
            rows.append({"iterations": n, "measure": column, "seeds": len(seeds), "value": sign * after,
                         "gained": (before - after) / abs(before), "factor": n / at,
                         "at least": at <= e["iterations"].min()})  # fmt: skip
    return pd.DataFrame(rows, columns=["iterations", "measure", "seeds", "value", "gained", "factor", "at least"])


def error_curves(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """Noise errors along training: columns step, seconds, error, error_250, label, seed, iterations."""
    tables = []
    for run in runs.to_dict("records"):
        table = pd.read_csv(folder / f"{run['name']}.csv")
        late = table[table["t"] >= 250].groupby("step")["error"].mean()
        table = table.groupby("step").agg(seconds=("seconds", "max"), error=("error", "mean")).assign(error_250=late)
        tables.append(table.reset_index().assign(label=run["label"], seed=run["seed"], iterations=run["iterations"]))
    return pd.concat(tables)


def last_errors(folder: Path, runs: dict[str, str]) -> pd.DataFrame:
    """{label: name of a run} -> its last noise errors by timestep: columns step, seconds, t, error, label."""
    tables = {label: folder / f"{name}.csv" for label, name in runs.items()}
    tables = {label: pd.read_csv(path) for label, path in tables.items() if path.is_file()}
    return pd.concat([t[t["step"] == t["step"].max()].assign(label=label) for label, t in tables.items()])


def summary(runs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """One row for each label and length: mean and 95 % interval over seeds of some columns."""
    rows = []
    for (label, iterations), group in runs.groupby(["label", "iterations"]):
        row = {"label": label, "iterations": iterations, "seeds": len(group)}
        for column in columns:
            mean, low, high = interval(group[column].dropna()) if group[column].notna().any() else (np.nan,) * 3
            row |= {column: mean, f"{column}_low": low, f"{column}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def targets_reached(runs: pd.DataFrame, iterations: int) -> pd.DataFrame:
    """After how many iterations an arm has what a baseline has at its end, by measure; the range is over its seeds.

    Only runs of one precision and one kind of machine are compared, and only where the arm has a shorter run.
    """
    long, rows = 4 * iterations, []
    pairs = (("A", iterations, "D"), ("A", long, "B"), ("B", iterations, "D"), ("B", long, "E"), ("B", long, "D"),
             ("B, wide", long, "D, wide"), ("B, wide", 2 * long, "D, wide"))  # fmt: skip
    for label, n, arm in pairs:
        for precision, group in same_machine(runs[runs["iterations"] > 0]):
            goals = group[(group["label"] == label) & (group["iterations"] == n)]
            own = group[group["label"] == arm]
            if goals.empty or own.empty or own["iterations"].min() >= n:
                continue
            for column in MEASURES:
                if label == "A" and column == "error_250":  # another latent scale: not compared
                    continue
                sign = -1 if column == "recall" else 1  # more recall is better
                falling = own.assign(measure=sign * own[column])
                at = np.array([iterations_to(falling, "measure", sign * goal) for goal in goals[column]])
                row = {"baseline": label, "its iterations": n, "arm": arm, "measure": column, "precision": precision,
                       "goal": goals[column].mean()}  # fmt: skip
                rows.append(row | {"reached after": at.mean(), "factor": n / at.mean(), "low": n / at.max(),
                                   "high": n / at.min(), "seeds": len(goals),
                                   "at least": bool((at <= own["iterations"].min()).all())})  # fmt: skip
    return pd.DataFrame(rows)


def encoder_effects(runs: pd.DataFrame, iterations: int) -> pd.DataFrame:
    """C minus B and D minus E, seed by seed, with 95 % intervals, and the same as a factor in iterations.

    Only runs with equal cards are compared. "one law": whether both lengths that the factor rests on have them too.
    """
    short, long, rows = iterations // 10, 4 * iterations, []
    for one, other, at, between in (("C", "B", iterations, (iterations, long)), ("C", "B", long, (iterations, long)),
                                    ("D", "E", short, (short, iterations)), ("D", "E", iterations, (short, iterations)),
                                    ("D", "E", long, (iterations, long))):  # fmt: skip
        for precision, group in same_machine(runs[runs["label"].isin([one, other]) & (runs["iterations"] == at)]):
            ends = runs[(runs["label"] == one) & runs["iterations"].isin(between) & (runs["iterations"] != at)]
            compared = pd.concat([group, ends])
            if set(group["label"]) != {one, other} or unequal(group) or ends.empty:
                continue
            for column in MEASURES:
                fewer = times_fewer(compared, column, one, other, at, between, rises=column == "recall")
                arms_at = [{"label": label, "iterations": at} for label in (one, other)]
                row = {"difference": f"{one} - {other}", "iterations": at, "measure": column, "seeds": len(fewer),
                       "precision": precision}  # fmt: skip
                row |= zip(("mean", "low", "high"), interval(paired(compared, column, *arms_at)), strict=True)
                names = ("times fewer", "at least", "at most")
                row |= zip(names, np.exp(interval(np.log(fewer))), strict=True)
                own = compared[compared["label"] == one]
                rows.append(row | {"one law": not unequal(own, but=("iterations",))})
    return pd.DataFrame(rows)


def beside_d(table: pd.DataFrame, part: str, at: int) -> pd.DataFrame:
    """The runs of a part of the plan, the nearest to real sounds first, below arm D after as many iterations."""
    whole = (table["label"] == "D") & (table["iterations"] == at) & (table["seed"] == 0)
    others = (table["part"] == part) & (table["iterations"] == at)
    return pd.concat([table[whole], table[others].sort_values("frechet")])


def ablations(table: pd.DataFrame, runs: pd.DataFrame, at: int) -> pd.DataFrame:
    """`beside_d` of the ablations, with the iterations after which D itself is as far in two measures."""
    ablated = beside_d(table, "ablations", at)
    whole = runs[(runs["label"] == "D") & runs["precision"].isin(ablated["precision"])]
    for column in ("error_250", "frechet"):
        ablated[f"D after, by {column}"] = [iterations_to(whole, column, value) for value in ablated[column]]
    return ablated


def reference_scores(experiment: Experiment) -> list[dict]:
    """Scores of other real clips (the real_vs_real baseline), and of the clips through VAE and vocoder (ceiling)."""
    (probed, real), clips = experiment.probed(), experiment.test
    results = {"other real clips": evaluate_rendered(probed, rendered_clips(len(clips), seed=7)),
               "the clips, through VAE and vocoder": evaluate_copied(probed, experiment.base, clips)}  # fmt: skip
    return [{"sound": name, "clips": len(result.rows), "recall": result.recall.mean(),
             "frechet": frechet_distance(result.embeddings, real.embeddings, min(64, len(clips) - 1))}
            for name, result in results.items()]  # fmt: skip


def guidance_sweep(experiment: Experiment, iterations: int) -> list[dict]:
    """Measures of trained runs (seed 0) at every guidance -> rows. Raises FileNotFoundError if none was trained."""
    long, rows = 4 * iterations, []
    lengths = {"B": [long], "B, wide": [long], "D": [long // 10, iterations], "D, wide": [long // 10],
               "E": [iterations]}  # fmt: skip
    for run in plan(iterations, 1):
        if run.iterations not in lengths.get(run.label, ()):
            continue
        try:
            model = experiment.trained(run)
        except FileNotFoundError:  # not trained here
            continue
        rows += [{"label": run.label, "iterations": run.iterations, "guidance": guidance,
                  **experiment.quality(model, guidance)[0]} for guidance in GUIDANCES]  # fmt: skip
    if not rows:
        raise FileNotFoundError(f"none of the runs of this sweep was trained in {experiment.folder}")
    return rows


def seconds_per_iteration(experiment: Experiment) -> list[dict]:
    """Seconds of an iteration of baseline, recipe and two ablations, on one core: rows of `runs.iteration_seconds`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = {"B": ARMS["B"], "D": ARMS["D"]} | {label: replace(ARMS["D"], **ABLATIONS[label])
                                                for label in ("D, AdamW", "D, no linear denoiser")}  # fmt: skip
    wide = {f"{label}, wide": replace(ARMS[label], unet="preset") for label in "BD"}
    try:
        return iteration_seconds(experiment, small) + iteration_seconds(experiment, wide)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def loss_confounds(experiment: Experiment, iterations: int) -> list[dict]:
    """`confounds.ten_ways` for arm C, seed 0. Raises FileNotFoundError if it was not trained here."""
    model = experiment.trained(Run("C", ARMS["C"], iterations, 0, "arms"))
    examples = experiment.examples(ARMS["C"], model.clap)
    seen = [examples[i] for i in range(min(64, len(examples)))]
    waveform = torch.stack([item["waveform"] for item in experiment.held_out]).to(experiment.device)
    text = model.clap.embed_text([item["caption"] for item in experiment.held_out])
    scales = [experiment.scale_of(ARMS["A"], seed) for seed in range(20)]
    return ten_ways(model, experiment.held_out_latents(), text, torch.stack([item["latent"] for item in seen]),
                    torch.stack([item["embeddings"][0] for item in seen]), model.clap.embed_audio(waveform, 16_000),
                    scales)  # fmt: skip


def conditioner_probes(experiment: Experiment) -> list[dict]:
    """Probes and distances between captions of both conditioners and of a random one -> rows."""
    rows = []
    for name, kind in (("LAION-style", "laion"), ("MS-CLAP-style", "ms"), ("random, frozen", "random")):
        clap = experiment.conditioner(replace(ARMS["B"], conditioner=kind))
        rows += [{"conditioner": name, **row} for row in probe_conditioner(clap)]
        rows += [{"conditioner": name, "probe": f"distance of captions: {what}", "value": value, "chance": np.nan}
                 for what, value in caption_distances(clap).items()]  # fmt: skip
    return rows


def order_scores(experiment: Experiment, iterations: int, count: int = 200) -> list[dict]:
    """For captions "A then B": the share of sounds in which A is stronger first, for the clips and several arms."""
    probed, _ = experiment.probed()
    items = [item for item in rendered_clips(count, kinds=("sequence",)) if len(item["labels"]) == 2]
    captions, sounds = [item["caption"] for item in items], {}
    sounds["the clips themselves"] = torch.stack([item["waveform"] for item in items])
    for label, (arm, part) in ORDERS.items():
        try:
            model = experiment.trained(Run(arm, ARMS[arm], iterations // part, 0, "controls"))
        except FileNotFoundError:  # not trained here
            continue
        if arm == "oracle":
            model.clap.learn(items)
        made = [model.generate(captions[k : k + 16], steps=16).cpu() for k in range(0, len(items), 16)]
        sounds[label] = torch.cat(made)
    return [{"label": label, **share(order_correct(probed, waves, items))} for label, waves in sounds.items()]


def mels_along_training(
    experiment: Experiment, iterations: int, caption: str = "a dog barks twice"
) -> dict[str, np.ndarray]:
    """{run: log-mel (T, F) of one caption and one seed}, for the runs of C, B and D that were trained here."""
    lengths = {"C": (iterations // 5, iterations), "B": (4 * iterations,),
               "D": (0, iterations // 10, iterations // 3, iterations)}  # fmt: skip
    runs, mels = {(run.label, run.iterations): run for run in plan(iterations, 1)}, {}
    for label, n in [(label, n) for label, lengths_of in lengths.items() for n in lengths_of]:
        run = runs.get((label, n))
        if run and (experiment.folder / "runs" / run.name / "ldm.safetensors").is_file():
            sound = experiment.trained(run).generate([caption], steps=25, seed=0)
            mels[f"{label}, {n} iterations"] = experiment.base.mel(sound)[0, 0].cpu().numpy().astype(np.float16)
    return mels
