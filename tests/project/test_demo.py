"""The demo: what it writes, and that every mistake gets one line and exit status 2."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
DEMOS, EMBEDDED = ROOT / "demos", ROOT / "demos" / "model"
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<image>"]}
WORDS = ("<pad>", "</s>", "<unk>", "<image>", "what", "digit", "is", "red", "are", "there", "how", "many", "?", "0")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    """The demo's modules can be imported, and loading a model draws no progress bar."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMOS)
        patch.setattr(transformers.logging, "_tqdm_active", False)
        yield


def demo(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA: 4 x 4 visual tokens of 8 pixels, one word a token."""
    folder = tmp_path_factory.mktemp("llava")
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**width, image_size=32, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**width, vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1, image_seq_length=16
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    processor = transformers.LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A bright image without a flat spot."""
    noise = np.random.default_rng(0).integers(120, 255, (32, 32, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the demo in an empty folder; returns the exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = demo("image").main([str(part) for part in argv])
        return status, *capsys.readouterr()

    return call


def fails(run: Run, *argv: object, saying: str) -> None:
    status, _, err = run(*argv)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert saying in err, err


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def brightness(page: np.ndarray, left: int, top: int) -> float:
    """Mean over a cell of 144 x 144 pixels without its outline."""
    return float(page[top + 8 : top + 136, left + 8 : left + 136].mean())


def test_overlay_and_answers(run: Run, model: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    draw = demo("image").draw
    monkeypatch.setattr(demo("image"), "draw", lambda figure: figures.append(figure) or draw(figure))
    questions = ("--question", "What digit is red?", "--question", "how many are there ?")
    status, out, _ = run("--image", photo, "--model", model, "--max-new-tokens", 2, *questions)
    assert status == 0
    for part in ("question  What digit is red?", "visual_tokens", "kv_mib", "prefill_latency_ms", "out/photo.png"):
        assert part in out
    assert "does not know" not in out  # "What" and "red?" were brought into the words that the model has
    page = pixels("out/photo.png")
    overlay, (figure,) = demo("overlay"), figures
    assert page.shape[1] == 3 * 576 + 2 * overlay.GAP + 2 * overlay.MARGIN
    selection = figure.selection
    assert len(selection.kept) == 4
    assert selection.grid == (4, 4)
    shift = 576 + overlay.GAP
    # By the pixels: each kept cell of the second panel is as in the first, each dropped one far darker.
    for token in range(16):
        x, y = overlay.MARGIN + 144 * (token % 4), 136 + 42 + 144 * (token // 4)
        seen, shown = brightness(page, x, y), brightness(page, x + shift, y)
        assert seen > 100
        assert shown == pytest.approx(seen, abs=1) if token in selection.kept else shown < 0.5 * seen
    third = page[200:700, -overlay.MARGIN - 576 : -overlay.MARGIN]
    assert len(np.unique(third.reshape(-1, 3), axis=0)) > 50


def test_selection_is_nearest_by_cosine(run: Run, model: Path, photo: Path) -> None:
    asking = demo("asking")
    loaded = asking.load(str(model), device="cpu", dtype="auto")
    inputs = asking.prepare(loaded, demo("pictures").read_image(photo), "how many ?")
    with demo("tokenprune").patch(loaded.model, keep=5) as session:
        _, _, selection = asking.ask(loaded, session, inputs, 1)
        trace = session.traces[0]
        with session.pause(), asking.decoder_inputs(loaded.model) as caught:
            loaded.model(**inputs)
    features = caught[0][trace.visual_indices[0]]
    assert [int(trace.visual_indices[0][token]) for token in selection.kept] == trace.kept_indices[0].tolist()
    assert selection.radius == pytest.approx(trace.radius[0][0], abs=1e-5)
    for token, owner in enumerate(selection.nearest):
        among = {
            kept: float(torch.cosine_similarity(features[token], features[kept], dim=0)) for kept in selection.kept
        }
        assert among[owner] == pytest.approx(max(among.values()), abs=1e-5)
        assert selection.distance[token] == pytest.approx(1 - among[owner], abs=1e-5)
    assert all(selection.nearest[token] == token for token in selection.kept)


@pytest.mark.parametrize("options", [("--keep", "1.0"), ("--keep", "auto", "--radius", "0.1"), ("--keep", "3")])
@pytest.mark.parametrize("method", ["divprune", "uniform"])
def test_every_keep(run: Run, model: Path, photo: Path, method: str, options: tuple[str, ...]) -> None:
    argv = (
        "--image",
        photo,
        "--model",
        model,
        "--max-new-tokens",
        1,
        "--method",
        method,
        "--output",
        "a/b/c.png",
        *options,
    )
    if method == "uniform" and "auto" in options:
        fails(run, *argv, saying="radius")
    else:
        assert run(*argv)[0] == 0
        assert pixels("a/b/c.png").shape[1] > 1400


@pytest.mark.parametrize("method", ["fastv:layer=1,keep=4", "aim:merge=0.5", "divprune:keep=0.5+uniform:keep=0.5"])
def test_methods_with_options(run: Run, model: Path, photo: Path, method: str) -> None:
    status, out, err = run("--image", photo, "--model", model, "--max-new-tokens", 1, "--method", method)
    assert status == 0, err
    assert f"method    {method.partition(':')[0]}" in out
    assert pixels("out/photo.png").shape[1] == 3 * 576 + 2 * demo("overlay").GAP + 2 * demo("overlay").MARGIN


def image_of(mode: str) -> Image.Image:
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray((ramp * 100).astype(np.int32 if mode == "I" else np.float32))
    image = Image.fromarray(ramp.astype(np.uint8))
    if mode == "palette":
        return image.convert("RGB").quantize(16)
    if mode == "RGBA":
        return Image.merge("RGBA", (image, image, image, Image.new("L", image.size)))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "palette", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_is_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode in ("CMYK", "F", "I") else "x.png")
    image_of(mode).save(path)
    image = demo("pictures").read_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    low, high = np.asarray(image)[0, 0], np.asarray(image)[-1, -1]
    if mode == "RGBA":
        assert low.tolist() == high.tolist() == [255, 255, 255]  # wholly transparent: white
    else:
        assert low.max() < 20
        assert high.min() > 230


def test_orientation_and_animation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image_of("L").save(tmp_path / "turned.jpg", exif=exif)
    assert demo("pictures").read_image(tmp_path / "turned.jpg").size == (30, 40)
    frames = [Image.new("L", (8, 8), shade) for shade in (250, 0)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(demo("pictures").read_image(tmp_path / "moving.gif")).min() == 250


def test_broken_images(run: Run, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(run, "--image", tmp_path / "none.png", saying="there is no file")
    fails(run, "--image", tmp_path, saying="is a folder")
    image_of("L").save("whole.jpg")
    broken = {"half.png": photo.read_bytes()[:1500], "half.jpg": Path("whole.jpg").read_bytes()[:-60]}
    for name, content in {"text.png": b"no image", "empty.png": b"", **broken}.items():
        Path(name).write_bytes(content)
        fails(run, "--image", name, saying="cannot be read" if name in broken else "not an image that Pillow can read")
    for limit in (800, 500):  # beyond the limit Pillow warns, beyond twice the limit it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        fails(run, "--image", photo, saying="too large an image")


@pytest.mark.parametrize(
    ("argv", "saying"),
    [
        (("--keep", "0"), "must be at least 1, got 0"),
        (("--keep", "1.5"), "must lie in (0, 1], got 1.5"),
        (("--keep", "-1"), "must be at least 1, got -1"),
        (("--keep", "nan"), "must lie in (0, 1]"),
        (("--keep", "some"), "argument --keep: a fraction such as 0.25"),
        (("--keep", "auto"), "needs radius"),
        (("--radius", "0.1"), "radius goes with"),
        (("--method", "divprun"), "did you mean 'divprune'"),
        (("--device", "tpu"), "invalid choice"),
        (("--dtype", "int8"), "invalid choice"),
        (("--max-new-tokens", "0"), "--max-new-tokens: must be at least 1"),
        (("--question", " "), "--question: must not be empty"),
        (("--question", "<image> ?"), "must not hold <image>"),
        (("--output", "out.jpg"), "must end in .png"),
        (("--output", "photo.png"), "the image itself"),
        (("--output", "photo.png/out.png"), "cannot make the folder"),
        (("--quest",), "expected one argument"),
    ],
)
def test_wrong_options(run: Run, model: Path, photo: Path, argv: tuple[str, ...], saying: str) -> None:
    fails(run, "--image", photo, "--model", model, *argv, saying=saying)


def test_wrong_models(run: Run, model: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "new", "bare"):
        Path(name).mkdir()
    Path("new/config.json").write_text('{"model_type": "unheard-of"}')
    Path("bare/config.json").write_bytes((model / "config.json").read_bytes())
    transformers.BertConfig().save_pretrained("bert")
    for name, saying in {
        "./none": "there is no model folder ./none",
        "bert/none": "there is no model folder",
        str(photo): "is a file",
        "nobody/nothing": "the model nobody/nothing cannot be loaded",
        "empty": "the model empty cannot be loaded",
        "bert": "bert is a bert model, which does not turn images and text into text",
        "new": "unheard-of",
        "bare": "the model bare cannot be loaded",
    }.items():
        fails(run, "--image", photo, "--model", name, saying=saying)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(run, "--device", "cuda", saying="no CUDA device")
    fails(run, "--output", "x.png", saying="goes with --image")


def test_tokens_without_a_grid() -> None:
    overlay = demo("overlay")
    selection = overlay.Selection((0, 5), (0, 0, 0, 5, 5, 5, 5), (0.0, 0.1, 0.3, 0.2, 0.1, 0.0, 0.4), None)
    answers = [overlay.Answer("why ? " * 60, "word" * 90, "")]
    page = overlay.draw(overlay.Figure(Image.new("RGB", (50, 9), "red"), selection, "t" * 300, "m", answers, "note"))
    assert page.width == 3 * 576 + 2 * overlay.GAP + 2 * overlay.MARGIN
    assert selection.radius == 0.4


def test_panels_are_large_enough() -> None:
    for size in ((1, 1), (96, 96), (336, 336), (60, 500), (500, 20), (3000, 2000)):
        width, height = demo("overlay")._panel_size(size)
        assert 480 <= width <= 576
        assert 144 <= height <= 1152


def test_script_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    argv = [sys.executable, str(DEMOS / "image.py"), "--image", "none.png"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: there is no file none.png\n")


@pytest.mark.skipif(not (EMBEDDED / "config.json").exists(), reason="the embedded model is not there yet")
def test_embedded_model_on_both_pictures(run: Run) -> None:
    if not (DEMOS / "assets" / "digits.png").exists():
        pytest.skip("the built-in image is not there yet")
    status, out, _ = run("--max-new-tokens", 5)
    assert status == 0
    assert "trained on handwritten digits only" in out
    assert out.count("visual_tokens") == 2
    for name in ("astronaut", "digits"):
        assert pixels(f"out/{name}.png").std() > 20


def test_patches_of_a_vision_transformer(run: Run, tmp_path: Path) -> None:
    for method in ("tome:keep=0.25", "spatten:tokens=0.6"):
        status, said, _ = run("--vit", "--method", method)
        assert status == 0
        assert "dense" in said
        page = Image.open(tmp_path / "out" / "digits-patches.png")
        assert page.width > 1000
        assert len(set(page.convert("L").resize((64, 64)).get_flattened_data())) > 20


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--vit", "no_such_model"), "timm cannot load 'no_such_model'"),
        (("--vit", "--method", "divprune"), "a vision encoder takes"),
        (("--vit", "--method", "tome:r=-1"), "r must be an int of at least 0"),
    ],
)
def test_what_is_wrong_with_a_vision_transformer_is_told(run: Run, options: tuple[str, ...], found: str) -> None:
    status, _, told = run(*options)
    assert status == 2
    assert found in told
    assert told.count("\n") == 1
