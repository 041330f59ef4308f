import numpy as np
import pytest

from refined_ldm.evaluation.metrics import found_at_k, frechet_distance, recall_at_k, zero_shot
from refined_ldm.evaluation.scores import METRICS, FolderEmbeddings, compute_scores, principal_components


def normal(n, d, seed, mean=0.0):
    return mean + np.random.default_rng(seed).standard_normal((n, d))


def embedded(rows, classes=None):
    return FolderEmbeddings([f"clip {i}" for i in range(len(rows))], [row[None] for row in rows], classes)


def compute(generated, reference, **more):
    settings = dict(captioned=[], text=None, pca=None, seed=0, on_metric=lambda: None) | more
    scores, left_out = compute_scores(generated, reference, **settings)
    return {score.metric: score for score in scores}, left_out


@pytest.mark.parametrize("n, d, k", [(40, 12, 5), (10, 30, 5)])
def test_principal_components_are_those_of_frechet_distance(n, d, k):
    a, b = normal(20, d, 0), normal(n, d, 1) * np.arange(1, d + 1)
    components = principal_components(b, k)
    assert frechet_distance(a @ components, b @ components) == pytest.approx(frechet_distance(a, b, pca=k), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_found_at_k_is_recall_clip_by_clip_also_where_an_encoder_has_collapsed(k):
    text = normal(12, 4, 0)
    for audio in (normal(12, 4, 1), text + 0.5 * normal(12, 4, 2), np.ones((12, 4)), np.repeat(normal(4, 4, 3), 3, 0)):
        found = found_at_k(zero_shot(text, audio).scores, k)
        assert found.shape == (12,) and found.mean() == pytest.approx(recall_at_k(text, audio, k))


def test_intervals_contain_the_distance_of_other_clips_and_baselines_that_of_other_real_ones():
    reference = embedded(normal(120, 6, 0))
    inside = 0
    for seed in range(8):
        scores, _ = compute(embedded(normal(60, 6, 100 + seed, mean=0.5)), reference)
        other = frechet_distance(normal(60, 6, 200 + seed, mean=0.5), reference.stacked())
        inside += scores["frechet_distance"].low <= other <= scores["frechet_distance"].high
        assert scores["frechet_distance"].baseline < scores["frechet_distance"].same_size
        assert abs(scores["kernel_polynomial"].baseline) < scores["kernel_polynomial"].low
    assert inside >= 5


def test_a_perfect_model_scores_the_baseline_at_its_size_and_not_elsewhere():
    """100 clips of the same sort as 400 real ones: nearer to all of these than real clips are to 200 others."""
    scores, _ = compute(embedded(normal(100, 30, 0)), embedded(normal(400, 30, 1)), pca=10)
    score = scores["frechet_distance"]
    assert score.same_size == pytest.approx(score.baseline, rel=0.2) and score.value < 0.9 * score.baseline
    assert score.baseline_of == "100 real clips against 200 others"


def test_windows_are_drawn_clip_by_clip_and_averaged_for_kernel_distances():
    windows = FolderEmbeddings(["a", "b", "c", "d"], [normal(k, 3, k) for k in (2, 3, 4, 5)], None)
    scores, _ = compute(windows, embedded(normal(20, 3, 9)))
    assert scores["frechet_distance"].clips == 4
    means = embedded(np.stack([rows.mean(0) for rows in windows.rows]))
    assert scores["kernel_gaussian"] == compute(means, embedded(normal(20, 3, 9)))[0]["kernel_gaussian"]
    assert scores["frechet_distance"] != compute(means, embedded(normal(20, 3, 9)))[0]["frechet_distance"]


def test_every_metric_is_computed_or_left_out_with_its_reason():
    classes = np.random.default_rng(0).dirichlet(np.ones(5), 24)
    generated, reference = embedded(normal(24, 6, 0), classes), embedded(normal(24, 6, 1), classes[::-1])
    scores, left_out = compute(generated, reference, captioned=list(range(24)), text=normal(24, 6, 2))
    assert list(scores) == list(METRICS) and not left_out
    assert scores["inception_score"].baseline == pytest.approx(scores["inception_score"].value)  # the same clips
    assert scores["recall_at_10"].baseline == pytest.approx(10 / 24)
    assert all(s.low <= s.value <= s.high for s in scores.values())
    scores, left_out = compute(embedded(normal(24, 6, 0)), embedded(np.ones((24, 6))))
    assert list(scores) == list(METRICS)[:3] and left_out.keys() == set(list(METRICS)[3:])
    assert "no kernel width" in left_out["kernel_gaussian"]
