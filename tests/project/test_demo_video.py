"""The video demo: which frames it reads, what it draws of the traces, and one line for every mistake."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_demo import model  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers

import tokenprune

av = pytest.importorskip("av")
DEMOS = Path(__file__).resolve().parents[2] / "demos"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMOS)
        patch.setattr(transformers.logging, "_tqdm_active", False)
        yield


def demo(name: str) -> Any:
    return importlib.import_module(name)


def coded(number: int, size: tuple[int, int]) -> Image.Image:
    """Eight black and white stripes: the number in binary."""
    bits = np.repeat([255 * (number >> place & 1) for place in range(8)], size[0] // 8)
    return Image.fromarray(np.tile(bits.astype(np.uint8), (size[1], 1))).convert("RGB")


def decoded(image: Image.Image) -> int:
    stripes = np.split(np.asarray(image).mean(axis=(0, 2)), 8)
    return sum((stripe.mean() > 128) << place for place, stripe in enumerate(stripes))


def write(path: Path, n_frames: int, *, gap: int = 12, size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frames carry their numbers, with a key frame at least every `gap` frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", gap
        for number in range(n_frames):
            container.mux(stream.encode(av.VideoFrame.from_image(coded(number, size))))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of noise."""
    path = tmp_path_factory.mktemp("clip") / "noise.mp4"
    noise = np.random.default_rng(0).integers(120, 255, (24, 32, 48, 3), dtype=np.uint8)
    importlib.import_module("clips").write_moving(path, [Image.fromarray(frame) for frame in noise], rate=12)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = demo("video").main([str(part) for part in argv])
        return status, *capsys.readouterr()

    return call


def fails(run: Run, *argv: object, saying: str) -> None:
    status, _, err = run(*argv)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert saying in err, err


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi", "x.ts"])
@pytest.mark.parametrize("gap", [1, 5, 100])
def test_evenly_spaced_frames_are_read(tmp_path: Path, name: str, gap: int) -> None:
    found = demo("clips").read_clip(write(tmp_path / name, 40, gap=gap), 8)
    assert found.numbers == (2, 7, 12, 17, 22, 27, 32, 37)
    assert found.n_total == 40
    assert tuple(map(decoded, found.frames)) == found.numbers
    assert found.seconds == pytest.approx([number / 10 for number in found.numbers], abs=1e-3)


def test_a_short_video_gives_all_its_frames(tmp_path: Path) -> None:
    found = demo("clips").read_clip(write(tmp_path / "x.mp4", 3), 32)
    assert found.numbers == (0, 1, 2)


@pytest.mark.parametrize("wanted", [1, 3, 7, 39, 40, 41, 400])
def test_spread_is_even(wanted: int) -> None:
    numbers = demo("clips").spread(wanted, 40)
    steps = np.diff(numbers)
    assert len(numbers) == min(wanted, 40)
    assert numbers[0] + numbers[-1] in (39, 40)
    assert len(steps) == 0 or 0 < steps.min() >= steps.max() - 1


def test_sample_clip(tmp_path: Path) -> None:
    clips = demo("clips")
    clips.make_sample(tmp_path / "sample.mp4")
    found = clips.read_clip(tmp_path / "sample.mp4", 6)
    assert found.n_total == clips.SAMPLE_FRAMES
    assert {frame.size for frame in found.frames} == {clips.SAMPLE_SIZE}
    means = [np.asarray(frame).mean(axis=(0, 1)) for frame in found.frames]
    assert min(np.abs(a - b).max() for a, b in zip(means[::2], means[2::2], strict=False)) > 15  # three photographs
    assert [path.name for path in tmp_path.iterdir()] == ["sample.mp4"]


@pytest.mark.parametrize("name", ["x.mp4", "x.gif"])
def test_animation_sheet_and_report(run: Run, model: Path, clip: Path, name: str) -> None:  # noqa: F811
    argv = (clip, "--model", model, "--frames", 5, "--method", "divprune", "--max-new-tokens", 1)
    status, out, _ = run(*argv, "--output", name, "--question", "how many ?")
    assert status == 0
    for part in ("5 of 24 frames", "question  how many ?", "visual_tokens", "80", "20", "before_llm", name):
        assert part in out
    if name == "x.gif":
        with Image.open(name) as moving:
            assert moving.n_frames == 5
    else:
        assert demo("clips").read_clip(Path(name), 9).n_total == 5
    with Image.open("x.png") as sheet:
        assert np.asarray(sheet).std() > 20


def test_every_frame_keeps_its_share(run: Run, model: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    films: list[Any] = []
    sheet = demo("video").contact_sheet
    monkeypatch.setattr(demo("video"), "contact_sheet", lambda film: films.append(film) or sheet(film))
    assert run(clip, "--model", model, "--frames", 3, "--method", "uniform", "--keep", 4)[0] == 0
    (film,) = films
    assert [shown.n_kept for shown in film.tokens] == [4, 4, 4]
    assert (film.n_tokens, film.n_kept) == (48, 12)
    assert [shown.grid for shown in film.tokens] == [(4, 4)] * 3
    assert {frame.size for frame in film.frames} == {(32, 32)}  # as the model sees them


def trace(site: str, layer: int | None, kept: Sequence[int]) -> tokenprune.Trace:
    return tokenprune.Trace(
        site,
        layer,
        "m",
        n_in=(8,),
        n_out=(len(kept),),
        kept_indices=(torch.tensor(kept, dtype=torch.int64),),
        visual_indices=(torch.arange(3, 11),),
    )


def test_tokens_last_as_long_as_the_traces_say() -> None:
    stages = [trace("before_llm", None, [3, 4, 6, 9]), trace("llm_layer", 2, [4, 9]), trace("llm_layer", 5, [])]
    layout = demo("lasting").Layout((4, 4), ((2, 2), None))
    first, second = demo("lasting").lasting(stages, layout)
    assert first.depth == (1, 2, 0, 1)
    assert second.depth == (0, 0, 2, 0)
    assert first.stages == ("before the LLM", "layer 2")  # no token passes layer 5
    assert (first.grid, second.grid, first.n_kept, second.n_kept) == ((2, 2), None, 3, 1)
    skipped = tokenprune.Trace("before_llm", None, "m", status="skipped", reason="no image in this call")
    with pytest.raises(demo("pictures").DemoError, match="no image in this call"):
        demo("lasting").lasting([skipped], layout)


def test_panel_shows_what_lasts() -> None:
    lasting = demo("lasting")
    shown = lasting.Lasting((0, 1, 2, 3), ("a", "b", "c"), (2, 2))
    page = np.asarray(lasting.lasting_panel(Image.new("RGB", (8, 8), (200, 180, 160)), (200, 200), shown)).mean(axis=2)
    cells = [page[20:80, 20:80], page[20:80, 120:180], page[120:180, 20:80], page[120:180, 120:180]]
    levels = [float(cell.mean()) for cell in cells]
    assert levels[0] < 0.5 * levels[1]
    assert levels == sorted(levels)
    assert levels[3] == pytest.approx(180, abs=1)


def tiny_video_model(family: str, folder: Path) -> Path:
    """A random model of `family` that takes videos, with a processor of words."""
    marks = {"qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>"), "llava_onevision": ("<image>", "<video>")}[family]
    words = {"<pad>": 0, "<unk>": 1, "what": 2, "?": 3, marks[0]: 100, marks[1]: 101, "</s>": 127}
    words |= {"<|vision_start|>": 102, "<|vision_end|>": 103}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": marks}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, **{**special, "additional_special_tokens": [*marks]}
    )
    if family == "qwen2_5_vl":
        size = {"shortest_edge": 64, "longest_edge": 64 * 64}
        patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
        processor = transformers.Qwen2_5_VLProcessor(
            transformers.Qwen2VLImageProcessor(**patches), tokenizer, transformers.Qwen2VLVideoProcessor(**patches)
        )
    else:
        size = {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 32]]}
        processor = transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(**size),
            tokenizer,
            transformers.LlavaOnevisionVideoProcessor(size=size["size"]),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
        )
    families.tiny(family).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "groups"), [("qwen2_5_vl", 2), ("llava_onevision", 4)])
def test_models_of_videos_get_one_video(
    family: str, groups: int, run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films: list[Any] = []
    sheet = demo("video").contact_sheet
    monkeypatch.setattr(demo("video"), "contact_sheet", lambda film: films.append(film) or sheet(film))
    argv = ("--frames", 4, "--question", "what ?", "--method", "divprune", "--keep", 0.5, "--max-new-tokens", 1)
    status, _, err = run(clip, "--model", tiny_video_model(family, tmp_path / family), *argv)
    assert status == 0, err
    (film,) = films
    assert len(film.tokens) == len(film.frames) == 4
    assert len({id(shown) for shown in film.tokens}) == groups
    assert all(0 < shown.n_kept < len(shown.depth) for shown in film.tokens)


def test_broken_videos(run: Run, clip: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    long = write(tmp_path / "long.mkv", 100, size=(320, 240)).read_bytes()
    Image.new("RGB", (8, 8)).save("still.png")
    files = {
        "none.mp4": (None, "there is no file none.mp4"),
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"no video\n" * 50, "not a video that can be read"),
        "head.mp4": (whole[:100], "cut off"),
        "half.mp4": (whole[: len(whole) // 2], "cut off"),
        "half.mkv": (long[: len(long) // 2], "is cut off: it has only"),
        "still.png": (Path("still.png").read_bytes(), "is an image, not a video"),
    }
    for name, (content, saying) in files.items():
        if content is not None:
            Path(name).write_bytes(content)
        fails(run, name, saying=saying)
    fails(run, tmp_path, saying="is a folder")
    with av.open("sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    fails(run, "sound.wav", saying="has no video in it")


def test_frames_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = demo("clips")
    monkeypatch.setattr(clips, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(demo("pictures").DemoError, match="too large: its frames have 64 x 48 pixels"):
        clips.read_clip(write(tmp_path / "x.mp4", 1), 1)


@pytest.mark.parametrize(
    ("argv", "saying"),
    [
        (("--frames", "0"), "must lie between 1 and 512, got 0"),
        (("--frames", "x"), "invalid int value"),
        (("--method", "uniform", "--keep", "0"), "must be at least 1"),
        (("--method", "divprun"), "did you mean 'divprune'"),
        (("--method", "uniform:keep"), "option=value"),
        (("--method", "uniform:color=3"), "no option 'color'"),
        (("--question", " "), "must not be empty"),
        (("--question", "<image>"), "must not hold <image>"),
        (("--output", "x.avi"), "must end in .mp4 or .gif"),
    ],
)
def test_wrong_options(run: Run, clip: Path, model: Path, argv: tuple[str, ...], saying: str) -> None:  # noqa: F811
    fails(run, clip, "--model", model, *argv, saying=saying)
