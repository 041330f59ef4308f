import importlib.util

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from refined_ldm.evaluation.metrics import (
    LinearProbe,
    bootstrap_interval,
    clap_score,
    class_recall,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    kl_divergence,
    label_matrix,
    real_vs_real,
    recall_at_k,
    zero_shot,
)


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * np.random.default_rng(seed).standard_normal((n, d))


def probabilities(n, k, seed):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.3), size=n)


def blobs(n, k, d=16, seed=0, noise=0.5):
    """n points around k fixed corners -> (n, d) points, (n,) index of the corner."""
    labels = np.arange(n) % k
    return 4 * np.eye(d)[labels] + normal(n, d, seed, std=noise), labels


def audioldm_eval(name):
    """A module of audioldm_eval's metrics, without what the package asks for at its top."""
    found = importlib.util.find_spec("audioldm_eval")
    if found is None:
        pytest.skip("audioldm_eval is not here: pip install --no-deps audioldm_eval==0.0.3")
    path = f"{found.submodule_search_locations[0]}/metrics/{name}.py"
    spec = importlib.util.spec_from_file_location(f"audioldm_eval_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(n, d, seed):
    """Like the 2048 numbers of PANNs: correlated, none below zero, half of them zero -> float32 tensor."""
    return torch.from_numpy(np.maximum(normal(n, d, seed) @ normal(d, d, 99), 0)).float()


# Frechet distance


def test_frechet_distance_equals_its_formula_with_a_matrix_square_root():
    a, b = normal(300, 12, 0) @ normal(12, 12, 1), normal(200, 12, 2, mean=0.3)
    c_a, c_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b - 2 * sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, d", [(300, 24), (20, 24)])  # the second with fewer clips than dimensions
def test_frechet_distance_equals_its_formula_with_eigenvalues(n, d):
    """As torchmetrics writes it: the trace of the root is the sum of the roots of the product's eigenvalues."""
    a, b = features(n, d, 0), features(n + 10, d, 1) + 0.5
    expected = (a.double().mean(0) - b.double().mean(0)).square().sum()
    c_a, c_b = a.double().T.cov(), b.double().T.cov()
    expected += c_a.trace() + c_b.trace() - 2 * torch.linalg.eigvals(c_a @ c_b).sqrt().real.sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-4)


def test_frechet_distance_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not here: pip install torchmetrics")
    a, b = features(300, 24, 0).double(), features(200, 24, 1).double() + 0.5
    expected = fid._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-4)


def test_frechet_distance_equals_audioldm_eval():
    a, b = features(300, 24, 0), features(200, 24, 1) + 0.5
    expected = audioldm_eval("fid").calculate_fid({"2048": a}, {"2048": b}, "2048")["frechet_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_known_gaussians():
    """Means 3 apart in each of 4 dimensions, standard deviations 1 and 2: 4 * (3^2 + (2 - 1)^2) = 40."""
    assert frechet_distance(normal(40_000, 4, 0), normal(40_000, 4, 1, 3.0, 2.0)) == pytest.approx(40, rel=0.01)


def test_frechet_distance_is_zero_for_the_same_clips_and_symmetric():
    a, b = normal(20, 64, 0), normal(30, 64, 1)  # fewer clips than dimensions: singular covariances
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_with_pca_sees_only_the_main_directions_of_the_reference():
    b = normal(500, 10, 0, std=np.r_[np.full(3, 5.0), np.full(7, 0.1)])
    moved = b.copy()
    moved[:, 5] += 100
    assert frechet_distance(moved, b, pca=3) < 1 < 9_000 < frechet_distance(moved, b)
    a = normal(500, 10, 1)
    assert frechet_distance(a, b, pca=10) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_infinity_removes_the_bias_of_few_clips():
    b = normal(50_000, 16, 0)
    biased, unbiased = frechet_distance(normal(400, 16, 1), b), frechet_infinity(normal(400, 16, 1), b)
    assert biased > 0.2 and abs(unbiased) < biased / 3


# Kernel distance


@pytest.mark.parametrize("kernel", ["polynomial", "gaussian"])
def test_kernel_distance_equals_its_sums_written_out(kernel):
    a, b = normal(7, 5, 0), normal(9, 5, 1, mean=0.5)
    width = np.median([np.linalg.norm(b[i] - b[j]) for i in range(9) for j in range(i)])
    k = {
        "polynomial": lambda x, y: (x @ y / 5 + 1) ** 3,
        "gaussian": lambda x, y: 100 * np.exp(-((x - y) ** 2).sum() / (2 * width**2)),
    }[kernel]
    within_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b, kernel) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


def test_kernel_distance_equals_scikit_learns_kernels():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="scikit-learn is not here")
    a, b = features(30, 24, 0), features(40, 24, 1) + 0.5
    width = np.median(pairwise.euclidean_distances(b.double())[np.triu_indices(40, k=1)])
    kernels = {
        "polynomial": lambda x, y: pairwise.polynomial_kernel(x, y, degree=3, coef0=1),
        "gaussian": lambda x, y: 100 * pairwise.rbf_kernel(x, y, gamma=1 / (2 * width**2)),
    }
    for name, kernel in kernels.items():
        aa, bb, ab = (kernel(x.double(), y.double()) for x, y in ((a, a), (b, b), (a, b)))
        expected = aa[~np.eye(30, dtype=bool)].mean() + bb[~np.eye(40, dtype=bool)].mean() - 2 * ab.mean()
        assert kernel_distance(a, b, name) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_equals_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not here: pip install torchmetrics")
    a, b = features(30, 24, 0).double(), features(30, 24, 1).double() + 0.5
    assert kernel_distance(a, b) == pytest.approx(kid.poly_mmd(b, a).item(), rel=1e-4)


def test_kernel_distance_equals_audioldm_eval():
    a, b = features(30, 24, 0), features(30, 24, 1) + 0.5
    expected = audioldm_eval("kid").polynomial_mmd(a.numpy(), b.numpy(), degree=3, gamma=None, coef0=1)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kernel", ["polynomial", "gaussian"])
def test_kernel_distance_is_unbiased(kernel):
    same = [kernel_distance(normal(25, 6, s), normal(40, 6, 1000 + s), kernel) for s in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert kernel_distance(normal(25, 6, 0, mean=1), normal(40, 6, 1), kernel) > np.quantile(same, 0.99)


# Class probabilities


def test_kl_divergence_equals_torch_and_is_zero_for_equal_rows():
    p, q = probabilities(50, 8, 0), probabilities(50, 8, 1)
    expected = torch.nn.functional.kl_div(torch.tensor(q + 1e-6).log(), torch.tensor(p), reduction="batchmean")
    assert kl_divergence(p, q) == pytest.approx(expected.item(), rel=1e-9)
    assert kl_divergence(p, p) == pytest.approx(0, abs=1e-4)
    assert kl_divergence(np.eye(3), np.eye(3)) == pytest.approx(0, abs=1e-4)


def test_kl_divergence_is_audioldm_evals_softmax_variant():
    """KL(real || generated) over all classes as AudioGen counts it; not the sum over each class's own yes or no."""
    real, generated = (torch.from_numpy(3 * normal(50, 20, seed)) for seed in (0, 1))
    files = [f"{i}.wav" for i in range(50)]
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    expected, *_ = audioldm_eval("kl").calculate_kl(
        {"logits": generated[shuffled], "file_path_": [files[i] for i in shuffled]},
        {"logits": real, "file_path_": files},
        "logits",
    )
    value = kl_divergence(real.softmax(1), generated.softmax(1))
    assert value == pytest.approx(expected["kullback_leibler_divergence_softmax"], rel=1e-4)
    assert abs(value - expected["kullback_leibler_divergence_sigmoid"]) > 0.1


def test_inception_score_equals_its_formula():
    p = torch.from_numpy(3 * normal(80, 20, 0)).softmax(1)
    expected = torch.nn.functional.kl_div(p.mean(0).log().expand(80, 20), p, reduction="batchmean").exp().item()
    assert inception_score(p) == pytest.approx(expected, rel=1e-4)


def test_inception_score_equals_audioldm_eval_whole_and_in_its_ten_parts():
    logits = torch.from_numpy(3 * normal(80, 20, 0))
    p = logits.softmax(1)
    calculate = audioldm_eval("isc").calculate_isc
    one = calculate({"logits": logits}, "logits", rng_seed=2020, samples_shuffle=False, splits=1)
    ten = calculate({"logits": logits}, "logits", rng_seed=2020, samples_shuffle=True, splits=10)
    assert inception_score(p) == pytest.approx(one["inception_score_mean"], rel=1e-4)
    order = np.random.RandomState(2020).permutation(80)  # theirs
    assert inception_score(p[order], splits=10) == pytest.approx(ten["inception_score_mean"], rel=1e-4)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    assert inception_score(np.eye(8)[np.arange(80) % 8]) == pytest.approx(8)
    assert inception_score(np.full((80, 8), 1 / 8)) == pytest.approx(1)
    assert inception_score(np.eye(8)[np.zeros(80, int)]) == pytest.approx(1)  # one clear class only: collapsed


def test_inception_score_over_splits_is_their_mean():
    p = probabilities(90, 8, 0)
    assert inception_score(p, splits=3) == pytest.approx(np.mean([inception_score(p[i : i + 30]) for i in (0, 30, 60)]))


# Joint embeddings


def test_clap_score_is_the_cosine_for_any_norm():
    a = normal(10, 6, 0)
    assert clap_score(a, 3 * a) == pytest.approx(1) and clap_score(a, -a) == pytest.approx(-1)
    b = normal(10, 6, 1)
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(a), torch.tensor(b)).mean().item()
    assert clap_score(torch.tensor(a, requires_grad=True), torch.tensor(b)) == pytest.approx(cosine)


def test_retrieval_is_perfect_for_itself_and_chance_for_strangers_and_for_a_collapsed_encoder():
    a = normal(400, 64, 0)
    assert recall_at_k(a, a + 0.01 * normal(400, 64, 1), k=1) == 1
    assert recall_at_k(a, normal(400, 64, 2), k=40) == pytest.approx(0.1, abs=0.04)
    assert recall_at_k(np.ones((400, 64)), a, k=40) == pytest.approx(0.1, abs=0.001)
    assert recall_at_k(a, np.ones((400, 64)), k=40) == pytest.approx(0.1)


def test_retrieval_counts_ranks():
    """The own clip is 1st, 2nd and 3rd nearest for the three captions."""
    candidates = np.eye(3)
    queries = np.array([[1, 0.1, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    assert [recall_at_k(queries, candidates, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_zero_shot_names_the_nearest_class():
    x, labels = blobs(60, 4, noise=0.3)
    result = zero_shot(x, np.eye(16)[:4], labels)
    assert result.accuracy == 1 and (result.predictions == labels).all() and result.scores.shape == (60, 4)
    assert zero_shot(x, np.eye(16)[:4], np.roll(labels, 1)).accuracy == 0
    assert np.isnan(zero_shot(x, np.eye(16)[:4]).accuracy)


# The probe


def test_class_recall_of_one_class_a_clip_is_accuracy():
    scores, labels = normal(100, 5, 0), np.arange(100) % 5
    assert class_recall(scores, np.eye(5)[labels]) == pytest.approx((scores.argmax(1) == labels).mean())


def test_class_recall_takes_as_many_as_are_captioned():
    labels = label_matrix([("rain", "bell"), "dog"], ["bell", "dog", "rain"])
    assert labels.tolist() == [[True, False, True], [False, True, False]]
    assert class_recall([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]], labels) == pytest.approx((1 / 2 + 0) / 2)
    assert class_recall(np.zeros((2, 3)), labels) == pytest.approx((2 / 3 + 1 / 3) / 2)  # chance


def test_probe_separates_blobs_and_shuffled_labels_bring_it_to_chance():
    classes = [f"class {k}" for k in range(8)]
    (x, k), (x_test, k_test) = blobs(400, 8, seed=0), blobs(200, 8, seed=1)
    truth = label_matrix([classes[i] for i in k_test], classes)
    probe = LinearProbe(classes).fit(x, [classes[i] for i in k])
    assert class_recall(probe.logits(x_test), truth) == 1
    assert probe.predict(x_test) == [(classes[i],) for i in k_test]
    np.testing.assert_allclose(probe.probabilities(x_test).sum(1), 1)
    shuffled = np.random.default_rng(0).permutation(k)
    assert class_recall(LinearProbe(classes).fit(x, [classes[i] for i in shuffled]).logits(x_test), truth) < 0.35


def test_multi_label_probe_finds_both_classes_of_a_mixture():
    classes, rng = ["bell", "dog", "horn", "rain", "wind"], np.random.default_rng(0)
    labels = [tuple(rng.choice(classes, size=rng.integers(1, 3), replace=False)) for _ in range(400)]
    x = label_matrix(labels, classes) @ normal(5, 16, 1, std=3) + normal(400, 16, 2, std=0.5)
    probe = LinearProbe(classes, multi_label=True).fit(x[:300], labels[:300])
    assert class_recall(probe.logits(x[300:]), label_matrix(labels[300:], classes)) > 0.98
    assert [set(p) for p in probe.predict(x[300:301], m=len(labels[300]))] == [set(labels[300])]
    with pytest.raises(ValueError, match="multi_label=True"):
        LinearProbe(classes).fit(x, labels)


def test_probe_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, k = blobs(120, 3, seed=0, noise=3)
    probe = LinearProbe("abc", penalty=0.01).fit(x, ["abc"[i] for i in k])
    other = linear_model.LogisticRegression(C=1 / (120 * 0.01), tol=1e-8, max_iter=2000)
    expected = other.fit((x - x.mean(0)) / x.std(0), k).predict_proba((x - x.mean(0)) / x.std(0))
    np.testing.assert_allclose(probe.probabilities(x), expected, atol=2e-3)


# How sure


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    x = normal(400, 1, 0)
    low, high = bootstrap_interval(np.mean, x)
    assert (low, high) == pytest.approx((x.mean() - 1.96 * x.std() / 20, x.mean() + 1.96 * x.std() / 20), abs=0.02)


def test_bootstrap_interval_draws_the_same_rows_of_every_array():
    a = normal(60, 8, 0)
    assert bootstrap_interval(clap_score, a, torch.tensor(a), resamples=20) == pytest.approx((1, 1))


def test_bootstrap_interval_of_a_frechet_distance_must_be_centred():
    a, b = normal(60, 8, 0), normal(60, 8, 1)
    plain, centred = (
        bootstrap_interval(lambda x: frechet_distance(x, b), a, resamples=100, centre=centre)
        for centre in (False, True)
    )
    assert centred[0] < frechet_distance(a, b) < centred[1] < plain[1]
    assert centred[1] - centred[0] == pytest.approx(plain[1] - plain[0])


def test_real_vs_real_is_the_score_of_equal_distributions():
    real = normal(800, 8, 0)
    value = real_vs_real(real, frechet_distance)
    assert 0 < value < 0.3 and value == pytest.approx(frechet_distance(normal(400, 8, 1), normal(400, 8, 2)), abs=0.1)
    assert real_vs_real(real, frechet_distance) == value < frechet_distance(real + 1, real)


# Bad input


def test_bad_input_is_refused_by_name():
    x = normal(10, 4, 0)
    broken = x.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="the first is 3"):
        frechet_distance(broken, x)
    with pytest.raises(ValueError, match="same width"):
        kernel_distance(x, normal(10, 5, 0))
    with pytest.raises(ValueError, match="pca, for .* must be a whole number between 1 and 4, got 64"):
        frechet_distance(x, x, pca=64)
    with pytest.raises(ValueError, match="row i of a belongs to row i of b"):
        clap_score(x, x[:5])
    with pytest.raises(ValueError, match="must be probabilities"):
        inception_score(x)
    with pytest.raises(ValueError, match="'cat'"):
        label_matrix(["cat"], ["dog"])


def test_whole_floats_are_integers_and_other_numbers_are_refused():
    x, y = normal(12, 4, 0), normal(12, 4, 1)
    assert frechet_distance(x, y, pca=2.0) == frechet_distance(x, y, pca=2)
    assert frechet_infinity(x, y, 2.0, 5.0, 3.0) == frechet_infinity(x, y, 2, 5, 3)
    assert recall_at_k(x, y, 3.0) == recall_at_k(x, y, 3)
    assert inception_score(np.eye(4), 2.0) == inception_score(np.eye(4), 2)
    interval = bootstrap_interval(np.mean, x, resamples=9.0, seed=1.0)
    assert interval == bootstrap_interval(np.mean, x, resamples=9, seed=1)
    assert real_vs_real(x, frechet_distance, 2.0, 1.0) == real_vs_real(x, frechet_distance, 2, 1)
    for call in (lambda n: frechet_distance(x, y, n), lambda n: frechet_infinity(x, y, sizes=n),
                 lambda n: frechet_infinity(x, y, seed=n), lambda n: recall_at_k(x, y, n),
                 lambda n: inception_score(np.eye(4), n), lambda n: bootstrap_interval(np.mean, x, resamples=n),
                 lambda n: bootstrap_interval(np.mean, x, seed=n), lambda n: real_vs_real(x, frechet_distance, n),
                 lambda n: real_vs_real(x, frechet_distance, seed=n)):  # fmt: skip
        for wrong in (-1, 1.5, True, float("nan"), "2"):
            with pytest.raises(ValueError, match="must be a whole number"):
                call(wrong)
