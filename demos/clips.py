"""Videos for the demo: frames read from files with PyAV, a sample clip made of photographs, moving pictures written.

PyAV decodes H.264, HEVC, VP9, AV1, MPEG-4 and what else FFmpeg knows, without a program beside Python.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pictures import DemoError, one_line
from PIL import Image

MOST_PIXELS = 8192 * 4320  # of one frame
ENDS_EARLY = 0.9  # a file with less than this share of the frames it announces is not whole
SAMPLE_SIZE, SAMPLE_RATE, SAMPLE_FRAMES = (384, 288), 12, 72


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        name: of the file, without its ending.
        frames: evenly spaced over the video, upright RGB.
        seconds: time of each of them.
        numbers: which of the video's frames they are.
        n_total: frames of the whole video.
        rate: frames a second of the whole video.
    """

    name: str
    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    numbers: tuple[int, ...]
    n_total: int
    rate: float


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DemoError('videos are read with PyAV: pip install "tokenprune-vl[demo]"') from error
    av.logging.set_level(None)
    return av


def spread(n_wanted: int, n_total: int) -> list[int]:
    """`n_wanted` numbers below `n_total`, each at the middle of its share; all where there are not as many."""
    n_wanted = min(n_wanted, n_total)
    return [(2 * place + 1) * n_total // (2 * n_wanted) for place in range(n_wanted)]


def read_clip(path: Path, n_frames: int) -> Clip:
    """`n_frames` evenly spaced frames of a video file; all of them where it has fewer.

    The packets are counted first, without decoding; then only what leads from a key frame to a wanted frame is decoded.

    Raises:
        DemoError: there is no such file, it is no video, has no frames, is cut off or damaged, or is too large.
    """
    if path.is_dir():
        raise DemoError(f"{path} is a folder, not a video")
    if not path.exists():
        raise DemoError(f"there is no file {path}")
    if not path.stat().st_size:
        raise DemoError(f"{path} is empty")
    av = _av()
    try:
        with av.open(str(path)) as container:
            stream = _video(path, container)
            stamps, keys = _packets(container, stream)
            _check_whole(path, container, stream, stamps)
            base, rate = stream.time_base, float(stream.average_rate or 0)
        numbers = spread(n_frames, len(stamps))
        wanted = [stamps[number] for number in numbers]
        frames: list[Image.Image] = []
        for jumps in (keys, []):  # some containers cannot be searched: there everything is decoded
            if len(frames) < len(numbers):
                with av.open(str(path)) as container:
                    frames = list(_decode(container, container.streams.video[0], jumps, wanted))
        if len(frames) < len(numbers):
            raise DemoError(f"{path} is cut off or damaged: only {len(frames)} of {len(numbers)} frames decode")
    except DemoError:
        raise
    except av.error.InvalidDataError as error:
        raise DemoError(f"{path} is not a video that can be read, or it is cut off") from error
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise DemoError(f"{path} cannot be read: {one_line(error)}") from error
    seconds = tuple(float((stamp - stamps[0]) * base) for stamp in wanted)
    rate = rate or len(stamps) / max(float((stamps[-1] - stamps[0]) * base), 1e-3)
    return Clip(path.stem, tuple(frames), seconds, tuple(numbers), len(stamps), rate)


def _video(path: Path, container: Any) -> Any:
    """The first video stream of a file."""
    if not container.streams.video:
        raise DemoError(f"{path} has no video in it")
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise DemoError(f"{path} is an image, not a video; see demos/image.py")
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MOST_PIXELS:
        raise DemoError(f"{path} is too large: its frames have {width} x {height} pixels")
    return stream


def _packets(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Time stamps of all frames and of the key frames, ascending."""
    stamps, keys = [], []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.size and not packet.is_corrupt:
            stamps.append(stamp)
            keys += [stamp] if packet.is_keyframe else []
    return sorted(stamps), sorted(keys)


def _check_whole(path: Path, container: Any, stream: Any, stamps: Sequence[int]) -> None:
    """Compare with what the file says about itself."""
    if not stamps:
        raise DemoError(f"{path} has no frames, or it is cut off")
    found, said = float(len(stamps)), float(stream.frames or 0)
    if not said and container.duration and (rate := float(stream.average_rate or 0)):
        found = float((stamps[-1] - stamps[0]) * stream.time_base) + 1 / rate
        said = container.duration / 1e6
    if found < ENDS_EARLY * said:
        raise DemoError(f"{path} is cut off: it has only {100 * found / said:.0f} % of what it announces")


def _decode(container: Any, stream: Any, keys: Sequence[int], wanted: Sequence[int]) -> Iterator[Image.Image]:
    """The frames at these time stamps. A key frame between here and the next wanted frame is jumped to."""
    stream.thread_type = "AUTO"
    frames, here = container.decode(stream), None
    for stamp in wanted:
        place = bisect_right(keys, stamp) - 1
        if place > 0 and here is not None and keys[place] > here:
            container.seek(keys[place], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            here = stamp if frame.pts is None else frame.pts
            if here >= stamp:
                yield _upright(frame)
                break


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image().convert("RGB")
    turn = getattr(frame, "rotation", 0) or 0
    return image.rotate(turn, expand=True) if turn % 360 else image


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to, which takes its place once it is complete."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def write_moving(path: Path, pages: Sequence[Image.Image], *, rate: float) -> None:
    """Write pages of one size as `.gif` or `.mp4` (H.264, or MPEG-4 where FFmpeg was built without it).

    Raises:
        DemoError: the file cannot be written.
    """
    with _whole(path) as part:
        if path.suffix.lower() == ".gif":
            small = [page.quantize(160, dither=Image.Dither.NONE) for page in pages]
            small[0].save(part, save_all=True, append_images=small[1:], duration=round(1000 / rate), loop=0)
            return
        av = _av()
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        with av.open(str(part), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
            stream.width, stream.height = (side - side % 2 for side in pages[0].size)
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "20"} if codec == "libx264" else {"qscale": "3"}
            for page in pages:
                even = page.crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_image(even)))
            container.mux(stream.encode())


def make_sample(path: Path) -> None:
    """Write the sample clip: three photographs of scikit-image, panned over and faded into each other.

    Raises:
        DemoError: scikit-image is not installed, or the file cannot be written.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise DemoError('the sample clip needs scikit-image: pip install "tokenprune-vl[demo]"') from error
    photographs = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee")]
    write_moving(path, [_sample_frame(photographs, number) for number in range(SAMPLE_FRAMES)], rate=SAMPLE_RATE)


def _sample_frame(photographs: Sequence[Image.Image], number: int) -> Image.Image:
    """One frame of the sample: a window that moves and closes in, faded into the next photograph at its end."""
    each = SAMPLE_FRAMES / len(photographs)
    turn, place = divmod(number, each)
    here = _window(photographs[int(turn)], place / each, int(turn))
    fade = (place - 0.75 * each) / (0.25 * each)
    if fade <= 0 or turn + 1 >= len(photographs):
        return here
    return Image.blend(here, _window(photographs[int(turn) + 1], 0.0, int(turn) + 1), fade)


def _window(photograph: Image.Image, progress: float, turn: int) -> Image.Image:
    """A part of a photograph: from 95 % of its width to 60 %, moving to the right or to the left."""
    share = 0.95 - 0.35 * progress
    width = min(photograph.width, photograph.height * SAMPLE_SIZE[0] / SAMPLE_SIZE[1]) * share
    height = width * SAMPLE_SIZE[1] / SAMPLE_SIZE[0]
    across = progress if turn % 2 == 0 else 1 - progress
    left = (photograph.width - width) * (0.25 + 0.5 * across)
    top = (photograph.height - height) * (0.4 - 0.3 * progress)
    return photograph.resize(SAMPLE_SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
