"""Pictures of a search: drawn from any trace, and the same from the same trace."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from workers.ml.measurements import Measurement, ModelMeasures
from workers.ml.recovery.pictures import affinity_picture, trace_picture
from workers.ml.recovery.proxies import ProxyReading
from workers.ml.recovery.trace import RAW, CandidateRecord, Dial, SearchResult


def reading(still: int) -> ProxyReading:
    return ProxyReading(0.5, 1.0, -1.0, 0.2, 0.1, Measurement(still, 100), Measurement(90, 100), Measurement(80, 100))


def point(label: str, strength: float, *, taken: bool = False, looked: str = "full") -> CandidateRecord:
    measures = ModelMeasures(Measurement(3, 100), Measurement(80, 100), accuracy=Measurement(90, 100))
    return CandidateRecord(
        "scale-down",
        strength,
        {},
        label=label,
        looked=looked,
        proxies=reading(int(100 - 100 * strength)),
        measures=measures if looked == "full" else None,
        taken=taken,
        passed=taken,
    )


def result(trace: tuple[CandidateRecord, ...], dials: tuple[Dial, ...] = ()) -> SearchResult:
    return SearchResult(
        raw=point(RAW, 0.0),
        base=ModelMeasures(),
        trace=trace,
        dials=dials,
        winner=None,
        candidates=(),
        records=(),
        candidate_drifts=(),
        embedding_drift={"raw fine-tune": [0.0, 0.4, 0.9], "candidate": [0.0, 0.2, 0.3]},
        evaluations=1,
        seconds=1.0,
    )


SHARES = {f"model.layers.{layer}.self_attn.{leaf}": 0.25 for layer in (0, 1) for leaf in ("q_proj", "v_proj")}


@pytest.mark.parametrize("count", [1, 5])
def test_every_dial_has_a_panel_and_its_name_stays_text(count):
    labels = [f"method {place}" for place in range(count)]
    trace = tuple(point(label, s, taken=s == 1.0 and label == labels[0]) for label in labels for s in (0.5, 1.0))
    found = result(trace, tuple(Dial(label, 1.0, {}, SHARES) for label in labels))
    for picture in (trace_picture(found), affinity_picture(found)):
        texts = [node.text for node in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
        assert all(label in texts for label in labels)
    assert trace_picture(found) == trace_picture(found)
    assert affinity_picture(found) == affinity_picture(found)


def test_a_search_that_could_prepare_nothing_still_gives_a_picture():
    failed = CandidateRecord("antidote", 0.1, {}, label="antidote", why="not tried: needs harmful rows")
    found = result((failed, point("scale-down", 0.5, looked="proxies")))
    assert trace_picture(found).startswith(b"<?xml")
    assert affinity_picture(result((failed,))).startswith(b"<?xml")
    assert trace_picture(result((failed,))).startswith(b"<?xml")
