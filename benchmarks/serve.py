"""An archive of a million windows: time to index, memory, recall, and how long visitors wait at eight at a time.

Vectors are made, not seen: 71,429 videos of a minute whose windows lie around the embedding of what is said in them,
shifted as pictures are from texts. Words are drawn by Zipf's law, 714,290 lines of them. The text encoder is real (two
layers, 128 wide; random weights, centred), and the server is the one that `videoclip serve` runs, asked over HTTP for
both channels together, one new query after another. `--windows` makes it smaller.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import torch

from videoclip.data.captions import Captions
from videoclip.data.words import train_wordpiece
from videoclip.embedding import embed_texts
from videoclip.files import sha256, write_array
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.retrieval.index import unit
from videoclip.search.archive import Archive
from videoclip.search.building import GIGABYTE, NewVideo, apply_changes, find_changes
from videoclip.search.store import Store, window_count, window_starts
from videoclip.search.vectors import BLOCKS, WindowConfig
from videoclip.search.windows import exact_search

SECONDS, LINES_A_VIDEO = 60, 10
VOCABULARY, DIFFERENT_LINES, WORDS_A_LINE = 20_000, 20_000, 8
VIDEOS_A_BLOCK = 5000
WINDOWING = WindowConfig()
WINDOWS_A_VIDEO = window_count(SECONDS, WINDOWING.window, WINDOWING.stride)
CLIENTS, QUERIES_A_CLIENT = 8, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--pause", type=float, default=0.25, help="mean seconds before a client asks again")
    parser.add_argument("--folder", type=Path, help="where the archive is made, and kept; else a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        lines = spoken_lines()
        model = make_model(folder / "model", lines)
        if not (folder / "index").exists():
            make_index(folder / "index", model, folder / "model", lines, -(-options.windows // WINDOWS_A_VIDEO))
        recall(folder / "index", model, lines)
        for pause in (options.pause, 0.0):
            visit(folder, lines, pause)


def spoken_lines() -> list[str]:
    """Different lines of words that are as frequent as words are."""
    generator = np.random.default_rng(0)
    syllables = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(generator.choice(syllables, generator.integers(2, 5))) for _ in range(VOCABULARY)]
    shares = 1 / np.arange(1, VOCABULARY + 1)
    drawn = generator.choice(VOCABULARY, (DIFFERENT_LINES, WORDS_A_LINE), p=shares / shares.sum())
    return [" ".join(words[i] for i in row) for row in drawn]


def make_model(folder: Path, lines: list[str]) -> VideoCLIP:
    """A text encoder of the demo's size with random weights, saved."""
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = train_wordpiece(lines[:2000], 2000)
        ids = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id, "vocabulary": tokenizer.vocabulary}
        model = VideoCLIP(VideoCLIPConfig(video_dimension=64, width=128, layers=2, heads=4, intermediate=512, **ids))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(4)
        model.frozen.tokenizer = tokenizer
        centre(model, lines[:2000])
        model.save_pretrained(folder)
    return VideoCLIP.from_pretrained(folder)


def centre(model: VideoCLIP, lines: list[str]) -> None:
    """Take from the outputs what all texts share, as training does: texts of random weights are all alike (cosine 0.92
    on average), those of the demo's model are not (0.12, deviation 0.22), and after this these are not (0.00, 0.19)."""
    plain = VideoCLIP(replace(model.config, normalize=False))
    plain.load_state_dict(model.state_dict())
    plain.frozen.tokenizer = model.frozen.tokenizer
    shared = torch.from_numpy(embed_texts(plain.eval(), lines).mean(0))
    model.mm_encoder.bert.encoder.layer[-1].output.LayerNorm.bias.data -= shared


def make_index(folder: Path, model: VideoCLIP, model_folder: Path, lines: list[str], videos: int) -> None:
    """Write the blocks, then time what `videoclip index` does once videos are embedded."""
    texts = unit(embed_texts(model, lines))
    generator = np.random.default_rng(1)
    added = []
    for first in range(0, videos, VIDEOS_A_BLOCK):
        added += make_block(folder, first, min(VIDEOS_A_BLOCK, videos - first), texts, lines, generator)
    store = Store(folder, create=True)
    store.set("model", sha256(model_folder / "model.safetensors"))
    start = time.perf_counter()
    changes = find_changes(store, {video.video_id: video.digest for video in added})
    index = apply_changes(store, changes, added, WINDOWING, 2 * GIGABYTE, texts[:256])
    print(f"{videos} videos, {videos * WINDOWS_A_VIDEO} windows, {store.line_count()} lines")
    print(index.described("texts"))
    print(f"indexed in {(time.perf_counter() - start) / 60:.1f} minutes once embedded", flush=True)
    store.close()


def make_block(
    folder: Path, first: int, count: int, texts: np.ndarray, lines: list[str], generator: np.random.Generator
) -> list[NewVideo]:
    """Vectors and captions of some videos."""
    chosen = generator.integers(len(lines), size=(count, LINES_A_VIDEO))
    starts = window_starts(SECONDS, WINDOWING.window, WINDOWING.stride)
    line_of_window = (starts + WINDOWING.window // 2) * LINES_A_VIDEO // SECONDS
    shift = np.random.default_rng(2).standard_normal(texts.shape[1]).astype(np.float32)
    said = texts[chosen[:, line_of_window]]  # (count, windows, H)
    noise = unit(generator.standard_normal((said[..., 0].size, texts.shape[1])).astype(np.float32))
    windows = unit(0.6 * said.reshape(noise.shape) + 0.8 * noise + 0.5 * shift / np.linalg.norm(shift))
    seconds = windows.reshape(count, -1, texts.shape[1])[:, np.arange(SECONDS) * len(starts) // SECONDS]
    name = f"block{first:07d}"
    write_array(folder / BLOCKS / f"{name}.seconds.npy", seconds.reshape(-1, texts.shape[1]).astype(np.float16))
    write_array(folder / BLOCKS / f"{name}.windows.npy", windows.astype(np.float16))
    begin = np.arange(LINES_A_VIDEO, dtype=np.float32) * SECONDS / LINES_A_VIDEO
    return [
        NewVideo(
            f"video{first + row:07d}",
            "made",
            SECONDS,
            float(SECONDS),
            Captions(begin, begin + 5, [lines[i] for i in chosen[row]]),
            name,
            row * len(starts),
            row * SECONDS,
        )
        for row in range(count)
    ]


def recall(folder: Path, model: VideoCLIP, lines: list[str]) -> None:
    """How many of the ten truly nearest windows texts find that the index was not tuned with."""
    archive = Archive(folder, model)
    now = archive.current()
    queries = unit(embed_texts(model, questions(lines, 200, seed=5)))
    truth = exact_search(queries, now.vectors, 10)
    found = now.index.search(queries, 10, now.vectors)
    print(
        f"recall@10 of 200 other texts {np.mean([len(np.intersect1d(t, f[0])) / 10 for t, f in zip(truth, found)]):.3f}"
    )


def questions(lines: list[str], count: int, seed: int) -> list[str]:
    """Four words of one line and one of another."""
    generator = np.random.default_rng(seed)
    pairs = generator.integers(len(lines), size=(count, 2))
    return [" ".join([*generator.permutation(lines[a].split())[:4], lines[b].split()[0]]) for a, b in pairs]


def visit(folder: Path, lines: list[str], pause: float) -> None:
    """Start the server, ask it by eight clients at once, and say how long they waited."""
    words = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0"]
    words += ["--model", str(folder / "model"), "--index", str(folder / "index")]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline().rpartition(":")[2].strip("/\n"))
    try:
        ask(port, questions(lines, 20, seed=99), 0.0, [])  # files are read into the system's cache
        waits: list[float] = []
        threads = [
            threading.Thread(target=ask, args=(port, questions(lines, QUERIES_A_CLIENT, seed=i), pause, waits, i))
            for i in range(CLIENTS)
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(waits) / (time.perf_counter() - start)
        p50, p99 = np.percentile(waits, [50, 99]) * 1000
        how = f"asking again {pause:g} s after an answer on average" if pause else "asking again at once"
        print(f"{CLIENTS} clients {how}: {rate:.0f} queries a second, p50 {p50:.0f} ms, p99 {p99:.0f} ms")
        status = Path(f"/proc/{server.pid}/status").read_text()
        sizes = {row.split(":")[0]: int(row.split()[1]) / 2**20 for row in status.splitlines() if "kB" in row}
        print(f"memory {sizes['RssAnon']:.2f} GB, with mapped files {sizes['VmRSS']:.2f} GB", flush=True)
    finally:
        server.terminate()
        server.wait()


def ask(port: int, queries: list[str], pause: float, waits: list[float], seed: int = 0) -> None:
    """One client: one connection, one query after the other, at moments of its own: people do not ask in step."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    pauses = np.random.default_rng([6, seed]).exponential(pause, len(queries))
    for query, before in zip(queries, pauses.tolist()):
        time.sleep(before)
        start = time.perf_counter()
        connection.request("GET", f"/api/search?{urlencode({'q': query, 'count': 10})}")
        answers = json.loads(connection.getresponse().read())["answers"]
        waits.append(time.perf_counter() - start)
        assert answers


if __name__ == "__main__":
    main()
