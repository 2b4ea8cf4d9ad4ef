"""The command `videoclip`: one verb a stage, options from each stage's dataclass, a YAML file, or both."""

from __future__ import annotations

import ast
import errno
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.stopping import EXIT_CODE, Stopped
from videoclip.errors import InputError
from videoclip.remote import StorageError

# verb -> module:function. The function's first parameter is the dataclass of its options, whose docstring is the help.
# Imported when chosen: `--help` should not wait for torch.
VERBS: dict[str, str] = {
    "demo": "demo:demo",
    "captions": "captions:captions",
    "transcribe": "transcribe:transcribe",
    "extract": "extract:extract",
    "extract frames": "frames:extract_frames",
    "recipes": "recipes:print_recipes",
    "pretrain": "pretrain:pretrain",
    "pretrain frames": "pretrain_frames:pretrain_frames",
    "align": "align:align",
    "cluster": "cluster:cluster",
    "index": "index:build_index",
    "search": "search:search",
    "serve": "serve:serve",
    "mcp": "mcp_server:serve_mcp",
    "finetune": "finetune:finetune",
    "finetune questions": "finetune_questions:finetune_questions",
    "teachtext": "teachtext:teachtext",
    "prompt": "prompting:prompt",
    "evaluate youcook2": "evaluate_retrieval:evaluate_retrieval",
    "evaluate msrvtt": "evaluate_retrieval:evaluate_msrvtt",
    "evaluate didemo": "evaluate_retrieval:evaluate_didemo",
    "evaluate qvhighlights": "evaluate_moments:evaluate_moments",
    "evaluate coin": "evaluate_actions:evaluate_coin",
    "evaluate crosstask": "evaluate_actions:evaluate_crosstask",
    "evaluate msrvtt-qa": "evaluate_actions:evaluate_questions",
    "evaluate htm-align": "evaluate_actions:evaluate_htm_align",
    "evaluate open-questions": "evaluate_questions:evaluate_open_questions",
    "evaluate actions": "evaluate_recognition:evaluate_actions",
    "evaluate detection": "evaluate_recognition:evaluate_detection",
    "evaluate mteb": "evaluate_mteb:evaluate_mteb",
    "compare": "compare:compare",
    "report": "report:report",
    "status": "status:status",
    "convert mmpt": "convert:convert_mmpt",
    "convert alpro": "convert:convert_alpro",
    "convert experts": "convert:convert_experts",
    "convert efficient-prompt": "convert:convert_prompts",
    "convert features": "convert:convert_features",
    "convert shards": "convert:convert_shards",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 after one line about bad input, 130 after Ctrl-C, 75 after SIGTERM."""
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
    except Stopped as stopped:
        print(f"videoclip: {stopped}; the same command goes on from here", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except StorageError as error:
        return _fail(f"{error}; the same command goes on from here")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            place = f" ({error.filename})" if error.filename else ""
            return _fail(
                f"cannot write: {os.strerror(error.errno)}{place}; what was finished is kept, run again to go on"
            )
        raise


def _overview() -> str:
    lines = ["usage: videoclip VERB [options]", "", "Find moments in narrated video by describing them.", ""]
    lines += [f"  {verb:24s}{_one_line(verb)}" for verb in VERBS]
    lines += ["", "videoclip VERB --help lists a verb's options; --config FILE.yaml fills them, options win."]
    return "\n".join(lines)


def _one_line(verb: str) -> str:
    """How the help of a verb begins, read from the source: importing every module would take seconds."""
    module, _, function = VERBS[verb].partition(":")
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    named = {item.name: item for item in tree.body if isinstance(item, (ast.FunctionDef, ast.ClassDef))}
    runs = named[function]
    assert isinstance(runs, ast.FunctionDef) and runs.args.args[0].annotation is not None
    options = named[ast.unparse(runs.args.args[0].annotation)]
    text = " ".join((ast.get_docstring(options) or "").split())
    return re.split(r"[.:?](?:\s|$)", text, maxsplit=1)[0]


def _split_verb(words: list[str]) -> tuple[str | None, list[str]]:
    for count in (2, 1):
        verb = " ".join(words[:count])
        if verb in VERBS:
            return verb, words[count:]
    return None, words


def _run(verb: str, words: list[str]) -> int:
    import tyro

    from pipelines.figures import Figures
    from pipelines.options import read_options
    from pipelines.remote_options import at_hand

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("videoclip").setLevel(logging.INFO)
    module_name, _, function_name = VERBS[verb].partition(":")
    module = import_module(f"pipelines.{module_name}")
    function: Callable[[Any], Any] = getattr(module, function_name)
    config_class: type[Any] = getattr(module, next(iter(inspect.signature(function).parameters.values())).annotation)
    words, path = _take_config_file(words)
    if "recipe" in config_class.__dataclass_fields__:  # whose options depend on which one it is
        config_class = module.config_of_recipe(_chosen_recipe(words, path, config_class.recipe))
    default = {"default": read_options(path, config_class)} if path else {}
    with at_hand(tyro.cli(config_class, prog=f"videoclip {verb}", args=words, **default)) as config:
        result = function(config)
    if isinstance(result, Figures) and result:
        print(result)
    return 0


def _chosen_recipe(words: list[str], path: Path | None, default: str) -> str:
    """What `--recipe` says, or the YAML file, or else the default."""
    from pipelines.options import read_value

    for place, word in enumerate(words):
        if word == "--recipe" and place + 1 < len(words):
            return words[place + 1]
        if word.startswith("--recipe="):
            return word.partition("=")[2]
    return str(read_value(path, "recipe", default)) if path else default


def _take_config_file(words: list[str]) -> tuple[list[str], Path | None]:
    """The options without `--config FILE`, and the file, whose values become the defaults of the others."""
    for place, word in enumerate(words):
        if word == "--config":
            if place + 1 == len(words):
                raise InputError("--config needs a YAML file")
            return words[:place] + words[place + 2 :], Path(words[place + 1])
        if word.startswith("--config="):
            return words[:place] + words[place + 1 :], Path(word.partition("=")[2])
    return words, None


def _fail(message: str) -> int:
    print(f"videoclip: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
