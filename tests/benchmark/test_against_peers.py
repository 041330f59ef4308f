import time

import pytest
import torch

from tests.benchmark import against_peers as bench_peers
from tests.benchmark import baselines as peers
from tests.benchmark.against_peers import Missing, Work, against_peers, matrix_peaks, profile
from tests.benchmark.bench import in_turn, peak_memory


def test_in_turn_takes_the_least_of_some_runs():
    naps = iter([0.05, 0.01, 0.03, 0.02, 0.01, 0.04])  # ours and theirs alternate
    best = in_turn({"ours": lambda: time.sleep(next(naps)), "theirs": lambda: time.sleep(next(naps))})
    assert 0.01 <= best["ours"] < 0.02 and 0.01 <= best["theirs"] < 0.02


def test_a_row_says_ratio_goal_and_share(monkeypatch):
    monkeypatch.setattr(bench_peers, "in_turn", lambda works, rounds: {"ours": 2.0, "slow": 6.0, "quick": 1.0})
    monkeypatch.setattr(bench_peers, "pick_precision", lambda device: "no")
    said = []
    work = Work("thinking", lambda: None, {"slow": None, "quick": None}, {"slow": 2.5, "quick": 2}, 100e9, limit=1.0)
    rows = bench_peers._timed(work, {"fp32": 100.0, "bf16": 400.0}, 2, said.append)
    ours, slow, quick = rows
    assert (ours["seconds"], ours["share_fp32"], ours["share_bf16"]) == (2.0, 0.5, 0.125) and not ours["met"]
    assert slow["ratio"] == 3 and slow["met"] and quick["ratio"] == 0.5 and not quick["met"]
    assert [("not met" in line) for line in said] == [False, True, False, True]


def test_who_is_not_installed_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    missing = Missing()
    assert bench_peers.log_mel(None, missing).peers == {}
    assert len(missing) == 2 and all("pip install" in message for message in missing)
    monkeypatch.setattr(bench_peers, "WORKS", (bench_peers.log_mel,))
    monkeypatch.setattr(bench_peers, "in_turn", lambda works, rounds: dict.fromkeys(works, 1.0))
    rows = against_peers(lambda line: None)
    left_out = [row["peer"].split(" is not here")[0] for row in rows if row["work"] == "left out"]
    assert left_out == ["librosa", "torchlibrosa"]
    with pytest.raises(ImportError, match=r"pip install --no-deps audioldm==0.1.1"):
        with peers.audioldm_package():
            pass


def test_only_what_is_asked_for_is_timed(monkeypatch):
    def idle(stack, missing):
        """an idle work"""
        return Work("idle", lambda: torch.ones(3).sum(), {})

    def never(stack, missing):
        """another work"""
        raise AssertionError

    monkeypatch.setattr(bench_peers, "WORKS", (idle, never))
    said = []
    rows = against_peers(said.append, only="idle")
    assert [row["work"] for row in rows] == ["matrix products", "idle"] and "GFLOP/s" in said[0]


def test_where_the_time_goes():
    image, kernel = torch.randn(4, 32, 64, 64), torch.randn(32, 32, 3, 3)
    where = profile(lambda: torch.nn.functional.conv2d(image, kernel))
    assert next(iter(where)) == "convolutions" and where["convolutions"] > 0.5 and sum(where.values()) <= 1.001


def test_peaks_are_of_this_machine():
    peaks = matrix_peaks(256)
    assert peaks["fp32"] > 1 and peaks["bf16"] > 0


def test_the_peak_of_a_call_is_beside_what_was_there():
    if peak_memory(lambda: None) is None:
        pytest.skip("this system does not tell")
    held = torch.ones(50 * 2**20)  # 0.2 GB that were there
    assert 0.3 < peak_memory(lambda: torch.ones(100 * 2**20).sum()) < 0.6
    assert held.numel() and peak_memory(lambda: None) < 0.1


def test_the_sources_of_works_give_the_same_numbers_as_ours():
    waveform = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    ours = bench_peers.MelSpectrogram()(waveform)[:, 0].transpose(1, 2)  # (B, F, T), frames half a hop later
    theirs = torch.from_numpy(peers.librosa_log_mel(waveform.numpy()))
    assert abs(ours[..., 5:-5].mean() - theirs[..., 5:-5].mean()) < 0.05
