"""A comparison of caches: the figures against a plain computation, and what a stopped or repeated run does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vitalfew.core import InputError, Receipt, Rule
from vitalfew.generate.comparing import Arm, Compared, Course, arms_of, budget_of, compare_caches, long_enough
from vitalfew.generate.comparing_page import findings, frontier_table, make_receipt, write_page
from vitalfew.generate.following import Followed, Run, follow, measure

from .tiny import smollm2_folder, tiny_model

RULE = Rule("equal work", tolerance=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vitalfew.generate._transformers_weights import load

    return load(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))[0]


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(2, 258, (60,), generator=draw).tolist() for _ in range(3)]


def test_following_equals_one_pass_over_the_text(model: Any, texts: list[list[int]]) -> None:
    calls: list[int] = []
    found = follow(model, texts[0], 40, on_token=lambda: calls.append(1))
    with torch.no_grad():
        whole = model(torch.tensor([texts[0]])).logits[0, 39:-1].log_softmax(-1)
    torch.testing.assert_close(found.log_probs, whole, atol=1e-5, rtol=1e-5)
    # 59 tokens, 2 layers, 2 heads of 8, keys and values, 4 bytes
    assert (found.nbytes, len(calls)) == (59 * 2 * 2 * 8 * 2 * 4, 20)


def test_figures_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(7, 11, generator=draw).log_softmax(-1) for _ in range(2))
    truth = [3, 1, 4, 1, 5, 9, 2]
    run = measure(Followed(q, 5, 1.0, 2.0), Followed(p, 10, 1.0, 1.0), truth)
    assert run.kl == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)), 1e-5
    )
    assert run.nll == pytest.approx(float(torch.nn.functional.nll_loss(q, torch.tensor(truth))), 1e-5)
    assert run.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))


def test_a_whole_budget_is_the_full_cache(model: Any, texts: list[list[int]], tmp_path: Path) -> None:
    arms = arms_of(["keyformer", "snapkv"], ["100%", "40"])
    compared = compare_caches(model, texts, arms, Course(40, 20), tmp_path)
    for policy in ("keyformer", "snapkv"):
        for whole, half in zip(compared.runs[Arm(policy, "100%")], compared.runs[Arm(policy, "40")], strict=True):
            assert (whole.agreement, round(whole.kl, 6)) == (1.0, 0.0)
            assert half.nbytes < whole.nbytes


def test_fewer_slots_are_fewer_bytes_and_another_text(model: Any, texts: list[list[int]], tmp_path: Path) -> None:
    compared = compare_caches(model, texts, arms_of(["h2o"], ["50%", "20%"]), Course(40, 20), tmp_path)
    half, fifth = findings(compared, RULE)
    assert fifth.share < half.share < 0.6
    assert half.kl.mean > 0
    assert fifth.comparison.verdict in ("quality lost", "undecided", "saved")
    assert half.comparison.ratio.mean == pytest.approx(1 / half.share)


def test_a_stopped_job_goes_on(model: Any, texts: list[list[int]], tmp_path: Path) -> None:
    course, arms = Course(40, 20), arms_of(["snapkv", "streaming"], ["50%"])
    seen: list[str] = []

    class Stop(Exception):
        pass

    def stop(arm: str, share: float) -> None:
        seen.append(arm)
        if len(seen) == 5:
            raise Stop

    with pytest.raises(Stop):
        compare_caches(model, texts, arms, course, tmp_path / "a", stop)
    left = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a" / "runs").iterdir()}
    assert len(left) == 5
    resumed = compare_caches(model, texts, arms, course, tmp_path / "a")
    assert {name: (tmp_path / "a" / "runs" / name).stat().st_mtime_ns for name in left} == left
    whole = compare_caches(model, texts, arms, course, tmp_path / "b")

    def quality(compared: Compared) -> dict[Arm, list[tuple[float, ...]]]:
        return {arm: [(r.nll, r.kl, r.agreement, r.nbytes) for r in runs] for arm, runs in compared.runs.items()}

    assert quality(resumed) == quality(whole)


def test_a_finished_job_runs_nothing_and_takes_more_arms(
    model: Any, texts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = Course(40, 20)
    first = compare_caches(model, texts, arms_of(["snapkv"], ["50%"]), course, tmp_path)
    more = compare_caches(model, texts, arms_of(["snapkv", "recent"], ["50%"]), course, tmp_path)
    assert first.runs.items() <= more.runs.items()
    monkeypatch.setattr(model, "forward", None)
    assert (
        compare_caches(model, texts, arms_of(["recent"], ["50%"]), course, tmp_path).runs.items() <= more.runs.items()
    )


def test_a_folder_belongs_to_one_comparison(model: Any, texts: list[list[int]], tmp_path: Path) -> None:
    arms = arms_of(["recent"], ["50%"])
    compare_caches(model, texts[:1], arms, Course(40, 20), tmp_path)
    with pytest.raises(InputError, match="another texts"):
        compare_caches(model, texts[1:2], arms, Course(40, 20), tmp_path)
    with pytest.raises(InputError, match="another --seed 0"):
        compare_caches(model, texts[:1], arms, Course(40, 20, seed=1), tmp_path)
    run = tmp_path / "runs" / "0000-recent-50%.json"
    run.write_text(run.read_text().replace('"nll"', '"nil"'))
    with pytest.raises(InputError, match="no finished run"):
        compare_caches(model, texts[:1], arms, Course(40, 20), tmp_path)


@pytest.mark.parametrize(
    ("policies", "budgets", "said"),
    [(["nosuch"], ["50%"], "nosuch"), (["full"], ["50%"], "nothing to compare"), (["h2o"], [], "nothing to compare"),
     (["h2o"], ["0%"], "keeps nothing"), (["h2o"], ["many"], "many"), (["h2o"], ["2.0"], "2.0")],
)  # fmt: skip
def test_arms_that_cannot_be(policies: list[str], budgets: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        arms_of(policies, budgets)


def test_budgets_as_people_type_them() -> None:
    assert budget_of("50%") == budget_of(".5")
    assert (budget_of("512").kind, budget_of("1.0").kind, budget_of("64 MiB").value) == ("count", "share", 2**26)


def test_texts_that_are_too_short_are_left_out() -> None:
    assert long_enough([[1, 2], [1, 2, 3, 4], [5, 6, 7]], Course(1, 2)) == [[1, 2, 3], [5, 6, 7]]
    with pytest.raises(InputError, match=r"longest has 3\)"):
        long_enough([[1, 2, 3]], Course(2, 2))
    for prompt, continued in (0, 5), (5, 1):
        with pytest.raises(InputError):
            Course(prompt, continued)


def made(kls: list[float], nbytes: int = 30) -> Compared:
    """Return a comparison with the given divergences, each 1 % of a nat worse."""
    full = tuple(Run(2.0 + k, 0.0, 1.0, 100, 1.0, 0.1) for k in range(len(kls)))
    ours = tuple(Run(2.01 + k, kl, 0.9, nbytes, 1.1, 0.05, (0.8, None)) for k, kl in enumerate(kls))
    return Compared(Course(), {Arm("full"): full, Arm("snapkv", "30%"): ours}, 100)


def test_the_account_of_an_arm(tmp_path: Path) -> None:
    (found,) = findings(made([0.01, 0.02, 0.03]), RULE)
    assert (found.share, found.comparison.verdict) == (0.3, "saved")
    assert found.kl.mean == pytest.approx(0.02)
    assert found.kl.low < 0.02 < found.kl.high
    assert found.step_ratio.mean == pytest.approx(0.5)
    assert found.foretold == pytest.approx(130 / 200)
    receipt = make_receipt(made([0.01, 0.02, 0.03]), found, title="a", command="b")
    receipt.save(tmp_path / "r.json")
    assert Receipt.load(tmp_path / "r.json").to_dict() == receipt.to_dict()
    assert receipt.lines[0].ratio == pytest.approx(1 / 0.3)
    assert len(receipt.pairs) == 3
    assert receipt.quality[0].difference == pytest.approx(-0.01)


def test_one_text_has_no_interval_and_no_verdict(tmp_path: Path) -> None:
    compared = made([0.01])
    found = findings(compared, RULE)
    assert found[0].comparison.verdict == "undecided"
    assert not math.isfinite(found[0].kl.high)
    make_receipt(compared, found[0], title="one").save(tmp_path / "r.json")
    write_page(tmp_path / "p.html", "one", compared, found, RULE)
    assert json.dumps(compared.to_dict(), allow_nan=False)
    assert frontier_table(compared, found).rows[1][3].note == ""


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    compared = made([0.01, 0.02])
    write_page(tmp_path / "p.html", "a < b", compared, findings(compared, RULE), RULE)
    page = (tmp_path / "p.html").read_text()
    assert "a &lt; b" in page
    assert page.count("<svg") == 3
    assert not {"http://", "https://", "<script"} & set(page.replace("http://www.w3.org/2000/svg", "").split('"'))


@pytest.mark.weights
@pytest.mark.slow
def test_importance_beats_chance_on_real_text(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    from vitalfew.generate._transformers_weights import load

    model, tokenizer = load(smollm2_folder())
    course = Course(384, 24)
    names = ("compound", "formatstrings", "debugger")
    texts = long_enough([tokenizer(topics[name])["input_ids"] for name in names], course)
    compared = compare_caches(model, texts, arms_of(["keyformer", "snapkv", "random"], ["50%"]), course, tmp_path)
    keyformer, snapkv, random = findings(compared, RULE)
    assert keyformer.share == pytest.approx(snapkv.share, abs=0.02)
    assert max(keyformer.kl.mean, snapkv.kl.mean) < random.kl.mean / 3
