"""What is measured of a guest and its link, and what is foretold from it."""

import pytest

from replicator.rates import FadingRate, Rates


def test_nothing_is_foretold_before_anything_is_measured() -> None:
    forecast = Rates().forecast(1000)
    assert (forecast.dirty_rate, forecast.send_rate) == (None, None)
    assert forecast.caught_up_seconds is None and forecast.reason


def test_with_nothing_left_it_has_caught_up() -> None:
    assert Rates().forecast(0).caught_up_seconds == 0


def test_what_is_left_goes_at_what_the_guest_leaves_of_the_send_rate() -> None:
    rates = Rates()
    rates.sent(3000, 1.0)
    rates.lag(7, 0, 10.0)
    rates.lag(7, 1000, 11.0)
    forecast = rates.forecast(4000)
    assert (forecast.dirty_rate, forecast.send_rate) == (1000, 3000)
    assert forecast.caught_up_seconds == 2 and forecast.reason is None


def test_a_guest_faster_than_the_link_is_never_caught_up_with() -> None:
    rates = Rates()
    rates.sent(1 << 20, 1.0)
    rates.lag(7, 0, 10.0)
    rates.lag(7, 5 << 20, 12.0)
    forecast = rates.forecast(1)
    assert forecast.caught_up_seconds is None
    assert forecast.reason == "never: the guest writes 2.5 MiB/s and 1.0 MiB/s are sent"


def test_a_lag_that_begins_anew_with_an_epoch_is_not_negative() -> None:
    rates = Rates()
    rates.lag(7, 500, 0.0)
    rates.lag(8, 100, 1.0)
    assert rates.dirty_rate == 100


def test_why_nothing_is_sent_comes_first() -> None:
    rates = Rates()
    rates.sent(1000, 1.0)
    forecast = rates.forecast(5, standing="paused")
    assert forecast.caught_up_seconds is None and forecast.reason == "paused"


def test_what_is_long_ago_fades() -> None:
    rate = FadingRate()
    rate.add(10_000, 1.0)
    for _ in range(600):
        rate.add(100, 1.0)
    assert rate.value == pytest.approx(100, rel=0.01)
