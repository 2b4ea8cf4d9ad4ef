"""Text to word ids: one WordPiece (or other) tokenizer for training, search and evaluation alike."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videoclip.data.lazy import Lazy
from videoclip.data.shards import Shards
from videoclip.errors import InputError
from videoclip.files import atomic_path, write_text
from videoclip.packed import Packed

TOKENIZER_FILE = "tokenizer.json"
PARTS_A_FILE = 64  # of word ids: 300 files for HowTo100M, and enough of them to share out among workers
# First and last word of a text: BERT's, RoBERTa's, CLIP's, Gemma's (SigLIP 2); SigLIP's texts have an end word only,
# which then stands for both, and whoever embeds leaves the first one out.
SPECIAL_WORDS = (
    ("[CLS]", "[SEP]"),
    ("<s>", "</s>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<bos>", "<eos>"),
    ("</s>", "</s>"),
)

# Forked data workers would otherwise make the tokenizer warn on every text.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class WordTokenizer:
    """A `tokenizers.Tokenizer` with the two special words that VideoCLIP puts around a text.

    Raises InputError if the vocabulary lacks `[CLS]`/`[SEP]` (or `<s>`/`</s>`).
    """

    def __init__(self, tokenizer: Any, where: Path | str = "tokenizer") -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        for first, last in SPECIAL_WORDS:
            cls_id, sep_id = tokenizer.token_to_id(first), tokenizer.token_to_id(last)
            if cls_id is not None and sep_id is not None:
                self.cls_id, self.sep_id = int(cls_id), int(sep_id)
                break
        else:
            raise InputError(f"{where}: the vocabulary has neither [CLS] and [SEP] nor <s> and </s>")

    @classmethod
    def load(cls, folder: Path) -> WordTokenizer:
        """Read `tokenizer.json` from a model folder.

        Raises InputError if it is missing or no tokenizer.
        """
        from tokenizers import Tokenizer

        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such file; a model folder needs its tokenizer")
        try:
            return cls(Tokenizer.from_file(str(path)), path)
        except InputError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise InputError(f"{path}: not a tokenizer ({error})") from None

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`."""
        write_text(Path(folder) / TOKENIZER_FILE, self.tokenizer.to_str())

    @property
    def vocabulary(self) -> int:
        """Number of word ids."""
        return int(self.tokenizer.get_vocab_size())

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of everything that decides which ids a text gets."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def special_ids(self) -> dict[str, int]:
        """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK], for recipes that hide words.

        Raises InputError if the vocabulary lacks one.
        """
        ids = {word: self.tokenizer.token_to_id(word) for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
        if missing := [word for word, number in ids.items() if number is None]:
            raise InputError(f"the vocabulary has no {', '.join(missing)}: words cannot be hidden with it")
        return {word: int(number) for word, number in ids.items()}

    def word_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the special words."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def clip_ids(self, texts: Sequence[str], max_words: int) -> Packed:
        """`[CLS] … [SEP]` ids of each text, at most `max_words` between them: rows int32."""
        rows = [[self.cls_id, *ids[:max_words], self.sep_id] for ids in self.word_ids(texts)]
        ids = torch.tensor([word for row in rows for word in row], dtype=torch.int32)
        return Packed(ids, torch.tensor([len(row) for row in rows], dtype=torch.int64))


def train_wordpiece(texts: Iterable[str], vocabulary: int = 2000) -> WordTokenizer:
    """A lower-casing WordPiece vocabulary of at most `vocabulary` entries, fitted to `texts`.

    Deterministic, which the library's trainer alone is not: it numbers the pieces inside a word (`##a`) in the order
    of a hash map and breaks ties by number. Here they are numbered beforehand.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    texts = list(texts)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    characters = sorted({character for text in texts for character in normalizer.normalize_str(text)} - {" "})

    def make(model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    fitted = make(models.WordPiece(unk_token="[UNK]"))
    first = [*special, *(f"##{character}" for character in characters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocabulary, len(first)), special_tokens=first, show_progress=False
    )
    fitted.train_from_iterator(texts, trainer)
    # A new tokenizer from the vocabulary alone: in the fitted one `##a` would count as a special word.
    tokenizer = make(models.WordPiece(fitted.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    return WordTokenizer(tokenizer)


class CaptionWords:
    """Word ids of every caption of a folder of shards: made once for a tokenizer, in files that are memory-mapped.

    A file has the words of PARTS_A_FILE parts, a record batch each; a row is the word ids of one caption.
    `parts[p]` is (ids int32 [words], offsets int64 [captions + 1]), in the order of part p's captions.
    """

    def __init__(self, shards: Shards, tokenizer: WordTokenizer, folder: Path, share: slice = slice(None)) -> None:
        """The files are `folder/words-<tokenizer>-<parts>.arrow`; those that are there already are used again.

        Those of `share` that are missing are made, by default all. Others must be there before their parts are used:
        `slice(rank, None, workers)` makes a worker's share of them, whatever the number of workers.
        """
        parts = shards.manifest.parts
        self.bounds = [*range(0, len(parts), PARTS_A_FILE), len(parts)]
        self.paths = []
        for first, last in itertools.pairwise(self.bounds):
            identity = hashlib.sha256("".join(part.digest for part in parts[first:last]).encode()).hexdigest()
            self.paths.append(Path(folder) / f"words-{tokenizer.fingerprint()[:12]}-{identity[:12]}.arrow")
        for number in range(len(self.paths))[share]:
            if not self.paths[number].exists():
                self._write(number, shards, tokenizer)
        bounds, paths = self.bounds, self.paths  # not self: a circle would keep maps open until it is found
        readers = Lazy(len(paths), lambda n: _open(paths[n], bounds[n + 1] - bounds[n]), limit=len(paths))
        # Views of few maps: to keep them costs nothing.
        self.parts = Lazy(len(parts), lambda n: _words_of_part(readers, n), limit=len(parts))

    def _write(self, number: int, shards: Shards, tokenizer: WordTokenizer) -> None:
        import pyarrow as pa

        schema = pa.schema({"words": pa.large_list(pa.int32())})
        with (
            atomic_path(self.paths[number]) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for part in range(self.bounds[number], self.bounds[number + 1]):
                ids = tokenizer.word_ids(shards.parts[part].caption_text.to_pylist())
                offsets = np.cumsum([0] + [len(row) for row in ids], dtype=np.int64)
                flat = np.array([word for row in ids for word in row], np.int32)
                words = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
                writer.write_batch(pa.record_batch([words], schema=schema))


def _open(path: Path, parts: int) -> Any:
    """A mapped file of the word ids of so many parts. Raises InputError if it is none."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}; delete this file, it is made again") from None
    if reader.num_record_batches != parts:
        raise InputError(f"{path}: is not of these shards; delete this file, it is made again")
    return reader


def _words_of_part(readers: Lazy[Any], part: int) -> tuple[np.ndarray, np.ndarray]:
    number, inside = divmod(part, PARTS_A_FILE)
    words = readers[number].get_batch(inside).column("words")
    if not len(words):
        return np.zeros(0, np.int32), np.zeros(1, np.int64)
    return words.values.to_numpy(zero_copy_only=True), words.offsets.to_numpy(zero_copy_only=True)
