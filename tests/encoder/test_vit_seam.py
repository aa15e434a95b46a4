"""Vision encoders that are not what their rows say: whatever is missed is named, nothing is reduced in silence."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import snapshot
from torch import Tensor, nn
from vits import HEADS, NAMES, PREFIX, WIDTH, answer, blocks_of, inputs, run, tiny

import tokenprune
from tokenprune import InputError, UnsupportedModelError, running
from tokenprune.encoder.adapter import find_encoder
from tokenprune.upstream.check import version_of
from tokenprune.upstream.tower import Tower

HF, TIMM = [name for name in NAMES if name.startswith("hf")], [name for name in NAMES if name.startswith("timm")]


def row_of(model: nn.Module) -> tuple[Any, Tower]:
    adapter = find_encoder(model)
    assert adapter is not None
    return adapter.host, adapter.tower


@pytest.mark.parametrize("name", NAMES)
def test_tokens_before_the_patches_and_the_width_are_found(name):
    host, tower = row_of(tiny(name))
    assert (tower.prefix(host), tower.width(host), tower.patches(host)) == (PREFIX.get(name, 1), WIDTH, 16)


# --- roles that are not there ---------------------------------------------------------------------


def check_refused(model: nn.Module, *parts: str, method: str = "tome", **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError) as caught:
        tokenprune.patch(model, method, **(options or {"r": 1}))
    assert [part for part in parts if part not in str(caught.value)] == []
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "name", ["hf vit", "hf clip", "hf siglip2", "hf dinov3", "timm vit", "timm eva02", "timm beit"]
)
@pytest.mark.parametrize("part", [2, 3])
def test_a_block_whose_second_half_is_not_found_is_refused(name, part):
    model = tiny(name)
    _, tower = row_of(model)
    block, path = blocks_of(model)[1], tower.parts[part]
    block._modules[f"{path}_renamed"] = block._modules.pop(path)
    role = ("norm before the MLP", "MLP")[part - 2]
    check_refused(model, role, path, f"{path}_renamed", f"{tower.library} {version_of(tower.library)}")


@pytest.mark.parametrize("name", ["hf vit", "hf clip", "hf dinov2", "timm vit", "timm beit"])
@pytest.mark.parametrize("method", ["tome", "spatten"])
def test_an_attention_that_is_not_found_is_refused(name, method):
    model = tiny(name)
    _, tower = row_of(model)
    block, path = blocks_of(model)[2], tower.parts[1]
    block._modules[f"{path}_renamed"] = block._modules.pop(path)
    options = {"r": 1, "proportional": False} if method == "tome" else {"tokens": 0.5}
    role = "attention" if name == "timm beit" else "keys"
    check_refused(model, f"no {role}", f"{path}_renamed", version_of(tower.library), method=method, **options)


@pytest.mark.parametrize("name", ["hf clip", "timm vit"])
def test_blocks_that_are_not_found_are_refused(name):
    model = tiny(name)
    host, tower = row_of(model)
    place, _, path = tower.paths[0].rpartition(".")
    owner = host.get_submodule(place)
    owner._modules[f"{path}_renamed"] = owner._modules.pop(path)
    check_refused(model, "list of blocks", tower.paths[0], version_of(tower.library))


class Without:
    """A config without one of its fields."""

    def __init__(self, config: Any, field: str) -> None:
        self.original, self.field = config, field

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("original", "field", self.field):
            raise AttributeError(name)
        return getattr(self.original, name)


@pytest.mark.parametrize(("name", "field", "role"), [
    ("hf vit", "hidden_size", "width"),
    ("hf clip", "image_size", "size of images"),
    ("hf dinov2", "patch_size", "size of patches"),
    ("hf siglip2", "num_patches", "number of patches"),
    ("hf siglip", "_attn_implementation", "attention implementation"),
])  # fmt: skip
def test_fields_of_the_config_that_are_not_found_are_refused(name, field, role):
    model = tiny(name)
    host, _ = row_of(model)
    host.config = Without(host.config, field)
    check_refused(model, role, field, f"transformers {version_of()}")


@pytest.mark.parametrize(("name", "field", "role"), [
    ("timm vit", "num_prefix_tokens", "number of tokens before the patches"),
    ("timm eva", "embed_dim", "width"),
    ("timm eva02", "rope", "rotary embeddings"),
    ("timm beit", "grad_checkpointing", "flag of gradient checkpointing"),
    ("timm beit", "rel_pos_bias", "table of relative positions"),
])  # fmt: skip
def test_attributes_of_encoders_that_are_not_found_are_refused(name, field, role):
    model = tiny(name)
    delattr(model, field)
    check_refused(model, role, field, f"timm {version_of('timm')}")


@pytest.mark.parametrize("name", ["hf vit", "hf deit", "hf clip", "hf dinov2 registers", "hf dinov3"])
def test_tokens_before_the_patches_that_are_not_found_are_refused(name):
    model = tiny(name)
    host, _ = row_of(model)
    parameters = host.embeddings._parameters
    last = [key for key in parameters if "mask" not in key and key != "position_embeddings"][-1]
    parameters[f"{last}_renamed"] = parameters.pop(last)
    check_refused(model, "tokens before the patches", last, f"{last}_renamed", r=1, proportional=False)


def with_forward(model: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    """`model`, whose blocks have another forward in their class."""
    for block in blocks_of(model):
        cls: Any = type(block)
        block.__class__ = type(cls.__name__, (cls,), {"forward": forward, "whole": cls.forward})
    return model


@pytest.mark.parametrize(("name", "role"), [("timm vit", "attention mask"), ("timm eva02", "rotary embeddings")])
def test_arguments_of_blocks_that_are_not_found_are_refused(name, role):
    def forward(self: Any, x: Tensor, turning: Any = None) -> Any:
        return self.whole(x)

    model = with_forward(tiny(name), forward)
    options = {"r": 1} if role == "attention mask" else {"r": 1, "proportional": False}
    check_refused(model, f"argument for {'an ' if 'mask' in role else ''}{role}", "x, turning", **options)


@pytest.mark.parametrize("name", ["hf clip", "hf vit"])
def test_heads_that_cannot_be_counted_are_refused(name):
    model = tiny(name)
    for module in model.modules():
        for field in ("num_heads", "num_attention_heads"):
            if getattr(module, field, None) == HEADS:
                delattr(module, field)
        if hasattr(module, "config"):
            module.config = Without(module.config, "num_attention_heads")
    check_refused(model, "number of heads", version_of())


# --- calls that are not understood ----------------------------------------------------------------


def test_a_tensor_that_is_not_known_is_refused_and_a_flag_is_handed_on():
    seen = []

    def forward(self: Any, x: Tensor, attn_mask: Any = None, other: Any = None, **kwargs: Any) -> Any:
        seen.append(other)
        return self.whole(x, attn_mask=attn_mask)

    model = with_forward(tiny("timm vit"), forward)
    tokenprune.patch(model, "tome", r=3)
    x = torch.randn(2, 17, WIDTH)

    def go(other: Any) -> None:
        with torch.no_grad():
            y = x
            for block in model.blocks:
                y = block(y, other=other)

    for other in (None, True, 3, "sdpa", {"a": None}, torch.tensor(2.0)):
        go(other)
        assert seen[-1] is other
    for other in (torch.ones(5, 5), {"masks": [torch.ones(17)]}, (torch.ones(2, 16),)):
        with pytest.raises(UnsupportedModelError, match=rf"'other'.*known are 'attn_mask'.*timm {version_of('timm')}"):
            go(other)
        assert running.innermost() is None or not running.innermost().direct


def test_a_tensor_with_a_row_for_every_token_is_shortened():
    seen = []

    def forward(self: Any, x: Tensor, attn_mask: Any = None, marks: Any = None) -> Any:
        seen.append((x, marks))
        return self.whole(x, attn_mask=attn_mask)

    model = with_forward(tiny("timm vit"), forward)
    session = tokenprune.patch(model, "tome", r=3)
    x, marks = torch.randn(2, 17, WIDTH), torch.arange(34).view(2, 17)
    seen.clear()
    with torch.no_grad():
        for block in model.blocks:
            x = block(x, marks=marks)
    assert [one.shape[1] for _, one in seen] == [one.shape[1] for one, _ in seen] == [17, 14, 11, 8]
    assert torch.equal(seen[0][1], marks)
    assert torch.equal(seen[3][1][:, 0], marks[:, 0])
    assert session.traces[-1].n_out == (4, 4)


def test_hidden_states_may_come_by_name():
    model, given = tiny("timm vit"), inputs("timm vit")
    tokenprune.patch(model, "tome", r=3)
    x = torch.randn(2, 17, WIDTH)

    def go(by_name: bool) -> Tensor:
        y = x
        with torch.no_grad():
            for block in model.blocks:
                y = block(x=y) if by_name else block(y)
        return y

    assert torch.equal(go(True), go(False))
    with pytest.raises(InputError, match="looked for were hidden states as 'x'"):
        model.blocks[0](states=x)
    run(model, given)


# --- forwards that end otherwise ------------------------------------------------------------------


@pytest.mark.parametrize(("n_called", "told"), [(0, "none was called"), (2, "block 1 of blocks 0 to 3 was the last")])
def test_blocks_that_a_forward_leaves_out_are_noticed(n_called, told):
    model, given = tiny("timm vit"), inputs("timm vit")
    dense = copy.deepcopy(model)
    session = tokenprune.patch(model, "tome", r=3)
    for one in (model, dense):
        one.forward_features = lambda x, one=one, **kwargs: one.blocks[:n_called](one._pos_embed(one.patch_embed(x)))
    with pytest.raises(InputError, match=told):
        run(model, given)
    assert running.innermost() is None
    session.remove()
    assert torch.equal(run(model, given), run(dense, given))


@pytest.mark.parametrize("name", ["hf clip", "hf dinov3", "hf siglip"])
def test_hidden_states_that_leave_the_encoder_short_are_noticed(name):
    model, given = tiny(name), inputs(name)
    tokenprune.patch(model, "tome", r=3)
    wanted = answer(run(model, given))
    short = 4 + PREFIX.get(name, 1)

    def shorten(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0][:, :short], *output[1:]) if isinstance(output, tuple) else output[:, :short]

    handle = blocks_of(model)[-1].register_forward_hook(shorten)
    with pytest.raises(InputError, match=rf"returned hidden states of \[{short}\] tokens, where all {short + 12} were"):
        run(model, given)
    handle.remove()
    assert torch.equal(answer(run(model, given)), wanted)
    assert running.innermost() is None


def test_a_block_that_returns_another_number_of_tokens_is_noticed():
    def forward(self: Any, x: Tensor, attn_mask: Any = None) -> Any:
        y = self.whole(x, attn_mask=attn_mask)
        return y[:, 1:] if y.shape[1] > 7 and torch.is_grad_enabled() else y

    model, given = with_forward(tiny("timm vit"), forward), inputs("timm vit")
    tokenprune.patch(model, "tome", r=3)
    run(model, given)
    with pytest.raises(InputError, match=r"block 0 of the encoder returned a tensor \[2, 13, 24\], but 14 tokens"):
        model(**given)
    assert running.innermost() is None
