"""The page of metrics, to the letter."""

from __future__ import annotations

from pathlib import Path

from edgepack.server.metrics import Counter, Gauge, Histogram, Metrics, process_memory


def test_a_counter_has_one_line_for_each_set_of_labels() -> None:
    counter = Counter("hits_total", "Hits.", ("path", "status"))
    counter.add(path="/b", status="200")
    counter.add(2, path="/a", status="200")
    counter.add(path="/b", status="200")

    assert list(counter.lines()) == [
        "# HELP hits_total Hits.",
        "# TYPE hits_total counter",
        'hits_total{path="/a",status="200"} 2',
        'hits_total{path="/b",status="200"} 2',
    ]


def test_a_counter_without_labels_begins_at_zero() -> None:
    assert list(Counter("hits_total", "Hits.").lines())[-1] == "hits_total 0"


def test_a_bucket_counts_what_is_at_most_its_end() -> None:
    histogram = Histogram("seconds", "Time.", (0.5, 1))
    for value in (0.25, 0.5, 0.75, 1, 8):
        histogram.observe(value)

    assert list(histogram.lines())[2:] == [
        'seconds_bucket{le="0.5"} 2',
        'seconds_bucket{le="1"} 4',
        'seconds_bucket{le="+Inf"} 5',
        "seconds_sum 10.5",
        "seconds_count 5",
    ]


def test_label_values_are_escaped() -> None:
    gauge = Gauge("info", "A\nB\\C", [({"model": 'a"b\\c\nd'}, 1)])

    assert list(gauge.lines()) == [
        "# HELP info A\\nB\\\\C",
        "# TYPE info gauge",
        'info{model="a\\"b\\\\c\\nd"} 1',
    ]


def test_a_gauge_without_samples_is_left_out() -> None:
    assert list(Gauge("nothing", "Nothing.", []).lines()) == []


def test_every_series_of_the_interface_is_on_the_page() -> None:
    page = Metrics().text()

    names = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
    assert names == {
        "edgepack_requests_total", "edgepack_prompt_tokens_total", "edgepack_prompt_tokens_cached_total",
        "edgepack_generation_tokens_total", "edgepack_refused_total", "edgepack_aborted_total",
        "edgepack_time_to_first_token_seconds", "edgepack_inter_token_latency_seconds",
        "edgepack_request_seconds",
    }  # fmt: skip
    assert page.endswith("\n")


def test_memory_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n", encoding="ascii")

    assert process_memory(status) == {"resident": 1 << 20, "peak": 2 << 20}
    assert process_memory(tmp_path / "none") == {}
