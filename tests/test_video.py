"""Frames are chosen by the time at which a player would show them, whatever the file looks like."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write_audio, write_video

from benchmarks.faults import broken, broken_files, write_whole_files
from benchmarks.faults import decode as outcome_of
from videoclip.data.video import FrameFormat, clips_of_seconds, decode_seconds, find_videos, probe
from videoclip.errors import InputError

TENTHS = [n / 10 for n in range(30)]  # three seconds, ten frames a second


def grey(level: float, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def decode(path: Path, fps: int = 10, size: int = 32, **times: float) -> np.ndarray:
    return np.stack(list(decode_seconds(path, FrameFormat(fps, size), **times)))


def levels(frames: np.ndarray) -> np.ndarray:
    return frames.mean((-3, -2, -1))


def test_seconds_come_as_uint8_at_the_wanted_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: grey(20 + 7 * n))
    frames = decode(path)
    assert frames.shape == (3, 10, 32, 32, 3) and frames.dtype == np.uint8
    np.testing.assert_allclose(levels(frames).ravel(), 20 + 7 * np.arange(30), atol=3)
    assert probe(path).duration == pytest.approx(3.0, abs=0.11)


def test_a_higher_rate_repeats_frames_and_a_lower_one_drops_them(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: grey(20 + 7 * n))
    np.testing.assert_allclose(levels(decode(path, fps=20)).ravel(), np.repeat(20 + 7 * np.arange(30), 2), atol=3)
    np.testing.assert_allclose(levels(decode(path, fps=2)).ravel(), 20 + 7 * np.array([0, 5, 10, 15, 20, 25]), atol=3)


def test_variable_frame_rates_follow_the_time_stamps(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 1.5, 1.6, 2.9]
    path = write_video(tmp_path / "a.mp4", times, lambda n: grey(30 * n + 20))
    np.testing.assert_allclose(levels(decode(path, fps=2)).ravel(), [20, 80, 80, 110, 140, 140], atol=3)


CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx", "ts": "libx264", "avi": "mpeg4"}


@pytest.mark.parametrize("suffix", CODECS)
def test_the_last_picture_does_not_last_as_long_as_the_gap_before_it(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", [0.0, 1.0, 2.0, 3.0, 33.0], lambda n: grey(100), codec=CODECS[suffix])
    frames = decode(path, fps=2)
    assert len(frames) == 34 and levels(frames).min() > 90


@pytest.mark.parametrize("suffix", CODECS)
def test_a_video_of_a_constant_rate_keeps_its_last_picture_whole(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", TENTHS, lambda n: grey(20 + 7 * n), codec=CODECS[suffix])
    shown = levels(decode(path, fps=20)).ravel()
    np.testing.assert_allclose(shown, np.repeat(20 + 7 * np.arange(30), 2), atol=5)


def test_a_clip_of_the_last_picture_alone_has_that_picture(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", TENTHS, lambda n: grey(20 + 7 * n), codec="ffv1")  # every frame a key frame
    clip = levels(decode(path, start=2.9)).ravel()
    np.testing.assert_allclose(clip, [223, *[0] * 9], atol=3)


def test_sound_that_outlasts_the_picture_adds_no_seconds_and_is_no_damage(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", [n / 10 for n in range(200)], noise, sound=40)
    assert probe(path).duration == pytest.approx(40, abs=0.1)
    assert len(decode(path)) == 20
    (tmp_path / "cut.mkv").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"truncated or damaged: .* of 40\.. seconds"):
        decode(tmp_path / "cut.mkv")


def test_the_last_partial_second_is_filled_with_zeros(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", TENTHS[:25], lambda n: grey(200))
    frames = decode(path)
    assert len(frames) == 3
    assert levels(frames)[2, :5].min() > 190 and frames[2, 5:].max() == 0


def test_a_clip_of_a_video_starts_where_it_is_asked_to(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: grey(20 + 7 * n))
    np.testing.assert_allclose(levels(decode(path, start=1.0, end=2.0)).ravel(), 20 + 7 * np.arange(10, 20), atol=3)
    with pytest.raises(InputError, match="ends at"):
        decode(path, start=50.0)


def test_the_shorter_side_is_scaled_and_the_centre_is_cut(tmp_path: Path) -> None:
    wide = np.concatenate([grey(0, 64, 64), grey(255, 64, 64), grey(0, 64, 64)], 1)
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: wide)
    assert decode(path)[0, 0, :, 2:-2].min() > 240


def test_non_square_pixels_are_stretched_before_cutting(tmp_path: Path) -> None:
    narrow = np.concatenate([grey(0, 64, 16), grey(255, 64, 32), grey(0, 64, 16)], 1)
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: narrow, aspect=(2, 1))
    assert decode(path)[0, 0, :, 2:-2].min() > 240, "a pixel twice as wide doubles the picture's width"


@pytest.mark.parametrize(("codec", "pixel_format"), [("libx264", "yuv444p"), ("libx264", "gray"), ("ffv1", "yuv420p")])
def test_any_pixel_format_becomes_rgb(tmp_path: Path, codec: str, pixel_format: str) -> None:
    suffix = "mkv" if codec == "ffv1" else "mp4"
    path = write_video(tmp_path / f"a.{suffix}", TENTHS, lambda n: grey(100), codec=codec, pixel_format=pixel_format)
    np.testing.assert_allclose(decode(path), 100, atol=4)


def test_rotation_flags_turn_the_picture_upright(tmp_path: Path) -> None:
    upright = np.concatenate([grey(255, 32, 64), grey(0, 32, 64)])  # bright above, dark below
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: np.rot90(upright, 1).copy())
    _write_rotation(path, 90)
    first = decode(path)[0, 0]
    assert first[:12].mean() > 240 and first[-12:].mean() < 15


def _write_rotation(path: Path, degrees: int) -> None:
    """Set the display matrix in the track header (`tkhd`) to a clockwise turn, as phones do."""
    assert degrees == 90
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version and flags 4, times and ids 20, reserved 8, layer … volume 8
    one = 0x00010000
    values = [0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(bytes(data))


def test_clips_longer_than_a_second_see_their_neighbours_and_edges_repeat() -> None:
    seconds = [np.full((2, 1, 1, 3), n, np.uint8) + np.array([0, 100], np.uint8)[:, None, None, None] for n in range(3)]
    clips = [clip[:, 0, 0, 0].tolist() for clip in clips_of_seconds(iter(seconds), np.arange(-1, 3))]
    assert clips == [[0, 0, 100, 1], [100, 1, 101, 2], [101, 2, 102, 102]]
    alone = [clip[:, 0, 0, 0].tolist() for clip in clips_of_seconds(iter(seconds), np.arange(2))]
    assert alone == [[0, 100], [1, 101], [2, 102]]


def test_files_that_are_no_videos_are_named_with_their_reason(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", [n / 10 for n in range(200)], lambda n: grey((37 * n) % 255))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    write_audio(tmp_path / "audio.mp4")
    write_video(tmp_path / "one.mp4", [0.0], lambda n: grey(100))
    for name, reason in (
        ("missing.mp4", "no such video file"),
        ("empty.mp4", "empty"),
        ("text.mp4", "not a video"),
        ("half.mp4", "not a video|truncated|damaged"),
        ("audio.mp4", "no video stream"),
        ("one.mp4", "single picture"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            decode(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_ends_before_its_header_says_is_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", [n / 10 for n in range(200)], noise)
    duration = probe(whole).duration
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match=f"of {duration:.1f} seconds"):
        decode(tmp_path / "cut.mkv")


def test_a_header_that_asks_for_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", TENTHS, lambda n: grey(100))
    monkeypatch.setattr("videoclip.data.video.MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="pixels"):
        decode(path)


def test_a_header_cannot_promise_hours_that_its_content_does_not_have(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.mp4", TENTHS, lambda n: grey(100)).read_bytes())
    unit = data.index(b"mdhd") + 4 + 12  # version and flags 4, creation 4, change 4: then ticks a second
    ticks = int.from_bytes(data[unit : unit + 4], "big")
    (tmp_path / "a.mp4").write_bytes(_patched(data, unit, (ticks // 1000).to_bytes(4, "big")).replace(b"edts", b"free"))
    assert probe(tmp_path / "a.mp4").duration == pytest.approx(3000)
    with pytest.raises(InputError, match=r"claim to be .* seconds"):
        decode(tmp_path / "a.mp4")


def test_still_slides_are_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [0.0, 1.0, 301.0, 302.0], noise)
    assert len(decode(path, fps=1)) == 303


def test_a_video_of_no_length_is_refused_or_a_second(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.mkv", TENTHS[:5], lambda n: grey(100)).read_bytes())
    unit = data.index(b"\x2a\xd7\xb1") + 4  # nanoseconds a tick, three bytes: 1,000,000 becomes 1
    (tmp_path / "a.mkv").write_bytes(_patched(data, unit, (1).to_bytes(3, "big")))
    kind, _, seconds = outcome_of(tmp_path / "a.mkv")
    assert (kind, seconds) in (("refused", 0), ("frames", 1))


def test_a_short_file_of_huge_pictures_is_refused_before_all_are_decoded(tmp_path: Path) -> None:
    times = [n / 10 for n in range(100)]
    data = bytearray(write_video(tmp_path / "a.webm", times, lambda n: grey(100), codec="libvpx").read_bytes())
    size = data.index(b"\x9d\x01\x2a") + 3  # width and height of the key frame, on which all others build
    huge = (4096).to_bytes(2, "little") * 2
    (tmp_path / "a.webm").write_bytes(_patched(data, size, huge))
    with pytest.raises(InputError, match="too many pixels for a file of"):
        decode(tmp_path / "a.webm")


def test_a_stream_that_appears_while_the_file_is_read_is_damage(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.ts", TENTHS, lambda n: grey(100)).read_bytes())
    ours = [at for at in range(0, len(data), 188) if int.from_bytes(data[at + 1 : at + 3], "big") == 0x4100]
    (tmp_path / "a.ts").write_bytes(_patched(data, ours[-1] + 2, b"\x62"))  # the last picture of stream 0x100
    with pytest.raises(InputError, match="streams change"):
        decode(tmp_path / "a.ts")


def _patched(data: bytearray, at: int, new: bytes) -> bytes:
    return bytes(data[:at] + new + data[at + len(new) :])


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile neighbour.mp4\n",
        "ffconcat version 1.0\nfile script.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nneighbour.mp4\n#EXT-X-ENDLIST\n",
    ],
    ids=["another file", "itself", "a playlist"],
)
def test_a_script_named_as_a_video_opens_no_other_file(tmp_path: Path, script: str) -> None:
    write_video(tmp_path / "neighbour.mp4", TENTHS, lambda n: grey(100))
    (tmp_path / "script.mp4").write_text(script)
    with pytest.raises(InputError, match=r"script.mp4: not a video"):
        decode(tmp_path / "script.mp4")


def test_pictures_named_as_a_video_are_refused(tmp_path: Path) -> None:
    picture = write_video(tmp_path / "picture.gif", TENTHS, lambda n: grey(100), codec="gif", pixel_format="rgb8")
    picture.rename(tmp_path / "picture.mp4")
    with pytest.raises(InputError, match="not a video"):
        decode(tmp_path / "picture.mp4")


def test_every_broken_file_gives_seconds_or_one_line(tmp_path: Path) -> None:
    wholes = write_whole_files(tmp_path)
    assert all(outcome_of(path)[0] == "frames" for path in wholes)
    outcomes = []
    for path in broken_files(wholes, tmp_path, 300, seed=0):
        outcomes.append(outcome_of(path))
        path.unlink()
    counts = Counter(kind for kind, _, _ in outcomes)
    assert set(counts) == {"frames", "refused"} and min(counts.values()) > 50, counts
    longest = max(seconds for _, _, seconds in outcomes)
    assert longest <= 600, "three seconds, whatever a header says, and a slide's patience"


def test_a_broken_file_is_the_same_for_the_same_seed() -> None:
    whole = bytes(range(256)) * 20
    one, same, other = (broken(whole, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_videos_are_found_by_suffix_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.MP4", "b/a.webm", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_videos(tmp_path)] == ["a.webm", "z.MP4"]
    with pytest.raises(InputError, match="no such folder"):
        find_videos(tmp_path / "nowhere")
