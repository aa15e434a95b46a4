"""Accuracy per question type, dense and pruned: `python bench/quality/evaluate.py --model demos/model`.

Every answer is compared word for word, end of sequence included: an answer counts as right when greedy decoding would
produce exactly it, which one forward with the answer appended decides for all of its words at once. Pruning is the
library's own (`tokenprune.patch`); nothing is done here but asking.

`resize` is the baseline that prunes nothing: the image itself is made smaller until it has about as many patches
(side lengths are whole patches, so 0.125 of 144 becomes 16), with interpolated position embeddings. The embedded
model has only ever seen one resolution and one size of digits, so for it the baseline is a low bar; for models
trained on many resolutions it is not.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from data import Sample, by_image, make_dataset, read_samples
from intervals import Bootstrap, Outcome, markdown, summarise
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

log = logging.getLogger("evaluate")
BATCH = 128  # samples in one forward; all questions about an image stay together


class Prepared:
    """Samples as tensors, made once for all configurations.

    Args:
        samples: Anything that yields samples.
        processor: The model's processor.
        prompt: Text of a prompt with `{question}` in it.
        share: Encode an image once for all questions about it (LLaVA only); methods that prune inside the encoder
            need it off.
    """

    def __init__(self, samples: Iterable[Sample], processor, prompt: str, share: bool = True) -> None:
        self.share = share
        self.image_of: list[int] = []
        self.types: list[str] = []
        self.batches: list[tuple[dict[str, Tensor], Tensor]] = []
        self.encoded: dict[tuple[int | None, int], dict] = {}
        processor.tokenizer.padding_side = "left"
        pending: list[Sample] = []
        for number, group in enumerate(by_image(samples)):
            self.image_of += [number] * len(group)
            self.types += [sample.type for sample in group]
            pending += group
            if len(pending) >= BATCH:
                self._add(pending, processor, prompt)
                pending = []
        if pending:
            self._add(pending, processor, prompt)

    def _add(self, samples: list[Sample], processor, prompt: str) -> None:
        eos = processor.tokenizer.eos_token
        text = [f"{prompt.format(question=s.question)} {s.answer} {eos}" for s in samples]
        inputs = processor(images=[s.image for s in samples], text=text, return_tensors="pt", padding=True)
        ends = [processor.tokenizer(f"{s.answer} {eos}", add_special_tokens=False)["input_ids"] for s in samples]
        expected = torch.full((len(samples), max(map(len, ends))), -100)
        for row, end in enumerate(ends):
            expected[row, -len(end) :] = torch.tensor(end)
        self.batches.append((dict(inputs), expected))


def correct(logits: Tensor, expected: Tensor) -> list[bool]:
    """Whether the last words, predicted one after the other, are the expected ones."""
    width = expected.shape[1]
    predicted = logits[:, -width - 1 : -1].argmax(-1)
    return ((predicted == expected) | (expected == -100)).all(1).tolist()


def encode(model, inputs: dict[str, Tensor], side: int | None = None) -> dict[str, Tensor | dict]:
    """Inputs whose pixels are replaced by visual features, computed once per image although many questions share it.

    With `side`, images are first made smaller, to `side` x `side` patches, and superfluous image tokens are taken out.
    """
    pixels, image_of = inputs["pixel_values"].unique_consecutive(dim=0, return_inverse=True)
    config = model.config
    options = {}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if side is not None:
        size = (side * config.vision_config.patch_size,) * 2
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        options["interpolate_pos_encoding"] = True
        image = ids == config.image_token_id
        stays = ~(image & (image.cumsum(1) > side * side))
        ids, mask = ids[stays].view(len(ids), -1), mask[stays].view(len(ids), -1)
    features = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
        **options,
    )
    output = BaseModelOutputWithPooling(pooler_output=[features.pooler_output[i] for i in image_of.tolist()])
    return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": output}}


@torch.inference_mode()
def ask(model, prepared: Prepared, side: int | None = None) -> list[bool]:
    """Right or wrong for every sample, with the model as it is; `side` as in `encode`."""
    right: list[bool] = []
    for inputs, expected in prepared.batches:
        if prepared.share and model.config.model_type == "llava":
            key = side, len(right)
            if key not in prepared.encoded:
                prepared.encoded[key] = encode(model, inputs, side)
            inputs = prepared.encoded[key]
        right += correct(model(**inputs, use_cache=False).logits, expected)
    return right


@contextmanager
def pruned(model, method: str, keep: float) -> Iterator[None]:
    import tokenprune

    options = {"seed": 0} if method == "random" else {}
    tokenprune.patch(model, method, keep=keep, **options)
    try:
        yield
    finally:
        tokenprune.unpatch(model)


def run(model, prepared: Prepared, methods: list[str], keeps: list[float]) -> list[Outcome]:
    """Every method at every keep, the dense model first."""
    n_tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    outcomes = [Outcome("dense", 1.0, n_tokens, ask(model, prepared))]
    for keep in sorted((k for k in keeps if k < 1), reverse=True):
        for method in methods:
            tokens = max(1, round(keep * n_tokens))
            if method == "resize":
                side = max(1, round(math.sqrt(tokens)))
                tokens = side * side
                right = ask(model, prepared, side)
            else:
                with pruned(model, method, keep):
                    right = ask(model, prepared)
            outcomes.append(Outcome(method, keep, tokens, right))
            log.info("%-9s keep %-7g %5.1f %%", method, keep, 100 * sum(right) / len(right))
    return outcomes


def provenance(args: argparse.Namespace) -> dict:
    """What is needed to run the same again."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": f"python bench/quality/evaluate.py --model {args.model} --methods {args.methods} --keep {args.keep} "
        f"--images {args.images} --seed {args.seed}",
        "commit": None if found.returncode else found.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "images": args.images,
        "seed": args.seed,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demos/model")
    parser.add_argument("--methods", default="divprune,random,uniform,resize")
    parser.add_argument("--keep", default="1,0.5,0.25,0.125,0.0625")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="seed of the evaluation images")
    parser.add_argument("--data", type=Path, help="JSON lines with samples, instead of the digits")
    parser.add_argument("--prompt", default="<image> {question}")
    parser.add_argument("--encode-each", action="store_true", help="run the vision encoder anew for every question")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, help="JSON file; a Markdown file is written beside it")
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    samples = read_samples(args.data) if args.data else make_dataset("eval", args.images, args.seed)
    prepared = Prepared(samples, processor, args.prompt, share=not args.encode_each)
    outcomes = run(model, prepared, args.methods.split(","), [float(k) for k in args.keep.split(",")])
    rows = summarise(outcomes, Bootstrap(prepared.image_of, prepared.types))
    text = f"Accuracy in percent, 95 % interval from a bootstrap over images:\n\n{markdown(rows)}\n"
    for figure, title in (("minus_dense", "Points against dense"), ("minus_random", "Points against random")):
        text += f"\n{title} (paired):\n\n{markdown(rows, figure)}\n"
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**provenance(args), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
