"""The benchmarks: do all candidates compute the same, is what is wrong refused, is the arithmetic right?

No speeds are judged here: they belong to `make bench`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import children, holds, limits, measure, peers, problems, report, targets
from benchmarks.cases import CASES, STEP, Case
from benchmarks.limits import Transforms, Work
from benchmarks.measure import Ratio, Row
from benchmarks.problems import Candidate, Problem, Size
from benchmarks.targets import TARGETS, Target, judge

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Size(2, 37, 8)
DIVISIBLE = 256  # some peers want a multiple of their chunk


def row(candidate: str = "ours", length: int = 1024, both: tuple[float, ...] = (1.0,), **more) -> Row:
    more = {"forward": [t / 3 for t in both], "both_bytes": 10 * length, **more}
    return Row(candidate, Size(1, length, 64), both=list(both), **more)


# ---- the cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_all_candidates_agree_at_an_odd_length(name: str) -> None:
    case = CASES[name]
    problem = case.build(SMALL, CPU)
    assert next(iter(problem.candidates)) == "ours"
    errors = measure.compare(problem, case.agree)
    assert errors["ours"] == 0 and len(errors) == len(problem.candidates)
    if problem.alike and problem.leaves:
        assert problem.candidates["ours"].leaves, "ours has a gradient wherever there is something to differentiate"


def test_peers_that_are_installed_run_and_agree_at_a_length_that_suits_them() -> None:
    if not peers.installed():
        pytest.skip("no peer is installed")
    for package in peers.installed():
        assert peers.load(package) is not None, peers.why[package]
    compared = set()
    for name, case in CASES.items():
        if not name.startswith(STEP):
            problem = case.build(Size(1, DIVISIBLE, 8), CPU)
            compared |= set(measure.compare(problem, case.agree))
    for package in peers.installed():
        assert any(package in name for name in compared), f"{package} is compared with nothing"


def test_a_peer_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "scipy", "no_such_package.signal")
    peers.load.cache_clear()
    try:
        assert peers.load("scipy") is None and "no_such_package" in peers.why["scipy"]
        assert list(CASES["convolution"].build(SMALL, CPU).candidates) == ["ours", "torch rfft of 2L"]
    finally:
        peers.load.cache_clear()


def test_every_peer_is_pinned() -> None:
    lines = [line for line in (ROOT / "benchmarks/peers.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    assert set(peers.PACKAGES) <= {line.split("==")[0] for line in lines}


def test_every_case_but_the_quadratic_ones_may_be_long() -> None:
    for name, case in CASES.items():
        assert (case.longest is not None) == (case.growth == "quadratic"), name


# ---- wrong candidates -----------------------------------------------------------------------------------------------


def test_a_wrong_output_is_refused() -> None:
    (x,) = problems.tensors(CPU, (3, 4))
    problem = Problem.of([x], {"ours": lambda: 2 * x, "theirs": lambda: 2.01 * x})
    with pytest.raises(ValueError, match=r"theirs does not compute what ours does.*No speed is stated"):
        measure.compare(problem, 1e-4)


def test_a_right_output_with_a_wrong_gradient_is_refused() -> None:
    (x,) = problems.tensors(CPU, (3, 4))
    problem = Problem.of([x], {"ours": lambda: 2 * x, "theirs": lambda: x + x.detach()})
    with pytest.raises(ValueError, match="theirs does not compute"):
        measure.compare(problem, 1e-4)


def test_numbers_that_are_not_finite_are_refused_even_of_another_model() -> None:
    (x,) = problems.tensors(CPU, (3,))
    problem = Problem({"ours": Candidate(lambda: x / 0, [])}, [], alike=False)
    with pytest.raises(ValueError, match="not finite"):
        measure.compare(problem, 1.0)


def test_a_peer_keeps_its_own_layout_and_its_gradients_are_carried_back() -> None:
    weight, x = problems.tensors(CPU, (4, 3), (5, 3))
    theirs = nn.Linear(3, 4, bias=False)  # holds half of the weight, and wants x transposed
    peer = problems.copied(theirs, [x.T], {"weight": weight / 2}, lambda x: 2 * theirs(x.T))
    assert peer.leaves[0].is_contiguous() and peer.leaves[0].shape == (3, 5)
    problem = Problem.of([weight, x], {"ours": lambda: x @ weight.T}).beside({"theirs": peer})
    assert measure.compare(problem, 1e-6)["theirs"] < 1e-6
    twice = problems.copied(theirs, [x.T], {"weight": weight}, lambda x: theirs(x.T))
    peer.origin = twice.origin  # now it claims to hold the whole weight: its gradient is off by two
    with pytest.raises(ValueError, match="theirs does not compute"):
        measure.compare(problem, 1e-4)


def test_copied_refuses_a_weight_of_another_size() -> None:
    weight, x = problems.tensors(CPU, (4, 4), (5, 3))
    with pytest.raises(ValueError, match="weight of the peer"):
        problems.copied(nn.Linear(3, 4), [x], {"weight": weight}, lambda x: x)


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_a_measurement_from_end_to_end() -> None:
    rows = measure.measure(CASES["linear-causal"], [Size(1, 50, 8), Size(1, 25, 8)], 2, CPU)
    ours = [row for row in rows if row.candidate == "ours"]
    assert [row.size.length for row in ours] == [25, 50]
    for each in ours:
        assert len(each.forward) == len(each.both) == 2 and min(each.both) > 0
        assert each.both_bytes >= each.forward_bytes > 0 and each.largest >= 50 * 8 // 2
        assert each.floor is not None and each.forward_floor is not None and each.floor > each.forward_floor > 0


def test_parts_are_timed_and_not_taken_for_peers() -> None:
    rows = measure.measure(CASES["seqboat-layer"], [Size(1, 40, 8)], 1, CPU)
    assert {row.candidate: row.part for row in rows} == {"ours": False, "EMA": True}
    assert targets.best_peer(Target("seqboat-layer", SMALL), rows) is None


def test_an_early_stop_and_a_case_that_is_too_long() -> None:
    case = Case(CASES["attention"].build, "quadratic", longest=30)
    assert {row.size.length for row in measure.measure(case, [Size(1, 20, 8), Size(1, 40, 8)], 1, CPU)} == {20}


def test_what_would_take_too_long_or_too_much_is_not_begun() -> None:
    slow = [row("theirs", 1024, (1.0,))]
    assert measure.too_much(slow, Size(1, 4096, 64)) is None  # 16 s if it is quadratic
    assert "64 s a call" in str(measure.too_much(slow, Size(1, 8192, 64)))
    linear = [*slow, row("theirs", 2048, (2.0,))]  # it is linear
    assert measure.too_much(linear, Size(1, 8192, 64)) is None
    large = [row("theirs", 1024, (0.1,), both_bytes=int(measure.memory_of_machine()) // 8)]
    assert "GB" in str(measure.too_much(large, Size(1, 2048, 64)))


def test_the_largest_tensor_is_found_in_backward_too() -> None:
    (x,) = problems.tensors(CPU, (50,))

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return (g[:, None] * g).sum(0)

    assert measure.largest_tensor(lambda: Outer.apply(x)) == 50
    assert measure.largest_tensor(lambda: torch.autograd.grad(Outer.apply(x).sum(), x)) == 2500
    assert measure.largest_tensor(lambda: x.detach().expand(1000, 50)) == 50  # a view makes nothing


@pytest.mark.parametrize("keep", [False, True])
def test_a_child_measures_and_answers(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    given: list[dict[str, str]] = []
    start = children.subprocess.Popen

    def popen(*args, env: dict[str, str], **options):
        given.append(env)
        return start(*args, env=env, **options)

    monkeypatch.setattr(children.subprocess, "Popen", popen)
    request = children.Request("linear", [SMALL], 1, 1, "cpu", keep)
    answer = children.ask(request, 120, steps.append)
    assert answer.wrong is None and steps
    rows = [Row(**each) for each in answer.rows]
    assert rows[0].candidate == "ours" and rows[0].size == SMALL and rows[0].both
    assert (given[0].get("MALLOC_MMAP_MAX_") == "0") is keep


def test_a_child_that_takes_too_long_is_stopped() -> None:
    answer = children.ask(children.Request("linear", [SMALL], 1, 1, "cpu"), 0.2)
    assert answer.wrong == "stopped after 0 s" and not answer.rows


def test_a_child_that_dies_says_why() -> None:
    answer = children.ask(children.Request("no-such-case", [SMALL], 1, 1, "cpu"), 120)
    assert answer.wrong is not None and "no-such-case" in answer.wrong


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    ours, theirs = row(both=(1.0, 2.0, 4.0)), row("theirs", both=(3.0, 4.0, 20.0))
    assert measure.ratio(theirs, ours) == Ratio(3.0, 2.0, 5.0)
    assert [(r.candidate, ratio.median) for r, ratio in measure.ratios([ours, theirs])] == [("theirs", 3.0)]
    assert measure.ratio(row("slow", both=(7.0,)), ours) == Ratio(7.0, 7.0, 7.0)  # measured once
    forward_only = row("theirs", both=(), forward=[2.0, 2.0, 2.0])
    assert measure.ratio(forward_only, ours).median == pytest.approx(3.0)  # against our forward: 1/3, 2/3, 4/3


def test_growth_is_judged_from_4k_on_and_needs_three_lengths() -> None:
    lengths = (1024, 4096, 16384, 65536)
    rows = [row(length=n, both=(max(n, 4096) * 1e-6,)) for n in lengths]
    found = measure.growth(rows)["ours"]
    assert found["time"] == pytest.approx(1.0) and found["memory"] == pytest.approx(1.0)
    assert measure.growth(rows[:2]) == {}
    assert measure.growth(rows[:3])["ours"]["time"] == pytest.approx(0.5, abs=0.01)
    assert report.too_steep("ema", rows) == []
    steep = [row(length=n, both=(n**1.15,)) for n in lengths]
    assert report.too_steep("ema", steep) == ["time like L^1.15, wanted 1.1"]
    assert report.too_steep("convolution", steep) == [] and report.too_steep("attention", steep) == []


class FakeLimits:
    copy, product, exp = 8.0, 100.0, 10.0

    def fresh(self, count: int) -> float:
        return count / 2

    def transforms(self, rows: int, length: int) -> float:
        return rows * length


def test_the_floor_adds_up() -> None:
    work = Work(products=200, moved=4, fresh=[6, 2], curves=30, transforms=[Transforms(2, 5)])
    assert work.floor(FakeLimits()) == 2 + 2 + 4 + 3 + 10  # type: ignore[arg-type]


def test_the_work_of_the_mechanisms() -> None:
    forward, both = limits.ema(Size(1, 16384, 256))
    samples = 16384 * 256
    assert forward.products == 2 * 96 * samples and both.products == 3 * forward.products
    assert forward.fresh == [samples] and both.fresh == [samples, samples]
    forward, both = limits.attention(Size(1, 4096, 128), 4096, 64, 256, keep=False)
    assert forward.products == pytest.approx(10.7e9, rel=0.01) and forward.curves == 4096**2
    assert both.products == 3 * forward.products + 2 * 4096**2 * 64  # the scores once more
    assert limits.convolution(Size(2, 5, 3))[1].transforms == [(6, 10), (3, 10), (6, 10)]
    assert limits.mega_layer(Size(1, 16384, 128))[0].products == pytest.approx(6.4e9, rel=0.02)


def test_limits_are_measured_and_remembered() -> None:
    found = limits.Limits(CPU)
    assert min(found.rates().values()) > 1e6
    assert found.fresh(1000) == found.fresh(1000) > 0 and found.transforms(2, 64) > 0


def test_the_best_peer_does_all_that_ours_does() -> None:
    ours = row(both=(1.0,))
    rows = [ours, row("forward only", both=(), forward=[0.01]), row("slow", both=(9.0,)), row("best", both=(5.0,)),
            row("piece", both=(0.1,), part=True)]  # fmt: skip
    target = Target("ema", ours.size, 4)
    assert targets.best_peer(target, rows) is rows[3]
    assert judge(target, rows).reached and judge(target, rows).ratio == Ratio(5.0, 5.0, 5.0)
    assert targets.best_peer(Target("ema", ours.size, against="slow"), rows) is rows[2]
    with pytest.raises(ValueError, match="a peer to compare with was not there"):
        judge(target, [ours])
    with pytest.raises(ValueError, match="no floor was measured"):
        judge(Target("ema", ours.size, floor=3), rows)


@pytest.mark.parametrize(
    ("target", "missed"),
    [
        ({"bar": 2.0}, ""),
        ({"bar": 4.0}, "time 3.00, wanted 4"),
        ({"memory": 0.6}, ""),
        ({"memory": 0.1}, "memory 0.50 of the peer's, wanted 0.10"),
        ({"floor": 6.0}, ""),
        ({"floor": 4.0}, "5.0 times the floor, wanted 4"),
        ({"forward_floor": 6.0}, ""),
        ({"forward_floor": 4.0}, "5.0 times the floor of forward, wanted 4"),
        ({"forbidden": targets.every_pair}, ""),
        ({"forbidden": lambda size: 100}, "a tensor of 100 numbers, wanted fewer than 100"),
        ({"share": ("EMA", 0.6)}, ""),
        ({"share": ("EMA", 0.4)}, "EMA takes more than 40%"),
    ],
)
def test_each_bar(target: dict, missed: str) -> None:
    rows = [
        row(both=(2.0,), forward=[1.0], both_bytes=50, floor=0.4, forward_floor=0.2, largest=100),
        row("theirs", both=(6.0,), both_bytes=100),
        row("EMA", both=(1.0,), part=True),
    ]
    verdict = judge(Target("ema", rows[0].size, **{"forbidden": None, **target}), rows)
    assert verdict.failed == ([missed] if missed else [])
    line = report.target_line(verdict)
    assert ("not reached" in line) == bool(missed) and missed in line
    assert ("EMA takes 50% of our time" in line) == ("share" in target)


def test_the_outcome_in_a_word() -> None:
    rows = [row(both=(1.0, 1.0, 1.0)), row("theirs", both=(2.0, 3.0, 4.0))]
    for bar, words in (
        (1.5, "reached"),
        (2.5, "reached, not in every round"),
        (3.5, "not reached"),
        (None, "(no bar)"),
    ):
        assert report.outcome(judge(Target("ema", rows[0].size, bar), rows)) == words


def test_the_targets_can_be_judged() -> None:
    for target in TARGETS:
        case = CASES[target.case]
        assert (target.floor is None and target.forward_floor is None) or case.work is not None, target
        assert case.longest is None or target.size.length <= case.longest, target
        if target.forbidden is not None:
            assert target.forbidden(target.size) > 1_000_000, target
    assert len({report.key(target) for target in TARGETS}) == len(TARGETS)


# ---- report and command ----------------------------------------------------------------------------------------------


def test_the_record_round_trips_and_keeps_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    head = {"device": "cpu"}
    rows = [row(length=n, both=(n / 7, n / 3), error=1e-6, largest=5) for n in (1024, 4096, 16384)]
    report.write(path, head, "s4d", rows, others=0.1)
    report.write(path, head, "ema", rows[:1])
    found = report.read(path)
    assert list(found["cases"]) == ["ema", "s4d"]  # in the order of the cases
    assert report.rows_of(found["cases"]["s4d"]) == rows and found["cases"]["s4d"]["others"] == 0.1
    assert found["cases"]["s4d"]["growth"]["ours"]["time"] == pytest.approx(1.0)
    target = Target("ema", rows[0].size, 2)
    report.write_target(path, head, judge(target, [rows[0], row("theirs", both=(9999.0, 9999.0))]), rows[:1])
    found = report.read(path)
    assert list(found["cases"]) == ["ema", "s4d"] and report.key(target) in found["targets"]
    assert report.plot_growth(tmp_path / "growth.png", path) and report.plot_targets(tmp_path / "targets.png", path)
    assert (tmp_path / "growth.png").stat().st_size > 5000 and (tmp_path / "targets.png").stat().st_size > 5000
    assert not report.plot_growth(tmp_path / "none.png", tmp_path / "no-record.json")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"cases": {"ema": {}}}', '{"targets": {"ema": {"rows": [{"candidate": "ours", "old": 1}]}}}']
)
def test_a_file_that_is_no_record_is_refused_before_anything_is_measured(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        command.main(["ema", "--out", str(path)])
    assert stop.value.code == 2 and "Move it away, or choose another with --out" in capsys.readouterr().err
    assert path.read_text() == text


def test_the_table_shows_what_was_measured() -> None:
    rows = [row(both=(0.001, 0.002, 0.003), floor=0.001), row("theirs", both=(0.004, 0.004, 0.004))]
    shown = report.table("ema", rows)
    assert "2.0 ms" in shown and "- / 2.0 times the floor" in shown and "2.00 [1.33 to 4.00]" in shown
    assert "a step" in report.table(STEP + "mega", [row(both=(), forward=[1.0])])


@pytest.mark.parametrize("words", [["emma"], ["targets", "emma"], ["ema", "--rounds", "0"], ["--lengths", "0"]])
def test_the_command_refuses_what_it_does_not_know(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert ("no case emma" in said and "ema-bidirectional" in said) or "at least 1" in said


def test_the_command_measures_prints_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[children.Request] = []

    def ask(request: children.Request, seconds: float, on_step) -> children.Answer:
        asked.append(request)
        if request.case == "s4d":
            return children.Answer([], [], wrong="popgym does not compute what ours does")
        rows = [row(length=size.length, largest=7, floor=0.5, forward_floor=0.1) for size in request.sizes]
        rows += [row("theirs", length=size.length, both=(30.0,)) for size in request.sizes]
        made = [
            {**vars(each), "size": [request.sizes[0].batch, each.size.length, request.sizes[0].dim]} for each in rows
        ]
        return children.Answer(json.loads(json.dumps(made)), ["theirs at 9 is left out"], others=0.5)

    monkeypatch.setattr(command, "ask", ask)
    out = tmp_path / "record.json"
    assert command.main(["ema", "--lengths", "512", "1024", "2048", "--out", str(out)]) == 0
    assert command.main(["targets", "ema", "--out", str(out), "--threads", "2"]) == 0
    assert command.main(["s4d", "--out", str(out), "--keep-memory"]) == 1
    assert [request.case for request in asked] == ["ema", "ema", "ema", "s4d"]
    assert [request.keep_memory for request in asked] == [False, False, False, True]
    assert [size.length for size in asked[0].sizes] == [512, 1024, 2048] and asked[1].threads == 2
    said = capsys.readouterr()
    assert "30.00 [30.00 to 30.00]" in said.out and "reached" in said.out and "others used 50%" in said.out
    assert "theirs at 9 is left out" in said.out and "popgym does not compute" in said.err
    assert set(report.read(out)["targets"]) == {"ema 2 x 16,384 x 64", "ema 1 x 16,384 x 256"}
    assert (tmp_path / "record-growth.png").exists() and (tmp_path / "record-targets.png").exists()


# ---- does it hold? --------------------------------------------------------------------------------------------------


def test_a_model_holds_in_every_precision(capsys: pytest.CaptureFixture[str]) -> None:
    assert holds.main(["fastrpb", "--length", "40"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"fastrpb      {precision}") == 1 for precision in holds.ALLOWED) and "too far" not in said


def test_a_model_that_computes_something_else_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, made = holds.build, []

    def build(name: str) -> nn.Module:
        """The first one, of the truth, is right; the others' heads are twice as sure."""
        made.append(original(name))
        with torch.no_grad():
            made[-1].head.out.weight.mul_(2 if len(made) > 1 else 1)
        return made[-1]

    monkeypatch.setattr(holds, "build", build)
    assert holds.main(["transformer", "--length", "40"]) == 1
    assert capsys.readouterr().out.count("too far") == 3
    assert not holds.Outcome("mega", "float32", False, float("nan"), 0.0, 1.0).fine


def test_what_breaks_does_not_keep_the_others_from_being_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = holds.step

    def step(*given: Any) -> Any:
        if given[-1]:
            raise RuntimeError("CUDA out of memory.\nMuch more about it.")
        return original(*given)

    monkeypatch.setattr(holds, "step", step)
    assert holds.main(["transformer", "fastrpb", "--length", "40"]) == 1
    said = capsys.readouterr().out
    assert said.count("RuntimeError: CUDA out of memory. Much more about it.\n") == 2
    assert all(
        said.count(f"{name:12} {precision}") == 1 for name in ("transformer", "fastrpb") for precision in holds.ALLOWED
    )


@pytest.mark.parametrize("words", [["mambo"], ["mega", "--length", "2"]])
def test_holds_refuses_what_it_does_not_know(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        holds.main(words)
    assert stop.value.code == 2 and ("There are: mega" in (said := capsys.readouterr().err) or "at least 8" in said)
