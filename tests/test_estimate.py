"""The estimate of a cutover's last pass, from passes made up."""

import pytest

from replicator.estimate import Estimate

MIB = 1 << 20


def test_before_a_pass_nothing_is_known() -> None:
    assert Estimate().seconds(MIB) is None
    assert Estimate().report(MIB) == {"dirty_rate": None, "send_rate": None, "estimate_ms": None}


def test_fixed_cost_and_cost_of_a_byte_are_told_apart() -> None:
    estimate = Estimate()
    for mib in (64, 32, 8, 2):
        estimate.note_pass(mib * MIB, 0.1 + mib / 100, 0.0)
    assert estimate.seconds(0) == pytest.approx(0.1)
    assert estimate.seconds(16 * MIB) == pytest.approx(0.26)


def test_passes_of_one_size_are_extrapolated_upwards_only() -> None:
    estimate = Estimate()
    for _ in range(3):
        estimate.note_pass(10 * MIB, 0.5, 0.0)
    assert estimate.seconds(MIB) == pytest.approx(0.5)
    assert estimate.seconds(20 * MIB) == pytest.approx(1.0)


def test_passes_that_scatter_get_a_margin() -> None:
    steady, noisy = Estimate(), Estimate()
    for mib, noise in ((64, 0.2), (32, -0.2), (8, 0.2), (2, -0.2)):
        steady.note_pass(mib * MIB, 0.5 + mib / 100, 0.0)
        noisy.note_pass(mib * MIB, 0.5 + mib / 100 + noise, 0.0)
    low, high = steady.seconds(16 * MIB), noisy.seconds(16 * MIB)
    assert low is not None and high is not None
    assert high > low + 0.2


def test_the_promotion_costs_two_commits_more() -> None:
    estimate = Estimate()
    estimate.note_pass(0, 0.2, 0.05)
    assert estimate.seconds(0) == pytest.approx(0.3)


def test_small_passes_that_took_longer_never_make_bytes_cost_less_than_nothing() -> None:
    estimate = Estimate()
    for mib, seconds in ((64, 0.1), (1, 0.9)):
        estimate.note_pass(mib * MIB, seconds, 0.0)
    small, large = estimate.seconds(0), estimate.seconds(1 << 40)
    assert small is not None and large is not None
    assert 0 < small <= large


def test_a_guest_that_outruns_the_link_is_named() -> None:
    estimate = Estimate()
    assert not estimate.outrun
    estimate.note_pass(10 * MIB, 1.0, 0.0)
    estimate.note_dirty(5 * MIB, 1.0)
    assert not estimate.outrun
    for _ in range(5):
        estimate.note_dirty(30 * MIB, 1.0)
    assert estimate.outrun
