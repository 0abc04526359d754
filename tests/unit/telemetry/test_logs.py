from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from optserve_server.telemetry import logs

RFC_3339_UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"

log = logging.getLogger("optserve_server.test")


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


def one_object(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    def refuse(constant: str) -> object:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(one_line(capsys), parse_constant=refuse)
    assert isinstance(record, dict)
    return record


class Tensor:
    def __repr__(self) -> str:
        return "tensor([0.25, 0.75])"


def test_text_is_time_level_logger_message_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    log.info("session opened", extra={"session": "ab12", "reserved_bytes": 512, "shared": False})
    assert re.fullmatch(
        RFC_3339_UTC + r" INFO optserve_server\.test session opened"
        r" session=ab12 reserved_bytes=512 shared=false",
        one_line(capsys),
    )


def test_json_is_one_object_with_the_facts_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    log.warning("session %s", "ab12", extra={"step": 7, "lr": 0.5, "group": "naïve", "field": None})
    record = one_object(capsys)
    assert re.fullmatch(RFC_3339_UTC, str(record.pop("time")))
    assert record == {
        "level": "warning",
        "logger": "optserve_server.test",
        "message": "session ab12",
        "step": 7,
        "lr": 0.5,
        "group": "naïve",
        "field": None,
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_part_of_its_record(
    capsys: pytest.CaptureFixture[str], log_format: logs.LogFormat
) -> None:
    logs.configure(log_format, "info")
    log.error("step failed", extra={"step": 3}, exc_info=ValueError("first line\nsecond line"))
    line = one_line(capsys)
    assert "ValueError: first line\\nsecond line" in line
    assert "step failed" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\u2028b", "a\x1b[31mb", "a\x00b"])
def test_no_client_can_forge_a_second_line(
    capsys: pytest.CaptureFixture[str], log_format: logs.LogFormat, text: str
) -> None:
    logs.configure(log_format, "info")
    log.info("named %s", text, extra={"group": text})
    line = one_line(capsys)
    assert line.isprintable()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_is_no_scalar_is_shown_by_its_type_alone(
    capsys: pytest.CaptureFixture[str], log_format: logs.LogFormat
) -> None:
    logs.configure(log_format, "info")
    log.info("step", extra={"gradient": Tensor(), "shape": (3, 4), "data": b"secret"})
    line = one_line(capsys)
    assert "<Tensor>" in line
    assert "<tuple>" in line
    assert "<bytes>" in line
    assert "0.25" not in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("value", "written"),
    [
        pytest.param("plain", "plain", id="word"),
        pytest.param("two words", '"two words"', id="space"),
        pytest.param("", '""', id="empty"),
        pytest.param("a=b", '"a=b"', id="equals"),
        pytest.param('say "a"', '"say \\"a\\""', id="quote"),
        pytest.param(True, "true", id="bool"),
        pytest.param(None, "null", id="none"),
        pytest.param(0.1, "0.1", id="float"),
        pytest.param(float("inf"), "inf", id="infinity"),
    ],
)
def test_a_fact_in_text_ends_where_it_seems_to(
    capsys: pytest.CaptureFixture[str], value: object, written: str
) -> None:
    logs.configure("text", "info")
    log.info("set", extra={"value": value})
    assert one_line(capsys).endswith(f" set value={written}")


def test_json_has_no_number_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    log.info("loss", extra={"loss": float("nan")})
    assert one_object(capsys)["loss"] == "nan"


def test_a_fact_does_not_pass_for_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    log.info("odd", extra={"level": "error", "time": "never", "logger": "root"})
    record = one_object(capsys)
    assert (record["level"], record["logger"]) == ("info", "optserve_server.test")
    assert record["time"] != "never"


def test_below_the_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "WARNING")
    log.info("quiet")
    assert capsys.readouterr().err == ""


def test_configuring_again_replaces_what_was(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    logs.configure("json", "debug")
    log.debug("once")
    assert one_object(capsys)["message"] == "once"


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        logs.configure("text", "loud")


def test_a_warning_is_a_record_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings has put the original back.
        warnings.warn("slow path", UserWarning, stacklevel=1)
    record = one_object(capsys)
    assert (record["level"], record["logger"]) == ("warning", "py.warnings")
    assert "slow path" in str(record["message"])
