"""Charts: values lie where the scale says, labels keep clear of one another, numbers read as people write them."""

import pytest

from pipeline.units import duration, number, power, share, size
from report.chart import (
    BOTTOM,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Curve,
    Point,
    horizontal,
    logarithmic,
    smoothed,
    thinned,
    vertical,
)

NB = "\N{NO-BREAK SPACE}"
TIMES = "\N{MULTIPLICATION SIGN}"


def chart(points: list[Point]) -> Chart:
    x, y = horizontal("x", [0, *(p.x for p in points)]), logarithmic("y", [p.y for p in points])
    return Chart("name", "title", "caption", "description", x, y, points)


def test_a_linear_scale_is_proportional_and_a_twentieth_wider_than_its_values() -> None:
    axis = horizontal("x", [0, 100])
    assert (axis.at(0), axis.at(105)) == (LEFT, RIGHT)
    assert axis.at(52.5) == (LEFT + RIGHT) / 2
    assert axis.ticks == [0, 20, 40, 60, 80, 100]


def test_large_values_are_high_on_the_paper() -> None:
    axis = vertical("y", [1, 3])
    assert BOTTOM >= axis.at(1) > axis.at(2) > axis.at(3) >= TOP


def test_on_a_logarithmic_scale_each_power_of_ten_is_as_high_as_the_next() -> None:
    axis = logarithmic("y", [0.002, 0.5])
    assert axis.ticks == pytest.approx([0.001, 0.01, 0.1, 1.0])
    assert [axis.at(tick) for tick in axis.ticks] == [218.0, 156.0, 94.0, 32.0]  # BOTTOM to TOP in thirds


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([2.384, 2.415], ["2.39", "2.40", "2.41"]),
        ([0, 222], ["0", "50", "100", "150", "200"]),
        ([0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0, 5000], ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
    ],
)
def test_the_ticks_of_a_scale_have_as_many_decimals_as_their_step(values: list[float], shown: list[str]) -> None:
    axis = horizontal("x", values)
    assert [axis.show(tick) for tick in axis.ticks] == shown


@pytest.mark.parametrize("values", [[5.0], [0.0], [3, 3, 3], [-2.0, -1.0], [1e-9, 2e-9], [1e12, 2e12]])
def test_any_values_have_a_scale(values: list[float]) -> None:
    axis = vertical("y", values)
    assert axis.low < axis.high and all(TOP <= axis.at(value) <= BOTTOM for value in values)
    assert 2 <= len(axis.ticks) <= 12 and axis.ticks == sorted(set(axis.ticks))


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [1e-14, 10.0]])
def test_any_values_have_a_logarithmic_scale(values: list[float]) -> None:
    axis = logarithmic("y", values)
    assert 2 <= len(axis.ticks) <= 8 and all(TOP <= axis.at(value or 1e-30) <= BOTTOM for value in values)


def test_a_curve_is_a_path_through_its_points() -> None:
    x, y = horizontal("x", [0, 100]), vertical("y", [0, 10])
    made = Chart("n", "t", "c", "d", x, y).path(Curve("a", [(0, 0), (105, 10.5)]))
    assert made == f"M{LEFT},{BOTTOM}L{RIGHT},{TOP}"


def test_labels_of_near_points_do_not_overlap() -> None:
    points = [Point(f"Q{bits}_K_M", 100 + bits, 0.1 + bits / 1000) for bits in range(2, 6)] + [Point("F16", 270, 0.3)]
    boxes = []
    for point, x, y, anchor in chart(points).labels():
        width = LETTER * len(point.label)
        left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
        assert 0 <= left and left + width <= WIDTH + 1
        boxes.append((left, left + width, y))
    for index, (left, right, y) in enumerate(boxes):
        assert not any(left < r and start < right and abs(y - base) < 9 for start, r, base in boxes[index + 1 :])


def test_a_long_curve_keeps_its_mean_and_a_short_one_its_points() -> None:
    pairs = [(float(step), float(step % 5)) for step in range(10_000)]
    thin = thinned(pairs, 100)
    assert len(thin) == 100 and sum(y for _, y in thin) / 100 == pytest.approx(2.0)
    assert thinned(pairs[:50], 100) == pairs[:50]


def test_smoothing_starts_at_the_first_loss_and_leaves_a_constant_as_it_is() -> None:
    assert smoothed([(1.0, 4.0), (2.0, 4.0)]) == [(1.0, pytest.approx(4.0)), (2.0, pytest.approx(4.0))]
    assert smoothed([(1.0, 4.0), (2.0, 0.0)])[1][1] == pytest.approx(4.0 * 0.09 / 0.19)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (size(0), "0 bytes"), (size(999), "999 bytes"), (size(1500), "1.5 kB"), (size(144_810_848), "145 MB"),
        (size(999_999_999), "1.0 GB"), (size(5e15), "5000 TB"),
        (duration(0.04), "0.0 s"), (duration(9.96), "10 s"), (duration(59.6), "1 min"), (duration(498.3), "8 min 18 s"),
        (duration(3599.7), "1 h 0 min"), (duration(7380), "2 h 3 min"),
        (share(1), "100%"), (share(0.99999), ">99.9%"), (share(0.964), "96.4%"), (share(0.0001), "<0.1%"),
        (share(0), "0%"),
        (number(134515008), "134,515,008"), (number(21283.7), "21,284"), (number(98.04), "98.0"),
        (number(2.3181), "2.32"), (number(0.001), "0.00100"), (number(0.0009996), "0.00100"),
        (number(2.31e-6), f"2.31 {TIMES} 10⁻⁶"),
        (number(0.0), "0"), (number(9.999), "10.0"), (number(-0.5), "-0.500"), (number(float("nan")), "nan"),
        (power(1.0), "1"), (power(0.001), "0.001"), (power(1e-14), "10⁻¹⁴"),
    ],
)  # fmt: skip
def test_numbers_read_as_people_write_them(shown: str, text: str) -> None:
    assert shown.replace(NB, " ") == text
