"""A preview is the step, bit for bit, however the tensors are cut; and it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from messages import bytes_of
from parity.cases import OPTIMIZERS as CASES
from parity.cases import OptimizerCase
from torch import Tensor

from optserve_server.core import preview as preview_module
from optserve_server.core.device import Device
from optserve_server.core.norms import ROW_ELEMENTS, norm_of
from optserve_server.core.optimizers import OPTIMIZERS, build, effective_hyperparameters
from optserve_server.core.preview import PIECE_ELEMENTS, Cuts, Piece, Preview, cut

UNIT_BYTES = 64  # What torch's fused kernels treat alike, whatever the processor's registers hold.
STEPS = 3
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
FIRST_OF_KIND = {case.kind: case for case in reversed(CASES)}
FUSED = [
    (name, dtype)
    for name in ("sgd-momentum", "adam", "adamw", "adagrad")
    for dtype in OPTIMIZERS[next(case.kind for case in CASES if case.name == name)].fused_dtypes
]

# So small that ragged tails of every kind cost nothing: still 64 bytes of any data type, or more.
SMALL_PIECE = 256
SMALL_SHAPES: Sequence[tuple[int, ...]] = (
    *((), (0, 3), (1,), (1, 1, 1), (7, 9), (33, 3)),
    *((SMALL_PIECE - 1,), (SMALL_PIECE,), (SMALL_PIECE + 1,)),
    *((3, SMALL_PIECE), (5 * SMALL_PIECE - 1,), (17, 101), (2, 3, 5, 7, 11)),
)


@dataclass(slots=True)
class Standing:
    """What a preview asks of a session: how often it has changed."""

    version: int = 0


class Training:
    """Parameters in two groups, torch's optimizer over them, and gradients for them."""

    def __init__(
        self, case: OptimizerCase, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._generator = torch.Generator().manual_seed(4)
        self.kind = OPTIMIZERS[case.kind]
        self.standing = Standing()
        self.parameters = [self._random(shape, dtype) for shape in shapes]
        groups = []
        for number, own in enumerate(({}, case.own)):
            given = {**case.hyperparameters, **own}
            if dtype is torch.float16 and "eps" in self.kind.defaults:
                given["eps"] = 1e-3  # torch's default is zero in FP16.
            in_force = effective_hyperparameters(self.kind, given, [dtype])
            groups.append((self.parameters[number::2], in_force))
        self.optimizer = build(self.kind, groups)
        self._cuts = Cuts(self.parameters, self.optimizer)

    def gradients(self) -> list[Tensor]:
        """Return new gradients, one for each parameter."""
        return [self._random(each.shape, each.dtype) for each in self.parameters]

    def preview(self) -> Preview:
        """Look ahead of the next step."""
        return Preview(self.standing, self._cuts, self.kind, Device("cpu"))

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take the step itself, whole."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        self.kind.step(self.optimizer)
        self.standing.version += 1

    def everything(self) -> list[bytes]:
        """Return all that a preview could have touched."""
        return [
            *map(bytes_of, self.parameters),
            *(
                f"{name}: {value}".encode() if not isinstance(value, Tensor) else bytes_of(value)
                for parameter in self.parameters
                for name, value in self.optimizer.state.get(parameter, {}).items()
            ),
            repr([{**group, "params": 0} for group in self.optimizer.param_groups]).encode(),
        ]

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(dtype)


def _pieces(preview: Preview) -> list[Piece]:
    """Return all that can be had, of the last parameter first, as a backward pass gives it."""
    return [piece for pieces in reversed(preview.pieces) for piece in pieces or ()]


def _joined(
    preview: Preview, gradients: Sequence[Tensor], *, batch: int
) -> Mapping[int, list[Tensor]]:
    """Compute all pieces, so many at a time; return those of each parameter."""
    found: dict[int, list[Tensor]] = {}
    pieces = _pieces(preview)
    for first in range(0, len(pieces), batch):
        some = pieces[first : first + batch]
        values = preview.compute([(piece, gradients[piece.position]) for piece in some])
        for piece, value in zip(some, values, strict=True):
            assert value.shape == (piece.last - piece.first,)
            found.setdefault(piece.position, []).append(value)
    return found


def _assert_foretold(training: Training, *, batch: int) -> int:
    """Take a step; return of how many parameters a preview knew the bits."""
    gradients, preview = training.gradients(), training.preview()
    before = training.everything(), [bytes_of(each) for each in gradients]
    assert preview.norm is None
    foretold = _joined(preview, gradients, batch=batch)
    if any(pieces is None for pieces in preview.pieces):
        assert preview.norm is None
    else:
        near = 0.0 if preview_module.PIECE_ELEMENTS % ROW_ELEMENTS == 0 else 1e-3
        assert preview.norm == pytest.approx(norm_of(gradients), rel=near, abs=0), "to the bit"
    assert (training.everything(), [bytes_of(each) for each in gradients]) == before
    assert (preview.is_void, preview.came_true) == (False, False)
    training.step(gradients)
    assert (preview.is_void, preview.came_true) == (True, True)
    for position, values in foretold.items():
        parameter = training.parameters[position]
        assert bytes_of(torch.cat(values)) == bytes_of(parameter), tuple(parameter.shape)
    return len(foretold)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_module, "PIECE_ELEMENTS", SMALL_PIECE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Calculate in one thread: to bring two together costs more than such small tensors do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("batch", [1, 1000], ids=["one-by-one", "together"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_pieces_joined_are_what_the_step_gives_and_nothing_is_touched(
    case: OptimizerCase, dtype: torch.dtype, batch: int
) -> None:
    training = Training(case, dtype, SMALL_SHAPES)
    for _ in range(STEPS):
        known = _assert_foretold(training, batch=batch)
        small = sum(0 < each.numel() <= SMALL_PIECE for each in training.parameters)
        assert known >= small
    if all(group.get("fused") for group in training.optimizer.param_groups):
        assert known == len(SMALL_SHAPES) - 1, "all but the empty one are cut, however large"


@pytest.mark.parametrize("case", FIRST_OF_KIND.values(), ids=FIRST_OF_KIND)
def test_it_holds_around_the_size_that_a_piece_has(case: OptimizerCase) -> None:
    counts = (PIECE_ELEMENTS - 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 3 * PIECE_ELEMENTS + 12345)
    training = Training(case, torch.float32, [(count,) for count in counts])
    whole = 2 if "fused" not in training.kind.defaults else len(counts)
    for _ in range(2):
        assert _assert_foretold(training, batch=2) == whole


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("name", "dtype"), FUSED, ids=[f"{name}-{dtype}".replace("torch.", "") for name, dtype in FUSED]
)
@pytest.mark.parametrize("threads", [1, 2], ids=["one-thread", "two-threads"])
def test_fused_bits_are_the_same_for_any_number_of_threads(
    threads: int, name: str, dtype: torch.dtype
) -> None:
    case = next(case for case in CASES if case.name == name)
    # Cut and whole, with one thread and with two: each is compared with whole steps of one.
    training, alone = (Training(case, dtype, [(20_011,), (17, 101)]) for _ in range(2))
    for _ in range(STEPS):
        torch.set_num_threads(threads)
        _assert_foretold(training, batch=7)
        torch.set_num_threads(1)
        alone.step(alone.gradients())
        assert training.everything() == alone.everything()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_piece_is_a_multiple_of_what_the_kernels_treat_alike(dtype: torch.dtype) -> None:
    assert PIECE_ELEMENTS * dtype.itemsize % UNIT_BYTES == 0
    assert SMALL_PIECE * dtype.itemsize % UNIT_BYTES == 0
    assert PIECE_ELEMENTS % ROW_ELEMENTS == 0, "or their norms would not make the whole one"


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="how a scalar differs from a vector is known of these processors",
)
def test_pieces_of_another_size_would_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why PIECE_ELEMENTS is what it is: the end of a piece would be calculated one by one."""
    case = next(case for case in CASES if case.name == "sgd-momentum")
    for elements, differs in ((4096, False), (4097, True)):
        monkeypatch.setattr(preview_module, "PIECE_ELEMENTS", elements)
        training = Training(case, torch.float32, [(50_000,)])
        came_otherwise = 0
        for _ in range(STEPS):
            gradients = training.gradients()
            foretold = torch.cat(_joined(training.preview(), gradients, batch=3)[0])
            training.step(gradients)
            came_otherwise += int((foretold != training.parameters[0]).sum())
        assert (came_otherwise > 0) == differs, elements


def test_kernels_that_promise_nothing_get_whole_tensors() -> None:
    large = torch.empty(PIECE_ELEMENTS + 1)
    assert cut(0, large, fused=False) is None
    assert cut(0, large[1:], fused=False) == [Piece(position=0, first=0, last=PIECE_ELEMENTS)]
    assert cut(3, large, fused=True) == [
        Piece(position=3, first=0, last=PIECE_ELEMENTS),
        Piece(position=3, first=PIECE_ELEMENTS, last=PIECE_ELEMENTS + 1),
    ]
    assert cut(0, torch.empty(0, 3), fused=True) == []
    assert cut(0, torch.empty(()), fused=False) == [Piece(position=0, first=0, last=1)]


def test_copies_are_on_the_devices_of_their_originals() -> None:
    """Beside CUDA, the steps of kernels that are not fused are counted on the CPU."""
    originals = [torch.ones((), device=device) for device in ("cpu", "meta", "cpu")]
    copies = preview_module._copies(originals)
    assert [each.device for each in copies] == [each.device for each in originals]
    assert (copies[0].item(), copies[2].item()) == (1.0, 1.0)


def test_a_preview_sees_tensors_that_have_been_moved() -> None:
    """A session moves its parameters into memory that it shares, and keeps the tensors."""
    case = FIRST_OF_KIND["Adam"]
    training = Training(case, torch.float32, [(2 * PIECE_ELEMENTS,)])
    _assert_foretold(training, batch=1)
    moved = training.parameters[0].clone()
    training.parameters[0].data = moved
    training.optimizer.state[training.parameters[0]]["exp_avg"].data = torch.ones_like(moved)
    _assert_foretold(training, batch=1)
