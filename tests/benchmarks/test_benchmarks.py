"""The harness measures, checks what it measures, and the documents show what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from benchmarks.arena import Contender, ContenderError, Contest, Effort, compete
from benchmarks.bulk import LOCAL, OURS, PARAMETERS, RAW, straight_line
from benchmarks.figures import NotMeasuredError, Row, Spread, at_least, at_most, row
from benchmarks.model import model_of
from benchmarks.plot import draw
from benchmarks.publish import DOCUMENT, PICTURE, PUBLISHED, with_results
from benchmarks.record import Record
from benchmarks.training import OptimizerName, Outcome, Reference, WireType, WrongParametersError

EFFORT = Effort(rounds=3, steps=2, warmup_steps=1)
CONTEST = Contest(
    name="tiny",
    title="A thousand parameters",
    parameters=1_000,
    optimizer="adam",
    contenders=[LOCAL, RAW, OURS],
    threads=1,
)


def _silent(_line: str) -> None:
    """Report to nobody."""


def test_contenders_take_all_steps_and_come_to_torchs_parameters() -> None:
    found = compete(CONTEST, EFFORT, _silent)
    for timing in found.timings:
        assert [len(each) for each in timing.rounds_s] == [2, 2, 2]
        assert all(seconds > 0 for each in timing.rounds_s for seconds in each)
    checked = {timing.contender: timing.checked for timing in found.timings}
    assert checked == {
        LOCAL.name: "torch.optim's, bit for bit",
        RAW.name: "the bytes that were sent",
        OURS.name: "torch.optim's, bit for bit",
    }
    ratio = found.ratio(OURS.name, LOCAL.name)
    assert 0 < ratio.low <= ratio.median <= ratio.high


def test_contender_that_comes_to_other_parameters_gives_no_times() -> None:
    liar = replace(LOCAL, outcome=Outcome(trained=False))
    with pytest.raises(WrongParametersError, match="must be the bytes that were sent"):
        compete(replace(CONTEST, contenders=[liar]), EFFORT, _silent)


def test_contender_that_breaks_down_says_why() -> None:
    broken = Contender(name="broken", peer="raw_sockets", options={"flow": "duplex"})
    with pytest.raises(ContenderError, match=r"No module named 'benchmarks\.peers\.nobody'"):
        compete(replace(CONTEST, contenders=[replace(broken, peer="nobody")]), EFFORT, _silent)


@pytest.mark.parametrize(
    ("wire", "factor"),
    [
        pytest.param("FP32", 1 + 2.0**-23, id="fp32"),
        pytest.param("BF16", 1 + 2.0**-6, id="bf16"),
        pytest.param("FP16", 1 + 2.0**-9, id="fp16"),
        pytest.param("INT8_BLOCKS", 1.05, id="int8-blocks"),
    ],
)
def test_parameters_beyond_the_bound_are_wrong(wire: WireType, factor: float) -> None:
    model, outcome = model_of(1_000), Outcome(gradients=wire, parameters=wire)
    right = Reference(model, "sgd-momentum", 0)
    right.check(model.initial(), outcome, "exact")
    off = {name: value * np.float32(factor) for name, value in model.initial().items()}
    with pytest.raises(WrongParametersError):
        right.check(off, outcome, "off")


@pytest.mark.parametrize("wire", get_args(WireType))
@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_steps_that_were_not_taken_are_seen(optimizer: OptimizerName, wire: WireType) -> None:
    model, outcome = model_of(1_000), Outcome(gradients=wire, parameters=wire)
    with pytest.raises(WrongParametersError):
        Reference(model, optimizer, 10).check(model.initial(), outcome, "idle")


@pytest.mark.parametrize("parameters", [1_000, 10_000, 100_000])
def test_small_models_have_as_many_parameters_as_asked_for(parameters: int) -> None:
    assert model_of(parameters).parameters == parameters


@pytest.mark.parametrize("millions", [1, 3, 10, 30, 100])
def test_large_models_have_about_as_many_parameters_as_asked_for(millions: int) -> None:
    model = model_of(millions * 1_000_000)
    assert model.parameters == pytest.approx(millions * 1e6, rel=0.06)
    assert len(model.shapes) == 161


def test_25_million_parameters_are_the_resnet_50() -> None:
    model = model_of(PARAMETERS)
    assert model.parameters == PARAMETERS == 25_557_032  # As torchvision counts.
    assert model.shapes["layer4.2.conv2.weight"] == (512, 512, 3, 3)


def test_line_shows_which_size_is_off() -> None:
    sizes = [1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000]
    exact = straight_line(sizes, [0.001 + 4e-9 * size for size in sizes])
    assert exact.base_s == pytest.approx(0.001)
    assert exact.each_s == pytest.approx(4e-9)
    assert max(map(abs, exact.deviations)) < 1e-9
    bent = straight_line(sizes, [0.001 + 4e-9 * size * (1 + (size == sizes[2])) for size in sizes])
    assert max(range(5), key=lambda at: abs(bent.deviations[at])) == 2


def test_verdicts_follow_the_target() -> None:
    measured = Spread.of([1.0, 2.0, 3.0])
    assert row("slower", at_most(1.9), lambda: measured).verdict == "short"
    assert row("as slow", at_most(2.0), lambda: measured).verdict == "ok"
    assert row("as fast", at_least(2.0), lambda: measured).verdict == "ok"

    def nobody() -> Spread:
        raise NotMeasuredError("Ray actor: not installed")

    skipped = row("absent", at_least(2.0), nobody)
    assert (skipped.verdict, skipped.skipped) == ("skipped", "Ray actor: not installed")


def test_record_survives_its_file(tmp_path: Path) -> None:
    published = Record.read(PUBLISHED)
    rows = (*published.rows, Row(name="skipped", unit="x", target=at_most(1), skipped="no reason"))
    record = replace(published, rows=rows)
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == record


def test_document_shows_the_published_results() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_results(text, Record.read(PUBLISHED)) == text, (
        'make bench ARGS="--from benchmarks/results/published.json --publish"'
    )


def test_picture_shows_the_published_results(tmp_path: Path) -> None:
    draw(Record.read(PUBLISHED), tmp_path / PICTURE.name)
    assert (tmp_path / PICTURE.name).read_text() == PICTURE.read_text()
