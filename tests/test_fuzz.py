"""A small, fixed part of tests/fuzz.py, which tries ten thousand requests, and thousands of files and command lines."""

import fuzz


def test_damaged_input_is_refused_or_is_what_it_says():
    count = {"file": 100, "flags": 24, "request": 400}
    ends, faults = fuzz.fuzz(0, {what: list(range(number)) for what, number in count.items()})
    assert not faults
    for what, number in count.items():
        tried = {end: ends[what, end] for end in ("accepted", "refused")}
        assert sum(tried.values()) == number and min(tried.values()) > number / 20, ends
