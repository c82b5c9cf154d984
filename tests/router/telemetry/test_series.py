from kagami_router.telemetry.series import Registry


def test_a_counter_keeps_its_name() -> None:
    new = Registry()
    new.counter("tgi_request_count", "Requests").add()
    assert new.render() == (
        "# HELP tgi_request_count Requests\n# TYPE tgi_request_count counter\ntgi_request_count 1\n"
    )


def test_every_value_of_a_label_has_its_line() -> None:
    new = Registry()
    new.gauges("up", "Up", "rank", ("0", "1"))["1"].set(1)
    assert new.render().splitlines()[2:] == ['up{rank="0"} 0', 'up{rank="1"} 1']


def test_a_histogram_counts_at_and_below_its_bounds() -> None:
    new = Registry()
    histogram = new.histogram("h", "H", (1.0, 2.5))
    for value in (1, 2, 200):
        histogram.observe(value)
    assert new.render().splitlines()[2:] == [
        'h_bucket{le="1"} 1',
        'h_bucket{le="2.5"} 2',
        'h_bucket{le="+Inf"} 3',
        "h_sum 203",
        "h_count 3",
    ]
