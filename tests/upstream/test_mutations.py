"""Internal names of transformers are renamed, one at a time: the library is right or refuses, and says why."""

from collections import Counter
from pathlib import Path

import pytest
from mutated import FAULTS, Results, cache_argument, golden, installed, mutate, outcomes, rename, renamed, unfit

# By default: what a decoder, its layers and its cache are handed and asked for.
FIRST = ("the cache argument", "position_embeddings", "get_seq_length")
ARGUMENTS = (
    "mm_encoder_outputs attention_mask inputs_embeds deepstack_visual_embeds visual_pos_masks hidden_states "
    "position_ids input_ids"
)
FUNCTIONS = "get_decoder create_masks_for_generate get_mask_sizes crop"
ATTRIBUTES = (
    "layer_idx num_key_value_groups is_sliding cumulative_length self_attn k_proj multi_modal_projector vision_tower "
    "layer_norm2 norm2"
)
FIELDS = (
    "layer_types num_hidden_layers _attn_implementation sliding_window image_token_id vision_config "
    "num_attention_heads model_type"
)
CLASSES = "ALL_ATTENTION_FUNCTIONS DynamicLayer eager_attention_forward"
REST = " ".join((ARGUMENTS, FUNCTIONS, ATTRIBUTES, FIELDS, CLASSES)).split()


@pytest.fixture(scope="module")
def wanted() -> Results:
    """All cases on the unmutated transformers."""
    return golden()


def test_every_case_prunes_on_the_unmutated_transformers(wanted: Results) -> None:
    assert {case: why for case, one in wanted.items() if (why := unfit(case, one))} == {}


def check(name: str, wanted: Results) -> Counter[str]:
    """Every case is right or refused; how many are."""
    found = outcomes(name, wanted)
    assert {case: outcome for case, outcome in found.items() if outcome.startswith(FAULTS)} == {}
    return Counter(outcome.split()[0].rstrip(":") for outcome in found.values())


@pytest.mark.parametrize("name", FIRST)
def test_a_renaming_is_survived_or_refused(name: str, wanted: Results) -> None:
    kinds = check(cache_argument() if name == FIRST[0] else name, wanted)
    assert kinds["invalid"] == 0, "the mutation or the dense run of the unpatched model is broken"


@pytest.mark.matrix
@pytest.mark.parametrize("name", REST)
def test_other_renamings_are_survived_or_refused(name: str, wanted: Results) -> None:
    kinds = check(name, wanted)
    if kinds["invalid"] == kinds.total():
        pytest.skip(f"{name} cannot be renamed in this transformers: not even the unpatched model runs")


def test_what_belongs_to_other_packages_keeps_its_name() -> None:
    code = "from functools import cache\nfrom .cache import Cache\nx = torch.backends.cache\ny = self.cache(cache=x)\n"
    new = renamed("cache")
    assert rename(code, "cache").splitlines() == [
        f"from functools import cache as {new}",
        "from .cache import Cache",
        "x = torch.backends.cache",
        f"y = self.{new}({new}=x)",
    ]


def test_the_installed_files_stay_as_they_are(tmp_path: Path) -> None:
    """Copies are hard links: what is rewritten has to be unlinked first."""
    name, file = "get_seq_length", "cache_utils.py"
    before = (installed() / file).read_text()
    assert mutate(name, tmp_path) > 0
    assert (installed() / file).read_text() == before
    assert renamed(name) in (tmp_path / "transformers" / file).read_text()
