"""The table of published models, and models given as rows, against published counts."""

import pytest

from famc.cost import sums
from famc.cost.models import known, of_row, published

# Rows whose published figure is no count: rounded in a paper, a label or a nominal size. What the dimensions give lies
# within 3.5 % of it; further off lies none.
ROUNDED = {key for key, row in published().items() if row.parameters and not row.exact}


@pytest.mark.parametrize("key", sorted(k for k, row in published().items() if row.exact))
def test_published_counts_are_met_exactly(key: str) -> None:
    made = known(key)
    assert sums.parameters(made) == published()[key].parameters
    assert dict(made.parts) == {"text": sums.parameters(made)}


@pytest.mark.parametrize("key", sorted(ROUNDED))
def test_rounded_figures_are_met_as_far_as_they_say(key: str) -> None:
    assert sums.parameters(known(key)) == pytest.approx(published()[key].parameters, rel=0.035)


def test_the_table_holds_counts_of_many_families() -> None:
    assert len(published()) == 185
    assert sum(row.exact for row in published().values()) == 75
    assert all(row.source for row in published().values() if row.parameters)
    assert all(row.config_source for row in published().values())


def test_active_parameters_are_those_that_the_names_say() -> None:
    for key, active in (
        ("mixtral-8x7b", 12.9e9),
        ("deepseek-v2", 21e9),
        ("kimi-k2", 32e9),
        ("qwen3-30b-a3b", 3.3e9),
    ):
        assert sums.active(known(key)) == pytest.approx(active, rel=0.03)


def test_windows_and_parallel_halves_follow_from_the_family() -> None:
    assert [(s.layers, s.block.attentions[0].window) for s in known("gemma2-2b").stacks] == [
        (13, 4096),
        (13, None),
    ]
    assert [(s.layers, s.block.attentions[0].window) for s in known("mistral-7b-v0.2").stacks] == [(32, None)]
    assert known("pythia-1b").stacks[0].block.parallel
    assert not known("pythia-1b").stacks[0].block.gated
    assert not known("bloom-h14336-l70-a112").stacks[0].block.rope


LLAMA = {
    "family": "unheard-of", "layers": "32", "hidden": "4096", "ffn": "11008", "mlp_type": "glu", "heads": "32",
    "kv_heads": "", "head_dim": "", "vocab": "32000", "tied_embeddings": "no", "norm": "rms",
}  # fmt: skip


def test_a_row_of_an_unknown_family_is_what_its_columns_say() -> None:
    """Llama-2-7B's dimensions and count."""
    assert sums.parameters(of_row(LLAMA)) == 6_738_415_616


def test_an_unknown_family_of_gpt2s_make_has_its_biases() -> None:
    """GPT-2's dimensions and count."""
    row = {
        "family": "unheard-of", "layers": "12", "hidden": "768", "ffn": "3072", "mlp_type": "mlp", "heads": "12",
        "vocab": "50257", "tied_embeddings": "yes", "learned_pos": "1024", "norm": "ln",
    }  # fmt: skip
    assert sums.parameters(of_row(row)) == 124_439_808
    assert sums.parameters(of_row(row | {"bias": "none"})) < 124_439_808


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ""}, "layers is missing"),
        ({"hidden": "0"}, "hidden is '0'"),
        ({"vocab": "many"}, "vocab is 'many'"),
        ({"heads": "2.5"}, "heads is '2.5'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"mlp_type": "conv"}, "mlp_type is 'conv'"),
        ({"kv_heads": "5"}, "32 heads cannot share 5"),
        ({"n_experts": "8"}, "top_k is missing"),
        ({"attn": "mla"}, "mla_kv_lora is missing"),
    ],
)
def test_a_bad_column_is_named(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_row(LLAMA | change)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no published model 'lama3-8b'.*llama3-8b"):
        known("lama3-8b")
