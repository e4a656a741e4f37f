"""Attribution keeps its promises on every model of the zoo: books that close, an output that stays, kernels that agree."""

from __future__ import annotations

import pytest
import torch

from headscope.probe.attribution.ledger import DECLARED
from tests.attribution_coverage import TITLE, BookRow, build, check, explain, line, section, unfit
from tests.coverage import TABLE, keep_attribution
from tests.models import ENTRIES, Entry

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SAMPLE = {
    "Llama (GQA)", "Llama (left padding)", "Qwen3", "Mixtral", "GPT-OSS (sinks)", "DeepSeek-V3 (MLA)", "BERT (padding)", "DeBERTa-v2",
    "T5 (relative bias)", "Whisper", "ViT", "Swin (windows)", "CLIP (two towers)", "SD3 (joint)", "PyG GATConv", "nn.MultiheadAttention",
    "exp / sum", "baddbmm with a bias",
}  # fmt: skip
ASKED = [entry for entry in ENTRIES if unfit(entry) is None]


@pytest.mark.parametrize(
    "entry", [pytest.param(entry, id=entry.name, marks=[] if entry.name in SAMPLE else [pytest.mark.slow]) for entry in ASKED]
)
def test_the_books_close_the_output_stays_and_fused_attention_agrees(entry: Entry) -> None:
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    row = check(entry)
    assert row.problems == []
    assert row.exact is not None
    assert row.single is not None
    assert abs(sum(row.shares.values()) - 1) < 1e-9


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.name in SAMPLE], ids=lambda entry: entry.name)
def test_only_declared_absorbers_and_named_operations_absorb(entry: Entry) -> None:
    if entry.missing() is not None:
        pytest.skip("cannot be built here")
    result, _ = explain(entry, *build(entry, torch.float64))
    assert result.ledger is not None
    assert set(result.ledger.by_kind()) <= {*DECLARED, *(["unruled"] if result.unruled else [])}


def test_the_sample_names_models_that_exist_and_the_zoo_is_large_enough() -> None:
    assert {entry.name for entry in ASKED} >= SAMPLE
    assert len(ASKED) >= 45


def test_a_broken_row_is_shown_as_broken() -> None:
    row = BookRow(ASKED[0], exact=0.5, problems=["the books do not close in float64: 5e-01 of their largest number is missing"])
    assert not row.works
    assert "**the books do not close" in line(row)
    text = section([row], {"Reformer": "no gradient"})
    assert "the books of 0 close" in text
    assert "- Reformer: no gradient" in text


def test_the_section_survives_a_new_table_and_replaces_itself() -> None:
    first = keep_attribution("# Coverage\n\nold\n", section([], {}))
    assert first.count(TITLE) == 1
    assert keep_attribution("# Coverage\n\nnew\n", first).startswith("# Coverage\n\nnew\n\n## Attribution\n")
    assert keep_attribution(first, section([], {})) == first


def test_the_table_in_the_documentation_lists_every_entry() -> None:
    text = TABLE.read_text(encoding="utf-8").partition(f"\n{TITLE}\n")[2]
    assert [entry.name for entry in ENTRIES if f"| {entry.name} |" not in text and f"- {entry.name}:" not in text] == []
