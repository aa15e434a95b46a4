"""SpAtten against an independent simulation: the unpatched model at full length with eager attention and explicit
masks, whose attention matrices are added up and whose tokens are hidden layer by layer and step by step."""

import copy
import math

import pytest
import torch
from families import FAMILIES, batch, fresh, generate, implementations, tiny, twins
from oracle import check_tokens
from test_layers import check_layers
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer
from upstream import MASK, cache_of, with_cache

import tokenprune
from tokenprune import ops
from tokenprune.decoder.pruned_cache import ledger_of
from tokenprune.ops import dequantize_planes, quantize_planes

N_LAYERS = 4
KEPT = (1.0, 0.8, 0.6, 0.4)


def text_model(kind, implementation="sdpa"):
    sizes = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=128, **sizes)
    else:
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            **sizes,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape) * (1.0 if "emb" in name or "wte" in name else 0.25))
    return model


def layers_of(model):
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def masked_run(model, ids, masks):
    """Logits `[L, V]` and attention `[layers][H, L, L]` of one row at full length, each layer under its own mask."""
    handles = []
    for layer, mask in zip(layers_of(model), masks, strict=True):

        def hook(module, args, kwargs, mask=mask):
            additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
            if len(args) > 2:  # GPT-2 hands its mask over by position
                return (args[0], args[1], additive, *args[3:]), kwargs
            return args, {**kwargs, MASK: additive}

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            out = model(ids[None], use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[0], [one[0] for one in out.attentions]


class Simulation:
    """One row of text under SpAtten, by the rule: everything is recomputed at full length for every token."""

    def __init__(self, model, prompt, *, first, recent, interval, persistent=True):
        self.model, self.first, self.recent, self.interval = model, first, recent, interval
        self.persistent = persistent
        self.ids = prompt
        self.scores = torch.zeros(len(prompt))
        length = len(prompt)
        self.masks = [torch.ones(length, length, dtype=torch.bool).tril() for _ in range(N_LAYERS)]
        self.alive = [set(range(length)) for _ in range(N_LAYERS)]
        movable = range(first, length - recent)
        for layer in range(N_LAYERS):
            if layer and persistent:
                keep = math.floor(len(movable) * KEPT[layer] + 1e-6)
                ranked = sorted(self.alive[layer - 1] & set(movable), key=lambda j: (-self.scores[j].item(), j))
                self.alive[layer] = (self.alive[layer - 1] - set(movable)) | set(ranked[:keep])
                gone = sorted(set(range(length)) - self.alive[layer])
                self.masks[layer][:, gone] = False
                self.masks[layer].fill_diagonal_(True)
            self.logits, attention = masked_run(model, self.ids, self.masks)
            rows = sorted(self.alive[layer])
            received = attention[layer][:, rows].sum((0, 1))
            received[[j for j in range(length) if j not in self.alive[layer]]] = 0
            self.scores += received
        self.evict()

    def evict(self):
        length = len(self.ids)
        if not self.persistent or length % self.interval:
            return
        movable = set(range(self.first, length - self.recent))
        for layer in range(N_LAYERS):
            keep = math.floor(len(movable) * KEPT[layer] + 1e-6)
            ranked = sorted(self.alive[layer] & movable, key=lambda j: (-self.scores[j].item(), j))
            self.alive[layer] -= set(ranked[keep:])

    def step(self, token):
        """Process one more token; logits `[V]` for the next one."""
        self.ids = torch.cat([self.ids, torch.tensor([token])])
        self.scores = torch.cat([self.scores, torch.zeros(1)])
        length = len(self.ids)
        seen = set(range(length))
        self.masks = [torch.nn.functional.pad(mask, (0, 1, 0, 1)) for mask in self.masks]
        for layer in range(N_LAYERS):
            self.alive[layer].add(length - 1)
            if not self.persistent:
                movable = set(range(self.first, length - self.recent))
                keep = math.floor(len(movable) * KEPT[layer] + 1e-6)
                ranked = sorted(seen & movable, key=lambda j: (-self.scores[j].item(), j))
                seen = (seen - movable) | set(ranked[:keep])
            looked_at = self.alive[layer] if self.persistent else seen
            self.masks[layer][-1] = torch.tensor([j in looked_at for j in range(length)])
            self.logits, attention = masked_run(self.model, self.ids, self.masks)
            self.scores += attention[layer][:, -1].sum(0)
        self.evict()
        return self.logits[-1]


def ragged_text():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 60, (n,), generator=generator) for n in (23, 17, 20)]
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return rows, {"input_ids": ids, "attention_mask": mask}


def spatten(**options):
    return tokenprune.SpAtten(
        **{"tokens": KEPT, "protect_text": False, "keep_first": 2, "keep_recent": 3, "interval": 1, **options}
    )


@pytest.mark.parametrize(
    "options", [{}, {"interval": 5}, {"kv": "per_step"}], ids=["each step", "interval", "per step"]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_leaves_prompt_and_cache_as_the_simulation_says(kind, implementation, options):
    dense = text_model(kind, "eager")
    model = copy.deepcopy(dense)
    model.set_attn_implementation(implementation)
    tokenprune.patch(model, spatten(**options))
    rows, inputs = ragged_text()
    out = generate(model, inputs, 6, suppress_tokens=None)
    for row, prompt in enumerate(rows):
        simulation = Simulation(
            dense, prompt, first=2, recent=3, interval=options.get("interval", 1), persistent="kv" not in options
        )
        wanted = simulation.logits[-1]
        for step, token in enumerate(out.sequences[row, -6:].tolist()):
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)
            wanted = simulation.step(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_leave_layer_by_layer(family):
    implementation = implementations(family)[0]
    dense, model = twins(family, implementation)
    kept = (1.0, 1.0, 0.5, 0.25) if family == "qwen3_vl" else KEPT
    session = tokenprune.patch(model, tokenprune.SpAtten(tokens=kept))
    ragged = batch(family)
    out = generate(model, ragged.inputs, 4)
    assert session.traces[-1].n_out == tuple(math.floor(n * kept[-1] + 1e-6) for n in (16, 12, 8))
    check_layers(dense, family, out, session.traces, ragged, 4)


def ranked(scores, among, n):
    return set(sorted(among, key=lambda i: (-scores[i].item(), i))[:n])


class HeadSimulation:
    """One row of text with head pruning alone: full recomputation with zeros for heads before the output projection."""

    def __init__(self, model, prompt, kept):
        self.model, self.ids, self.kept = model, prompt, kept
        self.scores = torch.zeros(4)
        self.masks = [torch.zeros(0, 4) for _ in range(N_LAYERS)]
        self.forward(len(prompt))

    def forward(self, n_new):
        """Process the last `n_new` tokens: the heads of a layer are chosen by what the layers before it added up."""
        self.masks = [torch.cat([mask, torch.ones(n_new, 4)]) for mask in self.masks]
        alive = set(range(4))
        for layer in range(N_LAYERS):
            n_keep = max(1, int(4 * self.kept[layer] + 1e-6))
            if n_keep < 4:
                alive = ranked(self.scores, alive, n_keep)
                self.masks[layer][-n_new:, [i for i in range(4) if i not in alive]] = 0
            self.logits, inputs = self.run()
            self.scores = self.scores + inputs[layer][-n_new:].abs().sum((0, 2))
        return self.logits[-1]

    def run(self):
        inputs, handles = [], []
        for layer, mask in zip(layers_of(self.model), self.masks, strict=True):

            def hook(module, args, mask=mask):
                heads = args[0][0].view(len(mask), 4, -1) * mask[:, :, None]
                inputs.append(heads)
                return (heads.flatten(1)[None],)

            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(hook))
        with torch.no_grad():
            logits = self.model(self.ids[None], use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return logits, inputs

    def step(self, token):
        self.ids = torch.cat([self.ids, torch.tensor([token])])
        return self.forward(1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_heads_that_left_are_zeros_before_the_output_projection(implementation):
    dense = text_model("llama", implementation)
    model = copy.deepcopy(dense)
    kept = (1.0, 0.75, 0.5, 0.25)
    tokenprune.patch(model, spatten(tokens=1.0, heads=kept))
    rows, inputs = ragged_text()
    out = generate(model, inputs, 5, suppress_tokens=None)
    for row, prompt in enumerate(rows):
        simulation = HeadSimulation(dense, prompt, kept)
        wanted = simulation.logits[-1]
        for step, token in enumerate(out.sequences[row, -5:].tolist()):
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)
            wanted = simulation.step(token)


def fewer_values(n_prompt, share):
    """An attention function in which queries after the prompt take only the values with the largest probabilities."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        length = query.shape[2]
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(
            ~torch.ones(length, length).tril().bool(), -torch.inf
        )
        weights = logits.softmax(-1)
        for i in range(n_prompt, length):
            n = max(1, int((i + 1) * share + 1e-6))
            order = weights[:, :, i].argsort(dim=-1, descending=True, stable=True)
            weights[:, :, i] = weights[:, :, i].scatter(2, order[:, :, n:], 0.0)
        return (weights @ value).transpose(1, 2), weights

    return attend


def test_decoding_reads_only_the_values_with_the_largest_probabilities():
    dense = text_model("llama", "sdpa")
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, spatten(tokens=1.0, values=0.4))
    rows, inputs = ragged_text()
    out = generate(model, inputs, 5, suppress_tokens=None)
    for row, prompt in enumerate(rows):
        AttentionInterface.register("fewer_values", fewer_values(len(prompt), 0.4))
        dense.set_attn_implementation("fewer_values")
        with torch.no_grad():
            wanted = dense(torch.cat([prompt, out.sequences[row, -5:-1]])[None], use_cache=False).logits[0]
        check_tokens(out, row, 5, wanted)
    traffic = session.traffic
    assert traffic.dense == traffic.tokens == traffic.heads > traffic.values == traffic.read


@pytest.mark.parametrize("window", [None, 8, 40])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_traffic_counts_what_the_unpruned_model_would_see(implementation, window):
    model = text_model("llama", implementation)
    if window is not None:
        sizes = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
        config = MistralConfig(**{**sizes, "sliding_window": window})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    rows, inputs = ragged_text()
    seen = [min(window or 99, length + step) for length in map(len, rows) for step in range(1, 6)]
    bytes_of_a_key = 2 * 2 * 8 * 4  # and its value: two heads of eight numbers of four bytes
    for options in ({}, {"cache_implementation": "static"}):
        session = tokenprune.patch(model, spatten(tokens=1.0, heads=0.7))
        generate(model, inputs, 6, suppress_tokens=None, **options)
        traffic = session.traffic
        assert traffic.dense == traffic.tokens == N_LAYERS * bytes_of_a_key * sum(seen)


@pytest.mark.parametrize("static", [False, True])
def test_traffic_counts_tokens_that_left_as_seen_by_the_unpruned_model(static):
    model = text_model("llama")
    session = tokenprune.patch(model, spatten())
    rows, inputs = ragged_text()
    generate(model, inputs, 4, suppress_tokens=None, **({"cache_implementation": "static"} if static else {}))
    tokens = sum(len(row) + step for row in rows for step in range(1, 4))
    assert session.traffic is None
    session = tokenprune.patch(model, spatten(values=0.5))
    generate(model, inputs, 4, suppress_tokens=None, **({"cache_implementation": "static"} if static else {}))
    assert session.traffic.tokens < session.traffic.dense == N_LAYERS * 128 * tokens


def test_traffic_is_that_of_the_last_prompt_also_without_a_cache():
    model = text_model("llama")
    session = tokenprune.patch(model, spatten(tokens=1.0, heads=0.7))
    _, inputs = ragged_text()
    generate(model, inputs, 4, suppress_tokens=None)
    assert session.traffic.steps == 3 * 3 * N_LAYERS
    with session.pause():
        generate(model, inputs, 2, suppress_tokens=None, use_cache=False)
    assert session.traffic.steps == 3 * 3 * N_LAYERS
    generate(model, inputs, 2, suppress_tokens=None, use_cache=False)
    assert (session.traffic.steps, session.traffic.dense) == (0, 0.0)


def test_keeping_everything_is_bit_identical():
    dense = text_model("llama")
    model = copy.deepcopy(dense)
    _, inputs = ragged_text()
    wanted = generate(dense, inputs, 4, suppress_tokens=None)
    session = tokenprune.patch(model, spatten(tokens=1.0))
    out = generate(model, inputs, 4, suppress_tokens=None)
    for found, logits in zip(out.logits, wanted.logits, strict=True):
        assert torch.equal(found, logits)
    assert session.traces == ()


@pytest.mark.parametrize("options", [{}, {"kv": "per_step"}, {"heads": (1.0, 1.0, 0.5, 0.5), "values": 0.5}])
def test_a_static_cache_gives_what_a_growing_one_gives(options):
    model = text_model("llama")
    tokenprune.patch(model, spatten(**options))
    _, inputs = ragged_text()
    wanted = generate(model, inputs, 6, suppress_tokens=None)
    out = generate(model, inputs, 6, suppress_tokens=None, cache_implementation="static")
    for found, logits in zip(out.logits, wanted.logits, strict=True):
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_a_row_alone_is_the_row_of_a_batch():
    model = text_model("llama")
    tokenprune.patch(model, spatten(interval=4, heads=0.8, values=0.6))
    rows, inputs = ragged_text()
    together = generate(model, inputs, 9, suppress_tokens=None)
    for row, prompt in enumerate(rows):
        alone = generate(model, {"input_ids": prompt[None]}, 9, suppress_tokens=None)
        for step in range(9):
            torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], atol=1e-5, rtol=1e-5)


def test_every_returned_beam_scores_as_the_simulation_says():
    dense = text_model("llama", "eager")
    model = copy.deepcopy(dense)
    tokenprune.patch(model, spatten())
    rows, inputs = ragged_text()
    out = generate(model, inputs, 5, num_beams=3, num_return_sequences=2, output_scores=True, suppress_tokens=None)
    for i, ids in enumerate(out.sequences):
        simulation = Simulation(dense, rows[i // 2], first=2, recent=3, interval=1)
        logits, total = simulation.logits[-1], 0.0
        for token in ids[-5:].tolist():
            total += float(logits.log_softmax(-1)[token])
            logits = simulation.step(token)
        assert float(out.sequences_scores[i]) == pytest.approx(total / 5, abs=1e-3)


def test_a_second_turn_goes_on_with_the_smaller_cache():
    dense = text_model("llama", "eager")
    model = copy.deepcopy(dense)
    tokenprune.patch(model, spatten())
    prompt = ragged_text()[0][0]
    first = generate(model, {"input_ids": prompt[None]}, 3, suppress_tokens=None)
    held = [layer.keys.shape[2] for layer in cache_of(first).layers]
    assert held[0] == len(prompt) + 2
    assert sorted(set(held), reverse=True) == held
    turn = torch.cat([first.sequences, torch.tensor([[7, 8, 9, 10, 11]])], dim=1)
    out = generate(model, {"input_ids": turn, **with_cache(cache_of(first))}, 3, suppress_tokens=None)
    assert out.sequences.shape[1] == turn.shape[1] + 3
    held = [layer.keys.shape[2] for layer in cache_of(out).layers]
    movable = turn.shape[1] + 2 - 2 - 3
    assert held == [turn.shape[1] + 2 - movable + math.floor(movable * kept + 1e-6) for kept in KEPT]


@pytest.mark.parametrize(
    ("default", "n", "kept", "n_kept"), [(torch.float32, 75, 0.84, 63), (torch.bfloat16, 74, 0.85, 62)], ids=str
)
def test_fractions_of_a_count_are_those_of_python_whatever_the_default_dtype(default, n, kept, n_kept, monkeypatch):
    """0.84 of 75 is 63, in fp32 a little less; 0.85 of 74 is 62.9, in bfloat16 63."""
    counts = []
    attend = ops.decode_attention
    monkeypatch.setattr(
        ops, "decode_attention", lambda *args, **kwargs: (counts.append(kwargs["n_values"]), attend(*args, **kwargs))[1]
    )
    model = text_model("llama")
    tokenprune.patch(model, spatten(tokens=(1.0, kept, kept, kept), values=(kept, 1.0, 1.0, 1.0)))
    prompt = torch.randint(2, 60, (1, n + 4), generator=torch.Generator().manual_seed(3))
    torch.set_default_dtype(default)
    try:
        generate(model, {"input_ids": prompt[:, : n - 1]}, 2, suppress_tokens=None)
        assert [int(count) for count in counts if count is not None] == [n_kept]  # of the keys of the first layer
        out = generate(model, {"input_ids": prompt}, 2, suppress_tokens=None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [layer.keys.shape[2] for layer in cache_of(out).layers] == [n + 5, *[5 + n_kept] * 3]


def test_calls_of_several_tokens_that_pass_a_multiple_of_the_interval_shrink_the_cache():
    model = text_model("llama")
    tokenprune.patch(model, spatten(interval=4))
    rows, inputs = ragged_text()
    more = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(4))

    def run(ids, mask, new):
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, **with_cache(cache))
            for pair in new.split(2, dim=1):
                mask = torch.cat([mask, torch.ones_like(pair)], dim=1)
                logits.append(model(input_ids=pair, attention_mask=mask, **with_cache(cache)).logits)
        return torch.cat(logits, dim=1), [layer.keys.shape[2] for layer in cache.layers]

    together, _ = run(*inputs.values(), more)
    for row, prompt in enumerate(rows):
        alone, held = run(prompt[None], torch.ones(1, len(prompt), dtype=torch.long), more[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
        if len(prompt) == 17:  # 29 in the end, always odd; the last call passed 28
            assert held == [29 - 24 + math.floor(24 * kept + 1e-6) for kept in KEPT]


def test_tokens_that_are_taken_back_leave_no_trace_in_the_cache():
    """As assisted decoding does with guesses that were wrong."""
    model = text_model("llama")
    tokenprune.patch(model, spatten(interval=50))
    prompt = ragged_text()[0][0][None]

    def run(guesses):
        cache = DynamicCache(config=model.config)
        logits = []
        with torch.no_grad():
            model(input_ids=prompt, **with_cache(cache))
            for token in guesses:
                model(input_ids=torch.tensor([[token]]), **with_cache(cache))
            if guesses:
                cache.crop(-len(guesses))
            for token in (11, 12, 13):
                logits.append(model(input_ids=torch.tensor([[token]]), **with_cache(cache)).logits)
        return torch.cat(logits), [layer.keys for layer in cache.layers]

    (plain, keys), (detour, others) = run(()), run((7, 8))
    torch.testing.assert_close(detour, plain)
    for one, other in zip(keys, others, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("between", ["paused", "cropped and paused", "another method", "before"])
def test_a_row_is_the_same_alone_whatever_went_through_its_cache_without_scores(between):
    """Tokens that came meanwhile have no scores yet, and padding is known as such ever after."""
    model, rows = tiny("llava"), ((7, (2, 3), 9), (4, (2, 3), 2))
    method = tokenprune.SpAtten(tokens=KEPT, protect_text=False, keep_first=2, keep_recent=3, interval=4)
    more = torch.randint(5, 95, (2, 15), generator=torch.Generator().manual_seed(4))

    def run(prompt, more):
        cache, logits = DynamicCache(config=model.config), []
        mask = prompt.inputs["attention_mask"]

        def call(ids, **inputs):
            nonlocal mask
            mask = torch.cat([mask, torch.ones_like(ids)], 1)[:, : cache.get_seq_length() + ids.shape[1]]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **with_cache(cache)}
            with torch.no_grad():
                logits.append(model(**{**inputs, **given}).logits[:, -1])

        first = fresh(prompt.inputs)
        session = tokenprune.patch(model, method)
        if between == "before":
            with session.pause():
                call(first.pop("input_ids"), **first)
        else:
            call(first.pop("input_ids"), **first)
        if between == "cropped and paused":
            cache.crop(-2)
        if between == "another method":
            tokenprune.patch(model, tokenprune.FastV(layer=2))
            image = batch("llava", ((2, (2, 2), 1),) * len(more), seeds=(9,) * len(more)).inputs
            call(**{"ids": image.pop("input_ids"), **image})
            tokenprune.patch(model, method)
        elif between != "before":
            with session.pause():
                call(more[:, :5])
        for ids in more[:, 5:].split(2, dim=1):
            call(ids)
        tokenprune.unpatch(model)
        return torch.stack(logits, 1), [layer.keys.shape[2] for layer in cache.layers]

    together, held = run(batch("llava", rows), more)
    assert held[0] > held[1] > held[3]
    for row, parts in enumerate(rows):
        alone, _ = run(batch("llava", (parts,), seeds=(row,)), more[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_a_crop_that_cannot_be_leaves_the_cache_as_it_was():
    model = text_model("llama")
    tokenprune.patch(model, spatten())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(2, 26)[None], **with_cache(cache))

    def held():
        return cache.get_seq_length(), [layer.keys.shape[2] for layer in cache.layers], ledger_of(cache).parts

    before = held()
    with pytest.raises(tokenprune.InputError, match=r"pruned tokens.*keep_recent") as raised:
        cache.crop(-9)
    assert "visual" not in str(raised.value)
    assert held() == before
    with pytest.raises(tokenprune.InputError, match="pruned tokens"):
        cache.crop(-24)
    cache.layers[-1].crop = lambda n: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cache.crop(-2)
    assert held()[2] is before[2]


def test_a_positive_number_crops_a_pruned_cache_as_an_unpruned_one():
    model = text_model("llama")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            model(input_ids=torch.arange(2, 26)[None], **with_cache(cache))
        tokenprune.patch(model, spatten())
    for n in (22, 30):
        try:
            caches[0].crop(n)
        except ValueError:
            with pytest.raises(ValueError, match="positive"):
                caches[1].crop(n)
        else:
            caches[1].crop(n)
        assert caches[1].get_seq_length() == caches[0].get_seq_length()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"tokens": 0.0}, "fraction in \\(0, 1\\]"),
        ({"tokens": 1.5}, "fraction in \\(0, 1\\]"),
        ({"tokens": (0.5, 0.5)}, "starts with 1.0"),
        ({"tokens": (1.0, 0.5, 0.7)}, "never grows"),
        ({"heads": (0.9, 0.5)}, "starts with 1.0"),
        ({"values": 0}, "values must be"),
        ({"keep": 0.5}, "no keep"),
        ({"keep_recent": 0, "protect_text": False}, "keep_recent must be an int of at least 1"),
        ({"kv": "sometimes"}, "'persistent' or 'per_step'"),
        ({"kv": "per_step"}, "protect_text=False"),
        ({"interval": 0}, "interval"),
        ({"protect_text": 1}, "protect_text"),
    ],
)
def test_options_out_of_range_are_told(options, found):
    with pytest.raises(tokenprune.OptionError, match=found):
        tokenprune.SpAtten(**options)


@pytest.mark.parametrize("options", [{}, {"kv": "per_step"}, {"heads": (1.0, 0.75, 0.5, 0.25)}, {"quantize": "4+4"}])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_under_autocast_steps_have_the_dtype_of_dense_ones_and_scores_stay_fp32(implementation, options):
    model = text_model("llama", implementation)
    _, inputs = ragged_text()
    seen = []
    for layer in layers_of(model):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = [(out := model(**inputs, use_cache=True)).logits[:, -1:]]
            for token in (7, 8, 9):
                mask = torch.ones(3, 24 + len(logits) - 1, dtype=torch.long)
                mask[:, :23] = inputs["attention_mask"]
                ids = torch.full((3, 1), token)
                out = model(input_ids=ids, attention_mask=mask, **with_cache(cache_of(out)))
                logits.append(out.logits)
        return torch.cat(logits, dim=1), cache_of(out)

    dense, _ = run()
    dtypes = list(seen)
    seen.clear()
    tokenprune.patch(model, spatten(**options))
    found, cache = run()
    assert found.dtype == dense.dtype
    assert seen == dtypes
    assert {scores.dtype for scores in ledger_of(cache).scores.values()} == {torch.float32}


def test_what_a_decoder_cannot_do_is_told_before_anything_happens():
    model = text_model("llama")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    for method, found in (
        (spatten(tokens=(1.0, 0.5)), "tokens gives 2 layers a fraction, and there are 4"),
        (spatten(heads=(1.0, 0.5)), "heads gives 2 layers"),
        (tokenprune.SpAtten(), "no visual tokens"),
        (tokenprune.DivPrune(), "no visual tokens"),
        ([spatten(), tokenprune.FastV()], "no visual tokens"),
    ):
        with pytest.raises(tokenprune.OptionError, match=found):
            tokenprune.patch(model, method)
    windowed = tiny("gemma3")
    with pytest.raises(tokenprune.OptionError, match=r"sliding_attention.*protect_text=True"):
        tokenprune.patch(windowed, spatten())
    with pytest.raises(tokenprune.OptionError, match=r"DynamicCache can keep its tokens in two planes.*quantize=None"):
        tokenprune.patch(tiny("mistral3"), tokenprune.SpAtten(tokens=1.0, quantize="4+4"))
    both = [spatten(), tokenprune.FastV(keep=0.5)]
    with pytest.raises(tokenprune.OptionError, match="prunes text too"):
        tokenprune.patch(tiny("llava"), both)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("options", [{"heads": 0.7}, {"values": 0.5}, {"quantize": "4+4"}])
def test_attention_with_sinks_is_refused_where_decoding_steps_would_not_add_them(options):
    model = text_model("llama")
    model.model.layers[2].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(tokenprune.OptionError, match=r"of layer 2 adds sinks to its logits; .*values=1\.0"):
        tokenprune.patch(model, spatten(tokens=1.0, **options))
    assert tokenprune.patch(model, spatten(tokens=KEPT)).installed


def planes_layer(*, low_in_steps):
    """A cache layer that hands out what the planes hold: in decoding steps both, or the high ones alone."""

    class Simulated(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            low = key_states.shape[2] > 1 or low_in_steps
            stored = super().update(key_states, value_states)
            return tuple(dequantize_planes(quantize_planes(states), low=low) for states in stored)

    return Simulated


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_quantized_caches_give_what_a_simulation_gives(threshold):
    dense = text_model("llama")
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, spatten(tokens=1.0, quantize="4+4", threshold=threshold))
    _, inputs = ragged_text()
    out = generate(model, inputs, 5, suppress_tokens=None)
    cache = DynamicCache()
    cache.layer_class_to_replicate = planes_layer(low_in_steps=threshold == 1.0)
    wanted = generate(dense, {**inputs, **with_cache(cache)}, 5, suppress_tokens=None)
    for found, logits in zip(out.logits, wanted.logits, strict=True):
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    assert session.traffic.recomputed == threshold
    # Of 8 numbers of 4 bytes 8 nibbles of one plane or of both are read, and a scale of 4 bytes.
    assert session.traffic.values / session.traffic.read == pytest.approx(32 / (12 if threshold == 1.0 else 8))


def test_less_than_a_tenth_of_the_bytes_is_read_at_the_settings_of_the_paper():
    config = GPT2Config(n_embd=256, n_layer=12, n_head=4, n_positions=512, vocab_size=60, eos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    method = spatten(tokens=1 / 3.8, heads=1 / 1.1, values=0.3, quantize="4+4", keep_recent=8, interval=4)
    session = tokenprune.patch(model, method)
    ids = torch.randint(2, 60, (1, 400), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    traffic = session.traffic
    assert traffic.dense / traffic.read > 10
    assert traffic.dense / traffic.tokens == pytest.approx(3.8, rel=0.2)
    assert all(not layer.keys.numel() for layer in cache_of(out).layers)  # everything is in planes
    shown = str(session.report())
    for row in ("dropped tokens", "pruned heads", "values not read", "bits not read"):
        assert row in shown


@pytest.mark.parametrize("empty", [DynamicCache.reset, lambda cache: cache.crop(-cache.get_seq_length())])
def test_a_quantized_cache_is_used_again_once_it_is_empty(empty):
    model = text_model("llama")
    tokenprune.patch(model, spatten(tokens=1.0, quantize="4+4"))
    cache = DynamicCache(config=model.config)
    inputs = {**ragged_text()[1], **with_cache(cache)}
    runs = []
    for _ in range(2):
        runs.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
        empty(cache)
    assert torch.equal(*runs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_of_which_one_token_is_left_is_no_decoding_step(implementation):
    """It reads both planes of what it stores, as any prompt does."""
    model, found = text_model("llama", implementation), []
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for threshold in (0.0, 1.0):
        method = spatten(tokens=(1.0, 0.1, 0.1, 0.1), keep_first=0, keep_recent=1, quantize="4+4", threshold=threshold)
        session = tokenprune.patch(model, method)
        found.append(generate(model, inputs, 1, suppress_tokens=None).logits[0])
        assert session.traces[0].n_out == (0,)
        assert session.traffic.steps == 0
    assert torch.equal(*found)


def test_without_a_cache_there_is_nothing_to_quantize():
    dense = text_model("llama")
    model = copy.deepcopy(dense)
    tokenprune.patch(model, spatten(tokens=1.0, quantize="4+4"))
    _, inputs = ragged_text()
    wanted = generate(dense, inputs, 3, suppress_tokens=None, use_cache=False)
    out = generate(model, inputs, 3, suppress_tokens=None, use_cache=False)
    for found, logits in zip(out.logits, wanted.logits, strict=True):
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_heads_that_left_have_no_share_in_how_many_read_the_low_bits():
    model = text_model("llama")
    session = tokenprune.patch(model, spatten(tokens=1.0, heads=(1.0, 0.5, 0.5, 0.5), quantize="4+4", threshold=1.0))
    generate(model, ragged_text()[1], 3, suppress_tokens=None)
    assert session.traffic.recomputed == 1.0


def test_a_static_cache_cannot_be_quantized():
    model = text_model("llama")
    tokenprune.patch(model, spatten(quantize="4+4"))
    with pytest.raises(tokenprune.UnsupportedModelError, match="two planes of four bits"):
        generate(model, ragged_text()[1], 3, suppress_tokens=None, cache_implementation="static")
