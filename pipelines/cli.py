"""The command `videoclip`: one verb a stage, options from each stage's dataclass, a YAML file, or both."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from videoclip.errors import InputError

# verb -> (module, configuration, function, one line). Imported when chosen: `--help` should not wait for torch.
VERBS: dict[str, tuple[str, str, str, str]] = {
    "demo": ("demo", "DemoConfig", "demo", "everything, on a generated cooking channel, in a few minutes"),
    "captions": ("captions", "CaptionsConfig", "captions", "show what is understood of the subtitles of a folder"),
    "transcribe": ("transcribe", "TranscribeConfig", "transcribe", "speech to text, where there are no subtitles"),
    "extract": ("extract", "ExtractConfig", "extract", "videos and captions to shards of tokens"),
    "pretrain": ("pretrain", "PretrainConfig", "pretrain", "learn from shards with captions"),
    "cluster": ("cluster", "ClusterConfig", "cluster", "group videos into batches of similar ones"),
    "index": ("index", "IndexConfig", "build_index", "make videos searchable by picture and by word"),
    "search": ("search", "SearchConfig", "search", "find moments or videos by describing them"),
    "serve": ("serve", "ServeConfig", "serve", "a page to search and watch an archive"),
    "mcp": ("mcp_server", "MCPConfig", "serve_mcp", "an archive as tools for programs that speak MCP"),
    "evaluate youcook2": ("evaluate", "RetrievalConfig", "evaluate_retrieval", "retrieval of annotated clips"),
    "evaluate msrvtt": ("evaluate", "MSRVTTConfig", "evaluate_msrvtt", "retrieval of videos"),
    "evaluate didemo": ("evaluate", "DiDeMoConfig", "evaluate_didemo", "retrieval of videos by paragraphs"),
    "evaluate qvhighlights": ("evaluate", "MomentConfig", "evaluate_moments", "moments and highlights"),
    "evaluate coin": ("evaluate_actions", "COINConfig", "evaluate_coin", "action segmentation"),
    "evaluate crosstask": ("evaluate_actions", "CrossTaskConfig", "evaluate_crosstask", "localisation of steps"),
    "evaluate msrvtt-qa": ("evaluate_actions", "QuestionConfig", "evaluate_questions", "multiple-choice questions"),
    "evaluate mteb": ("evaluate_mteb", "MTEBConfig", "evaluate_mteb", "tasks of the field's own harness"),
    "report": ("report", "ReportConfig", "report", "results as one self-contained page"),
    "convert mmpt": ("convert", "ConvertMMPTConfig", "convert_mmpt", "a published VideoCLIP checkpoint into a model"),
    "convert features": ("convert", "ConvertFeaturesConfig", "convert_features", "a folder of .npy tokens into shards"),
    "convert shards": ("convert", "ConvertShardsConfig", "convert_shards", "shards into a folder of .npy tokens"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, or 2 after one line about what was wrong with the input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from videoclip import __version__

        print(f"videoclip {__version__}")
        return 0
    verb, rest = _split_verb(words)
    if verb is None:
        return _fail(f"unknown verb {' '.join(words[:2])!r}; see videoclip --help")
    try:
        return _run(verb, rest)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            place = f" ({error.filename})" if error.filename else ""
            return _fail(
                f"cannot write: {os.strerror(error.errno)}{place}; what was finished is kept, run again to go on"
            )
        raise


def _overview() -> str:
    lines = ["usage: videoclip VERB [options]", "", "Find moments in narrated video by describing them.", ""]
    lines += [f"  {verb:24s}{line}" for verb, (_, _, _, line) in VERBS.items()]
    lines += ["", "videoclip VERB --help lists a verb's options; --config FILE.yaml fills them, options win."]
    return "\n".join(lines)


def _split_verb(words: list[str]) -> tuple[str | None, list[str]]:
    for count in (2, 1):
        verb = " ".join(words[:count])
        if verb in VERBS:
            return verb, words[count:]
    return None, words


def _run(verb: str, words: list[str]) -> int:
    import tyro

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("videoclip").setLevel(logging.INFO)
    module_name, config_name, function_name, _ = VERBS[verb]
    module = import_module(f"pipelines.{module_name}")
    config_class: Any = getattr(module, config_name)
    function: Callable[[Any], Any] = getattr(module, function_name)
    words, default = _take_config_file(words, config_class)
    extra = {} if default is None else {"default": default}
    config = tyro.cli(config_class, prog=f"videoclip {verb}", args=words, **extra)
    result = function(config)
    if verb.startswith("evaluate"):
        _print_metrics(result)
    return 0


def _take_config_file(words: list[str], config_class: Any) -> tuple[list[str], Any]:
    """Remove `--config FILE` from the options; the file's values become the defaults of the others."""
    for place, word in enumerate(words):
        if word == "--config":
            if place + 1 == len(words):
                raise InputError("--config needs a YAML file")
            return words[:place] + words[place + 2 :], _read_yaml(words[place + 1], config_class)
        if word.startswith("--config="):
            return words[:place] + words[place + 1 :], _read_yaml(word.partition("=")[2], config_class)
    return words, None


def _read_yaml(path: str, config_class: Any) -> Any:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return _fill(config_class, values, path)


def _fill(config_class: Any, values: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping; what the mapping lacks and has no default stays to be given."""
    import dataclasses
    import typing
    from pathlib import Path

    import tyro

    if not isinstance(values, dict):
        raise InputError(f"{where}: expected options by name")
    known = {item.name: item for item in dataclasses.fields(config_class)}
    names = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(f"{where}: unknown options {', '.join(unknown)}; known are {', '.join(known)}")
    types = typing.get_type_hints(config_class)
    filled = {}
    for name, item in known.items():
        if name in names:
            value, kind = names[name], types[name]
            if dataclasses.is_dataclass(kind):
                value = _fill(kind, value, f"{where}: {name}")
            elif isinstance(value, str) and (kind is Path or Path in typing.get_args(kind)):
                value = Path(value)
            elif isinstance(value, list):
                value = tuple(value)
            filled[name] = value
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            filled[name] = tyro.MISSING
    return config_class(**filled)


def _print_metrics(metrics: dict[str, Any]) -> None:
    baseline = metrics.get("baseline", {})
    for name, value in metrics.get("brief", metrics).items():
        if isinstance(value, (int, float)):
            beside = f"   (query-blind {baseline[name]:.2f})" if name in baseline else ""
            print(f"{name:24s}{value:8.2f}{beside}")
        elif isinstance(value, dict):
            print(f"{name:24s}" + "  ".join(f"{inner} {figure:g}" for inner, figure in value.items()))
    if metrics.get("dropped"):
        print(f"{metrics['dropped']} annotated items left out: their videos are not in the shards")


def _fail(message: str) -> int:
    print(f"videoclip: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
