"""What was measured can be written down, read back and put in a table; what is undefined is None there, never a number."""

from __future__ import annotations

import json
import math

import pytest
import torch

from headscope.kernels.errors import InputError
from headscope.probe.call import AttentionSite
from headscope.probe.health.measures import HEAD_FIELDS, STREAM_FIELDS, GradientMeasures, HeadMeasures, StreamMeasures

SITE = AttentionSite("layers.1.attn#0", "layers.1.attn", 0, 1, "self", 2, 1, 4, 4, "sdpa")


def heads() -> HeadMeasures:
    numbers = {name: torch.tensor([float(place), math.nan], dtype=torch.float64) for place, name in enumerate(HEAD_FIELDS)}
    numbers["sink_key"] = torch.tensor([3, -1])
    return HeadMeasures(SITE, 1, 5, 3.0, True, True, undefined={"entropy": "one visible key"}, **numbers)


def test_heads_become_json_without_nan_and_come_back_equal() -> None:
    found = heads()
    text = json.dumps(found.to_dict(), allow_nan=False)
    again = HeadMeasures.from_dict(json.loads(text))
    for name in HEAD_FIELDS:
        torch.testing.assert_close(again.numbers()[name], found.numbers()[name], equal_nan=True, rtol=0, atol=0)
    assert (again.site, again.undefined, again.keys, again.sink_key.dtype) == (SITE, found.undefined, 3.0, torch.int64)


def test_a_table_has_one_line_a_head_with_none_for_what_is_undefined() -> None:
    first, second = heads().rows()
    assert (first["site"], first["layer"], first["head"], first["sink_key"]) == ("layers.1.attn#0", 1, 0, 3)
    assert first["hub"] == HEAD_FIELDS.index("hub")
    assert second["hub"] is None


def test_streams_and_gradients_come_back_equal() -> None:
    stream = StreamMeasures("layers.1", "output", 1, 0, 7, 4, residual=0.5, undefined={"update": "not seen"})
    written = json.dumps(stream.to_dict(), allow_nan=False)
    again = StreamMeasures.from_dict(json.loads(written))
    assert again.residual == 0.5
    assert again.undefined == stream.undefined
    assert all(math.isnan(getattr(again, name)) for name in STREAM_FIELDS if name != "residual")
    assert stream.row()["update"] is None
    slopes = GradientMeasures(SITE, *(torch.tensor([1.0, math.nan], dtype=torch.float64) for _ in range(4)))
    back = GradientMeasures.from_dict(json.loads(json.dumps(slopes.to_dict(), allow_nan=False)))
    torch.testing.assert_close(back.ratio, slopes.ratio, equal_nan=True)
    assert [row["query"] for row in back.rows()] == [1.0, None]


def test_a_damaged_record_is_refused_with_what_is_missing() -> None:
    written = heads().to_dict()
    del written["hub"]
    with pytest.raises(InputError, match="no hub in what should be HeadMeasures"):
        HeadMeasures.from_dict(written)
    written = heads().to_dict() | {"hub": [1.0]}
    with pytest.raises(InputError, match="hub is not a list of 2 numbers"):
        HeadMeasures.from_dict(written)
