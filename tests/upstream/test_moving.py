"""What moves below the library: names that are looked for and not found, minors that nobody has tested, caches that
others have cut. Each is answered before a logit is returned."""

import copy
import inspect
import types
from typing import Any

import pytest
import torch
from families import RAGGED, batch, fresh, generate, tiny
from transformers import DynamicCache, StaticCache
from upstream import CACHE, EMBEDS, cache_of, pooled_in, with_cache

import tokenprune.testing
from tokenprune import InputError, TokenPruneError, UnsupportedModelError
from tokenprune.upstream import check


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed transformers is newer than the newest tested one, and no class has been proven yet."""
    monkeypatch.setattr(check, "TESTED", ("5.0", "5.1"))
    monkeypatch.setattr(check, "_PROVEN", set())


def renamed_argument(model: Any, name: str, new: str) -> None:
    """Have the decoder's forward take `new` instead of `name`."""
    decoder = model.get_decoder()
    forward = decoder.forward
    names = [new if one == name else one for one in inspect.signature(forward).parameters if one != "kwargs"]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(**{name if key == new else key: value for key, value in kwargs.items()})

    parameters = [inspect.Parameter(one, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for one in names]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters, rest]
    )
    decoder.forward = types.MethodType(call, decoder)


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_a_right_model_passes_on_an_unknown_minor_and_is_proven_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    proof = tokenprune.testing.self_check
    monkeypatch.setattr(tokenprune.testing, "self_check", lambda adapter: (runs.append(1), proof(adapter)))
    model = tiny(family)
    for _ in range(2):
        session = tokenprune.patch(model, "divprune", keep=0.5)
    assert runs == [1]
    generate(model, batch(family).inputs, 2)
    assert session.traces[-1].n_out == (8, 6, 4)


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("self_check", [True, False])
def test_an_argument_by_a_name_that_nobody_knows_is_named(self_check: bool) -> None:
    model = tiny("llava")
    renamed_argument(model, CACHE, "kv_store")
    with pytest.raises(UnsupportedModelError) as caught:
        tokenprune.patch(model, "divprune", keep=0.5, self_check=self_check)
    for part in ("argument for the KV cache", check.version_of(), "kv_store", "inputs_embeds", "past_key_values"):
        assert part in str(caught.value)


def forget_positions(decoder: Any) -> None:
    """Have the decoder number the tokens that it gets from 0 on, whatever it is told."""
    forward = decoder.forward

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "position_ids": None})

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *inspect.signature(forward).parameters.values(),
        ]
    )
    decoder.forward = types.MethodType(call, decoder)


@pytest.mark.usefixtures("newer")
def test_a_decoder_that_changed_its_ways_fails_the_self_check_on_an_unknown_minor() -> None:
    model = tiny("llava")
    forget_positions(model.get_decoder())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"newer than the tested ones.*self-check.*5\.0 to 5\.1"):
        tokenprune.patch(model, "divprune", keep=0.5)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    tokenprune.patch(model, "divprune", keep=0.5, self_check=False)


def test_a_minor_that_is_tested_needs_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(adapter: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(tokenprune.testing, "self_check", never)
    tokenprune.patch(tiny("llava"), "divprune", keep=0.5)


@pytest.mark.usefixtures("newer")
def test_the_self_check_runs_beside_an_earlier_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llava")
    tokenprune.patch(model, "fastv", keep=0.5, layer=1)
    monkeypatch.setattr(check, "_PROVEN", set())
    session = tokenprune.patch(model, "divprune", keep=0.5)
    generate(model, batch("llava").inputs, 2)
    assert session.traces[-1].n_out == (8, 6, 4)


def test_the_self_check_leaves_the_model_in_training_as_it_was(monkeypatch: pytest.MonkeyPatch, newer: None) -> None:
    model = tiny("llava", text_config={"attention_dropout": 0.5}).train()
    tokenprune.patch(model, "divprune", keep=0.5)
    assert all(module.training for module in model.modules())


def test_what_is_looked_up_in_vain_is_named_with_what_is_there_likely_names_first() -> None:
    config = types.SimpleNamespace(depth=2, hidden_width=3)
    assert check.look_up(config, "size", "depth", role="depth") == 2
    found = r"has no width that is known: looked for config\.hidden_size; transformers \S+ has hidden_width, depth;"
    with pytest.raises(UnsupportedModelError, match=found):
        check.look_up(types.SimpleNamespace(config=config), "config.hidden_size", role="width")


# --- arguments that nobody knows -------------------------------------------------------------------------------------


def test_image_features_by_an_unknown_name_are_refused() -> None:
    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    inputs = batch("llava").inputs
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == 100] = torch.cat(list(pooled_in(inputs))).to(embeds)
    root = model.model

    def merge(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (), {**kwargs, EMBEDS: embeds}

    handle = root.get_decoder().register_forward_pre_hook(merge, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedModelError, match="carry image features"), torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    handle.remove()
    with torch.no_grad():  # placeholders without features are text like any other
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("value", [[torch.ones(4)], (torch.ones(3, 2),), {"a": torch.ones(5)}, torch.ones(7)])
def test_tensors_whose_tokens_cannot_be_told_are_refused(value: Any) -> None:
    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.5)

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "per_token_things": value}

    model.get_decoder().register_forward_pre_hook(add, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedModelError, match="per_token_things"), torch.no_grad():
        model(**fresh(batch("llava").inputs))


# --- caches in other hands -------------------------------------------------------------------------------------------


def pruned(method: str = "divprune", **options: Any) -> tuple[Any, Any, torch.Tensor]:
    model = tiny("llava")
    tokenprune.patch(model, method, keep=0.5, **options)
    out = generate(model, batch("llava", RAGGED[:1]).inputs, 3)
    return model, cache_of(out), out.sequences


def go_on(model: Any, cache: Any, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), **with_cache(cache))


@pytest.mark.parametrize(("method", "options"), [("divprune", {}), ("fastv", {"layer": 1})])
def test_a_cache_whose_tensors_were_cut_is_refused(method: str, options: dict[str, Any]) -> None:
    model, cache, ids = pruned(method, **options)
    go_on(model, copy.deepcopy(cache), ids)
    layer = cache.layers[2]
    layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    with pytest.raises(InputError, match=r"layer 2 of the pruned KV cache holds \d+ tokens"):
        go_on(model, cache, ids)


def test_a_cache_that_was_cut_to_a_length_of_the_sequence_is_refused() -> None:
    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.25)
    prompt = batch("llava", RAGGED[:1])
    cache = DynamicCache()
    with torch.no_grad():
        model(**fresh(prompt.inputs), **with_cache(cache))
    noted = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]

    def ask(*question: int) -> Any:
        ids = torch.cat([prompt.inputs["input_ids"], torch.tensor([question])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, inputs, 3, **with_cache(cache))

    ask(4, 7)
    for layer, n in zip(cache.layers, noted, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]
    with pytest.raises(InputError, match=r"cache\.crop"):
        ask(2, 8, 9, 3)


@pytest.mark.parametrize("n_new", [1, 2])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("rows", [RAGGED, RAGGED[:1], ((9,), (1, (2, 2), 2))], ids=["ragged", "one row", "none left"])
def test_a_pruned_cache_is_refused_by_a_model_that_is_not_patched(rows: Any, kind: Any, n_new: int) -> None:
    model, prompt = tiny("llava"), batch("llava", rows)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    new = torch.full((len(rows), n_new), 7)
    mask = torch.cat([prompt.inputs["attention_mask"], torch.ones_like(new)], 1)
    positions = (mask.cumsum(1) - 1)[:, -n_new:]

    def ask(cache: Any) -> Any:
        inputs = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            return model(**inputs, **with_cache(cache)).logits

    tokenprune.patch(model, "divprune", keep=0.25)
    with torch.no_grad():
        model(**fresh(prompt.inputs), **with_cache(cache))
    length, wanted = cache.get_seq_length(), ask(copy.deepcopy(cache))
    tokenprune.unpatch(model)
    with pytest.raises(InputError, match=r"pruned.*not patched.*patch it again"):
        ask(cache)
    assert cache.get_seq_length() == length
    session = tokenprune.patch(model, "uniform", keep=2)
    with session.pause():
        assert torch.equal(ask(cache), wanted)


def test_a_cache_that_was_lengthened_elsewhere_is_refused() -> None:
    model, cache, ids = pruned()
    layer = cache.layers[0]
    layer.update(layer.keys[:, :, :2], layer.values[:, :, :2])
    with pytest.raises(InputError, match="layer 0 of the pruned KV cache"):
        go_on(model, cache, ids)


def test_a_cache_that_was_built_anew_of_tensors_is_refused() -> None:
    model, cache, ids = pruned()
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(InputError, match="built anew out of its tensors"):
        go_on(model, rebuilt, ids)


def test_a_cache_of_an_unknown_kind_is_refused() -> None:
    class Store:
        """Neither a cache nor anything like it."""

    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    inputs = fresh(batch("llava").inputs)
    with pytest.raises(TokenPruneError, match="Store"), torch.no_grad():
        model(**inputs, **with_cache(Store()))
