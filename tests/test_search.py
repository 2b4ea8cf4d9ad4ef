"""An archive grows, shrinks and answers: by picture, by words, by both; and its index keeps what it promises."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_archive import SAID, SILENT, WINDOWING, make_model, open_small, planned, tokens_of, update, window_total

from videoclip.embedding import embed_clips, embed_texts
from videoclip.errors import InputError
from videoclip.retrieval.index import unit
from videoclip.search.answers import clock, timecode, to_csv, to_edl, to_lines
from videoclip.search.archive import Archive
from videoclip.search.fusion import FusionConfig, fit, fuse
from videoclip.search.request import MAX_QUERY, Filter, Request
from videoclip.search.store import Line, Store, Video, window_count, window_starts
from videoclip.search.vectors import Vectors, WindowConfig
from videoclip.search.windows import WindowIndex, choose_kind, exact_search
from videoclip.search.words import WordSearch, parse_query


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return open_small(tmp_path_factory.mktemp("archive"))


def search(archive: Archive, query: str, **options: object) -> list:
    return archive.search([Request(query, **options)])[0]  # type: ignore[arg-type]


# --- Windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1, 5, 6, 7, 8, 9, 10, 37])
def test_windows_cover_every_second_and_are_counted_right(seconds: int) -> None:
    starts = window_starts(seconds, 6, 3)
    assert len(starts) == window_count(seconds, 6, 3)
    covered = {second for start in starts for second in range(start, min(start + 6, seconds))}
    assert covered == set(range(seconds))


def test_a_score_is_the_cosine_of_query_and_window(archive: Archive) -> None:
    query = "the egg is poured in the pan"
    for answer in search(archive, query, by="picture", count=5):
        video = next(v for v in planned() if v.video_id == answer.video_id)
        span = np.array([[int(answer.window_start), int(answer.window_end)]])
        window = unit(embed_clips(archive.model, tokens_of(video), span))[0]
        text = unit(embed_texts(archive.model, [query]))[0]
        assert answer.score == pytest.approx(float(window @ text), abs=2e-3)


def test_answers_of_one_video_do_not_overlap_and_filters_hold(archive: Archive) -> None:
    found = search(archive, "fold the cabbage", count=50)
    spans: dict[str, list[tuple[float, float]]] = {}
    for answer in found:
        assert all(answer.end <= a or b <= answer.start for a, b in spans.get(answer.video_id, []))
        spans.setdefault(answer.video_id, []).append((answer.start, answer.end))
    longest = max(video.duration for video in planned())
    long = search(archive, "fold the cabbage", where=Filter(shortest=longest), count=50)
    assert {answer.duration for answer in long} == {longest}
    assert search(archive, "fold the cabbage", where=Filter(folder="nowhere")) == []
    once = search(archive, "fold the cabbage", one_a_video=True, count=50)
    assert sorted(answer.video_id for answer in once) == sorted(video.video_id for video in planned())


# --- Words --------------------------------------------------------------------------------------------------------


def test_what_was_said_is_found_shown_and_its_channel_named(archive: Archive) -> None:
    found = search(archive, '"grusse" bold', by="words")  # accents are folded
    assert found[0].video_id == planned()[0].video_id and found[0].said == SAID and found[0].said_at == 12
    assert list(found[0].channels) == ["words"]
    assert found[0].start < 15 and found[0].end > 12, "a moment that was only heard has in it what was said"
    assert "words" in search(archive, "grüße bold words")[0].channels
    assert search(archive, "zebra", by="words") == []


def test_words_are_stemmed_quoted_phrases_hold_and_stars_end_beginnings(tmp_path: Path) -> None:
    store = Store(tmp_path, create=True)
    texts = ["now slicing the onion", "the onion soup", "soup of onions", "切洋葱 很快", "crème brûlée"]
    store.connection.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", enumerate(map(spaced_text, texts)))
    words = WordSearch(store.connection)

    def found(query: str) -> set[int]:
        return {window for window, _ in words.search(query, 10)}

    assert found("sliced") == {0}
    assert found('"onion soup"') == {1}
    assert found("oni*") == {0, 1, 2} and found("creme") == {4}
    assert found("洋葱") == {3} and found("葱洋") == set()
    assert words.search("onion soup", 10)[0][0] in (1, 2), "who says both comes before who says one"


def spaced_text(text: str) -> str:
    from videoclip.search.words import spaced

    return spaced(text)


@pytest.mark.parametrize(
    "query", ['" OR 1', "a AND NOT (", "NEAR(", "*", "col: x", "🎉🎉", "^x", "-y", '"""', "\x00", "'; DROP"]
)
def test_no_query_is_an_operator(query: str, archive: Archive) -> None:
    answers = search(archive, query)
    assert all(list(answer.channels) for answer in answers)
    assert WordSearch(archive._store().connection).search(query, 5) is not None


def test_queries_that_cannot_be_are_refused_and_long_ones_are_answered(archive: Archive) -> None:
    with pytest.raises(InputError, match="empty"):
        search(archive, " \n ")
    with pytest.raises(InputError, match="10000 are the most"):
        search(archive, "x" * (MAX_QUERY + 1))
    with pytest.raises(InputError, match="picture, words"):
        search(archive, "egg", by="sound")
    assert search(archive, ("the egg is poured " * 600)[:MAX_QUERY])
    assert search(archive, "Где лук? 玉ねぎ 🧅")


def test_a_frequent_word_is_left_out_when_rarer_ones_are_asked_for() -> None:
    class Counted(WordSearch):
        def __init__(self) -> None:
            pass

        def _windows(self, term):  # type: ignore[no-untyped-def]
            return {"often": 900_000, "onion": 4_000, "xylophone": 0}[term.text]

    kept = Counted()._affordable(parse_query("often onion xylophone"))
    assert [term.text for term in kept] == ["onion", "xylophone"]
    assert [term.text for term in Counted()._affordable(parse_query("often"))] == ["often"], "but never all"


def test_words_that_say_nothing_are_not_looked_for_unless_there_is_nothing_else() -> None:
    assert [term.text for term in parse_query("The onion is tossed by the window")] == ["onion", "tossed", "window"]
    assert [term.text for term in parse_query('"to be" or not')] == ["to be", "not"]
    assert [term.text for term in parse_query("to be or")] == ["to", "be", "or"]


# --- Fusion -------------------------------------------------------------------------------------------------------


def test_fusion_is_by_rank_and_a_window_of_both_channels_wins() -> None:
    fused = fuse({"picture": [1, 2, 3], "words": [9, 3]}, FusionConfig(1, 1, 60))
    assert fused[0].window == 3 and fused[0].ranks == {"picture": 3, "words": 2}
    assert fused[0].score == pytest.approx(1 / 63 + 1 / 62)
    assert [item.window for item in fuse({"picture": [1, 2], "words": [3]}, FusionConfig(words=0))] == [1, 2]


def test_fitted_weights_say_whether_they_beat_the_better_channel() -> None:
    better = fit(lambda c: 50 + 10 * (c.picture * c.words > 0.15))
    assert better.score == 60 and "10.0 more than" in str(better)
    same = fit(lambda c: 50 * c.picture)
    assert same.config.words == 0 and "no more than picture alone" in str(same)


def test_videos_in_which_nothing_is_said_are_found_beside_the_others(archive: Archive) -> None:
    silent = planned()[SILENT].video_id
    assert silent in {answer.video_id for answer in search(archive, "the egg", count=100)}
    assert [v.video_id for v, spoken in zip(archive.videos(), archive.current().spoken) if not spoken] == [silent]


def test_what_cannot_be_heard_is_not_held_against_a_window() -> None:
    said, mute = list(range(10, 30)), 1
    ranked = {"picture": [mute, *said], "words": said[::-1]}
    assert fuse(ranked)[0].window != mute, "without words it stands behind what both channels found"
    first = fuse(ranked, silent={mute})[0]
    assert first.window == mute and first.ranks == {"picture": 1}, "and no channel is named that did not find it"
    agreed = fuse({"picture": [mute, *said], "words": said}, silent={mute})
    assert agreed[0].window == 10, "seen second and heard first is more than seen first"
    unheard = fuse({"picture": [10, mute], "words": []}, silent={mute})
    assert [item.window for item in unheard] == [10, mute], "where nobody says it, pictures decide"


# --- Growing and shrinking ----------------------------------------------------------------------------------------


def test_an_archive_grows_and_shrinks_like_one_that_was_made_at_once(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for numbers in ([0, 1, 2], [0, 1, 2, 3, 4], [1, 3, 4, 5]):
        store = update(tmp_path / "grown", model, tmp_path / "model", numbers)
        kept = store.get("index")["file"]
        assert [path.name for path in (tmp_path / "grown").glob("*.faiss")] == [kept]
        store.close()
    update(tmp_path / "once", model, tmp_path / "model", [1, 3, 4, 5]).close()
    grown, once = Archive(tmp_path / "grown", model), Archive(tmp_path / "once", model)
    assert len(grown.current().index) == window_total([1, 3, 4, 5])
    for query in ("the egg is poured", "stir the onion", "grüße"):
        for by in ("picture", "words", "both"):
            one, other = ([(a.video_id, a.start, a.said) for a in search(x, query, by=by)] for x in (grown, once))
            assert one == other
    assert not search(grown, "grüße", by="words"), "what was said in a removed video is forgotten"
    assert {path.name.split(".")[0] for path in (tmp_path / "grown" / "blocks").iterdir()} == {
        f"block{n}" for n in (1, 3, 4, 5)
    }


def test_a_running_search_follows_the_archive_and_is_answered_meanwhile(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    update(tmp_path / "index", model, tmp_path / "model", [0, 1]).close()
    archive, stop, seen, wrong = Archive(tmp_path / "index", model), threading.Event(), set(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                seen.add(len({a.video_id for a in search(archive, "the egg", count=100)}))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for numbers in ([0, 1, 2], [2, 3], [0, 1, 2, 3, 4, 5]):
        update(tmp_path / "index", model, tmp_path / "model", numbers).close()
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and seen <= {1, 2, 3, 4, 6}
    assert len({a.video_id for a in search(archive, "the egg", count=100)}) == 6


def _grow_forever(folder: Path, ready: object) -> None:
    model = make_model(folder / "model-of-child")
    parent = os.getppid()
    for turn in range(1000):
        if os.getppid() != parent:
            return  # the test itself was killed
        update(folder / "index", model, folder / "model-of-child", [0, 1, 2] if turn % 2 else [2, 3, 4, 5]).close()
        ready.set()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_killed_at_any_moment_the_archive_is_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    model = make_model(tmp_path / "model")
    generator = np.random.default_rng(0)
    for _ in range(2):
        ready = context.Event()
        process = context.Process(target=_grow_forever, args=(tmp_path, ready), daemon=True)
        process.start()
        ready.wait(60)
        time.sleep(float(generator.uniform(0, 0.2)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        archive = Archive(tmp_path / "index", model)
        ids = {video.video_id for video in archive.videos()}
        assert ids in ({planned()[n].video_id for n in (0, 1, 2)}, {planned()[n].video_id for n in (2, 3, 4, 5)})
        assert {answer.video_id for answer in search(archive, "the egg", count=100, by="picture")} == ids


# --- Kinds of index -----------------------------------------------------------------------------------------------


def test_the_kind_of_index_follows_the_budget_of_memory() -> None:
    kinds = [choose_kind(10**6, 128, budget * 2**30).factory.split(",")[1] for budget in (1, 0.2, 0.08, 0.05, 0.03)]
    assert kinds == ["Flat", "SQ8", "PQ64", "PQ32", "PQ16"]
    assert choose_kind(1000, 128, 2**30).factory == "Flat"
    with pytest.raises(InputError, match=r"at least 0\.02 GB"):
        choose_kind(10**6, 128, 2**20)


class MadeVectors(Vectors):
    """Random clustered vectors in place of blocks on disk."""

    def __init__(self, videos: int, windows: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        centres = generator.standard_normal((40, 32))
        rows = centres[generator.integers(40, size=videos * windows)] + 0.7 * generator.standard_normal(
            (videos * windows, 32)
        )
        self.rows = unit(rows.astype(np.float32)).astype(np.float16)
        seconds = 6 + 3 * (windows - 1)
        self.config = WindowConfig(6, 3)
        self.videos = [
            Video(n, f"v{n}", "", "", 0, 0, "", seconds, seconds, "", n * windows, "", 0, 0) for n in range(videos)
        ]
        self.first = np.arange(videos) * windows
        self.counts = np.full(videos, windows)
        self._seconds = np.full(videos, seconds)
        self._windows, self._block_of = [self.rows], np.zeros(videos, np.int64)
        self._window_rows = self.first

    def windows_of(self, place: int) -> np.ndarray:
        return self.rows[self.first[place] : self.first[place] + self.counts[place]]


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,SQ8", "IVF64,PQ16"])
def test_texts_find_what_exact_search_finds_as_often_as_the_index_says(factory: str, tmp_path: Path) -> None:
    vectors = MadeVectors(500, 10)
    generator = np.random.default_rng(1)
    shift = generator.standard_normal(32)

    def texts(count: int) -> np.ndarray:  # they lie to one side of the windows
        near = vectors.rows[generator.integers(5000, size=count)].astype(np.float32)
        return unit((near + 0.15 * shift + 0.3 * generator.standard_normal(near.shape)).astype(np.float32))

    index = WindowIndex.build(vectors, replace(choose_kind(5000, 32, 1e9), factory=factory))
    index.tune(vectors, texts(200))
    assert index.recall >= 0.95 or index._lists().nprobe == 64
    settings = index.save(tmp_path / "i.faiss")
    again = WindowIndex.load(tmp_path / "i.faiss", settings)
    queries = texts(200)
    truth = exact_search(queries, vectors, 10)
    found = again.search(queries, 10, vectors)
    recall = np.mean([len(np.intersect1d(t, f[0])) / 10 for t, f in zip(truth, found)])
    assert recall >= index.recall - 0.05
    scores = [(vectors.windows(numbers) @ query, scores) for query, (numbers, scores) in zip(queries, found)]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in scores), "scores are cosines, however rows are shortened"
    some = vectors.numbers_of([3, 5])
    assert all(
        set(numbers) <= set(some.tolist()) and len(numbers) for numbers, _ in again.search(queries, 10, vectors, some)
    )
    again.remove(vectors.numbers_of([7]))
    assert len(again) == 4990 and again.outgrown(choose_kind(50, 32, 1e9), 50)


# --- Files and models that do not fit -----------------------------------------------------------------------------


def test_an_index_of_another_model_a_damaged_one_and_none_are_refused(tmp_path: Path) -> None:
    archive = open_small(tmp_path)
    with pytest.raises(InputError, match="another model"):
        Archive(tmp_path / "index", archive.model, "f" * 64)
    with pytest.raises(InputError, match="no such index"):
        Archive(tmp_path / "nowhere")
    next((tmp_path / "index").glob("*.faiss")).write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        Archive(tmp_path / "index", archive.model)
    (tmp_path / "index" / "archive.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(InputError, match="damaged"):
        Archive(tmp_path / "index", archive.model)


def test_a_file_that_vanished_or_was_replaced_is_said_to_be(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for video in planned():
        (videos / f"{video.video_id}.mp4").write_bytes(b"x" * 10)
    archive = open_small(tmp_path, videos)
    by_id = {video.video_id: video for video in archive.videos()}
    gone, changed, kept = (planned()[n].video_id for n in (0, 1, 2))
    (videos / f"{gone}.mp4").rename(videos / "renamed.mp4")
    (videos / f"{changed}.mp4").write_bytes(b"y" * 11)
    assert "gone or was renamed" in by_id[gone].state() and "replaced" in by_id[changed].state()
    assert by_id[kept].state() == ""


# --- Written down -------------------------------------------------------------------------------------------------


def test_answers_are_written_for_people_programs_and_editors(archive: Archive) -> None:
    assert clock(3723.9) == "1:02:03" and timecode(3723.96, 25) == "01:02:03:24"
    answers = [replace(a, path="/videos/a b.mp4") for a in search(archive, "grüße bold egg", by="words", count=3)]
    assert "file:///videos/a%20b.mp4#t=" in to_lines(answers) and SAID in to_lines(answers)
    rows = list(csv.DictReader(io.StringIO(to_csv([replace(answers[0], said="=cmd()"), *answers[1:]]))))
    assert rows[0]["said"] == "'=cmd()" and float(rows[1]["score"]) == answers[1].score
    edl = to_edl(answers, "grüße\nbold").splitlines()
    assert edl[0] == "TITLE: grüße bold" and edl[1] == "FCM: NON-DROP FRAME"
    events = [line.split() for line in edl if line[:3].isdigit()]
    assert [event[0] for event in events] == ["001", "002", "003"] and events[0][6] == "01:00:00:00"
    assert events[1][6] == events[0][7], "one cut ends where the next begins"


def test_more_like_a_moment_leaves_the_moment_itself_out(archive: Archive) -> None:
    video = archive.videos()[0]
    found = archive.like(video.number, 3, 9)
    assert found and all(a.number != video.number or a.end <= 3 or a.start >= 9 for a in found)
    with pytest.raises(InputError, match="no video number 999"):
        archive.like(999, 0, 5)


def test_a_curve_has_a_value_for_every_second(archive: Archive) -> None:
    video = archive.videos()[0]
    curve, moments = archive.curve(video.number, "the egg")
    assert len(curve) == video.seconds and all(0 <= a < b <= video.seconds for a, b, _ in moments)
    assert all(isinstance(line, Line) for line in archive.transcript(video.number))
    assert WINDOWING.window == archive.windowing.window
