"""The command line: parse, and hand over to `corank.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

RUNTIME = "how to run it: auto (the fastest as measured here), packed, chunked, flashsvd, graph, triton (default: torch, as it is)"
MODEL = "a directory, a hub id, a .gguf file, or the alias smollm2-135m"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; every ``--help`` ends with examples."""
    parser = argparse.ArgumentParser(
        prog="corank",
        description="Compress neural networks by factorizing them. Results are ordinary Hugging Face directories.",
        epilog="start here:\n  corank demo\n  corank compress smollm2-135m --keep 0.8 --out small\n"
        "  corank eval small\n  corank methods",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")
        return sub

    sub = command(
        "compress",
        "compress a model into a new directory",
        "  corank compress smollm2-135m --keep 0.8 --out small\n"
        "  corank compress smollm2-135m --max-perplexity-increase 5% --out small\n"
        "  corank compress smollm2-135m --method svd-llm --keep 0.8 --set pack=true --out small\n"
        "  corank compress smollm2-135m --method curing --out cured           # the paper's own rank rule\n"
        "  corank compress ORG/MODEL --budget-latency 0.7 --latency-device h200 --out fast\n"
        "  corank compress ORG/MODEL --bytes 10GiB --scope model --set allocate=lagrange --out small",
    )
    sub.add_argument("model", nargs="?", help=MODEL)
    _method(sub)
    budget = _budget(sub)
    budget.add_argument(
        "--max-perplexity-increase",
        metavar="SHARE",
        help="in place of a size: the smallest model whose perplexity on --heldout rises by no more than this, e.g. 5%%",
    )
    budget.add_argument(
        "--budget-latency",
        metavar="SHARE",
        help="in place of a size: the fraction of the predicted time of the matrices that they may take, e.g. 0.7",
    )
    budget.add_argument("--latency-batch", type=int, help="sequences in the step that is predicted (default: 1)")
    budget.add_argument(
        "--latency-tokens",
        type=int,
        help="new tokens of each: 1 is decoding, more the prefill of a prompt (default: 1)",
    )
    budget.add_argument(
        "--latency-device", help="h200, a JSON file that describes a device, cpu or cuda (default: this machine)"
    )
    _data(sub)
    sub.add_argument(
        "--heldout",
        default="builtin-test",
        help="text to judge that by, not the calibration text (default: %(default)s)",
    )
    sub.add_argument("--out", required=True, help="directory to write; it must not exist or be empty")
    sub.add_argument("--cache", help="directory for statistics, shared by runs on the same model and data")
    sub.add_argument(
        "--recipe", metavar="FILE", help="YAML with any of: model, method, set, keep, data, ... ; flags win"
    )
    _windows(sub, 16)
    sub.add_argument(
        "--speed", action="store_true", help="also time prefill and decoding, before and after, interleaved"
    )
    sub.add_argument("--no-eval", action="store_true", help="do not measure perplexity before and after")

    sub = command(
        "eval",
        "measure a model, dense or compressed: its perplexity, or its scores on tasks of lm-eval",
        "  corank eval small\n  corank eval small --text wiki.test.txt --windows 0       # the whole text\n"
        "  corank eval smollm2-135m --json\n"
        "  corank eval small --tasks arc_easy,piqa --limit 200 --results scores.json\n"
        "  corank eval small --tasks my_task --tasks-dir tasks           # no network needed",
    )
    sub.add_argument("model", help=MODEL + "; dense or compressed")
    sub.add_argument("--device", help="where to compute (default: the CPU)")
    sub.add_argument("--runtime", help=RUNTIME)
    _windows(sub, 64)
    _tasks(sub)

    sub = command(
        "compare",
        "compress with several methods at several budgets: one table, one Pareto plot",
        "  corank compare smollm2-135m --methods svd,svd-llm,curing,col-id --keep 0.9 0.8 --out comparison",
    )
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--methods", required=True, help="names, separated by commas")
    sub.add_argument("--keep", nargs="+", required=True, help="one or more budgets")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for every method that has it"
    )
    sub.add_argument("--out", required=True, help="directory for results; an interrupted comparison continues there")
    sub.add_argument("--save-models", action="store_true", help="keep the compressed models as well")
    _data(sub)
    _windows(sub, 16)

    sub = command(
        "inspect",
        "show what a model consists of and what a plan would do, before doing it",
        "  corank inspect smollm2-135m\n  corank inspect smollm2-135m --spectra\n"
        "  corank inspect smollm2-135m --method svd-llm --keep 0.8 --set allocate=lagrange",
    )
    sub.add_argument("model", help=MODEL + "; dense or compressed")
    sub.add_argument("--spectra", action="store_true", help="singular values of the weights, by role")
    _method(sub, default=None)
    _budget(sub)
    _data(sub)

    sub = command(
        "plot", "draw the plots of one or several reports", "  corank plot small --out plots\n  corank plot comparison"
    )
    sub.add_argument("reports", nargs="+", help="directories that hold a report.json, or such files")
    sub.add_argument("--out", help="directory for the pictures (default: the report's own)")
    sub.add_argument("--format", default="png", choices=("png", "svg", "pdf"))

    sub = command("generate", "let a model continue a prompt", '  corank generate small --prompt "Once upon a time"')
    sub.add_argument("model", help=MODEL + "; dense or compressed")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--tokens", type=int, default=64, help="new tokens")
    sub.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--chat", action="store_true", help="apply the chat template")
    sub.add_argument("--runtime", help=RUNTIME)

    sub = command(
        "bench",
        "time prefill and decoding, interleaved, against a baseline",
        "  corank bench small --baseline smollm2-135m --batch 1,8\n"
        "  corank bench small --baseline smollm2-135m --predict          # predicted beside measured\n"
        "  corank bench small --baseline smollm2-135m --dtype bfloat16 --threads 1\n"
        "  corank bench small --predict --device-model h200              # nothing is timed, no weight is read",
    )
    sub.add_argument("models", nargs="+", help="directories, dense or compressed")
    sub.add_argument("--baseline", help="the dense model the ratios refer to; without one nothing is timed")
    sub.add_argument(
        "--runtime", default="torch", help="ways to run the models, separated by commas: torch,packed,auto, ..."
    )
    sub.add_argument(
        "--predict", action="store_true", help="print what the time model predicts, from launches, bytes and operations"
    )
    sub.add_argument(
        "--device-model",
        help="what to predict for: h200, a JSON file that describes a device, cpu, cuda (default: this one)",
    )
    sub.add_argument("--batch", default="1", help="batch sizes, separated by commas")
    sub.add_argument("--dtype", help="of the weights, e.g. bfloat16 (default: as stored)")
    sub.add_argument(
        "--threads", type=int, help="of the processor, no more than it has cores without work (default: PyTorch's)"
    )
    sub.add_argument("--prompt-tokens", type=int, default=256)
    sub.add_argument("--new-tokens", type=int, default=32)
    sub.add_argument("--repeats", type=int, default=5)

    sub = command(
        "heal",
        "win back by training what compression lost; the size stays the same",
        "  corank heal small --out healed\n  corank heal small --how closed-form --out healed\n"
        "  corank heal small --how block --epochs 3 --data text.jsonl --out healed\n"
        "  corank heal small --minutes 20 --out healed\n"
        "  torchrun --nproc-per-node 2 -m corank heal small --out healed       # or accelerate launch",
    )
    sub.add_argument("model", help="a compressed directory; for --how kd also a plain model that was made smaller")
    sub.add_argument("--out", required=True, help="directory to write")
    sub.add_argument("--teacher", help="the dense model (default: the one that the directory was made from)")
    sub.add_argument(
        "--how",
        default="kd",
        choices=_ways(),
        help="kd: the whole model learns the dense model's predictions; block: every block learns the dense block's output, "
        "one block in memory at a time; closed-form: no training at all; the others are on the page docs/healing.md "
        "(default: %(default)s)",
    )
    sub.add_argument(
        "--what",
        choices=("blocks", "factors", "layers", "matrices", "links"),
        help="what is trained: everything in the blocks; the factorized matrices with the norms and biases of their blocks; with "
        "their own biases; alone; or the links of CUR alone (default: the way's own)",
    )
    sub.add_argument("--epochs", type=float, default=2.0, help="passes over the text (default: %(default)s)")
    sub.add_argument("--minutes", type=float, help="end after so many minutes if that comes first")
    sub.add_argument("--learning-rate", type=float, help="at its peak (default: the way's own)")
    sub.add_argument("--accumulate", type=int, default=1, help="forward passes per step (default: %(default)s)")
    sub.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the products in training; auto: bfloat16 where a GPU has it (default: %(default)s)",
    )
    sub.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    sub.add_argument("--no-eval", action="store_true", help="leave out the perplexities before and after")
    _data(sub, batch=2, device=False)
    _windows(sub, 16)

    sub = command(
        "prune",
        "make a smaller model out of a directory with a score map (compress --method acip or acip-units), in seconds",
        "  corank prune small --keep 0.63 --out smaller\n  corank prune small --bytes 60MB --out smaller",
    )
    sub.add_argument("model", help="a directory that `corank compress --method acip` or `corank prune` has written")
    _budget(sub)
    sub.add_argument("--uniform", action="store_true", help="of acip-units: the same widths in all blocks")
    sub.add_argument("--out", required=True, help="directory to write; it must not exist or be empty")

    sub = command(
        "methods", "list the methods, or show one", "  corank methods\n  corank methods 'svd*'\n  corank methods curing"
    )
    sub.add_argument("pattern", nargs="?", default="*", help="a name, or a glob")

    sub = command(
        "verify",
        "check that a compressed directory is what was saved: digests of its files, shapes and norms of its factors",
        "  corank verify small\n  corank verify ORG/MODEL --json       # one in the local hub cache",
    )
    sub.add_argument(
        "model", help="a directory, or a hub id; of a dense model it only checks that its files are readable"
    )

    sub = command(
        "quantize",
        "store the factors of a compressed model as integers: two compressions in one directory",
        "  corank quantize small --out small-int8\n  corank quantize small --scheme int4 --group 32 --out small-int4",
    )
    sub.add_argument("model", help="a compressed directory")
    sub.add_argument("--out", required=True, help="directory to write")
    sub.add_argument(
        "--scheme",
        default="int8",
        choices=("int8", "int4"),
        help="int8: a scale for every row; int4: a scale for every group of a row, 4 bits on disk and 8 in memory "
        "(default: %(default)s)",
    )
    sub.add_argument("--group", type=int, default=32, help="values that share a scale, for int4 (default: %(default)s)")

    sub = command(
        "dequantize",
        "turn a compressed model back into a plain dense one, which any tool loads, as large as the original",
        "  corank dequantize small --out dense",
    )
    sub.add_argument("model", help="a compressed directory")
    sub.add_argument("--out", required=True, help="directory to write")

    sub = command(
        "export",
        "write a model for another runtime, checked against the original",
        "  corank export small --format onnx --out small-onnx\n  corank export small --format torch --out small-pt2\n"
        "  corank export small --format openvino --out small-openvino\n"
        "  corank export small --format dense --out plain\n  corank export small --format gguf --out small.gguf",
    )
    sub.add_argument("model", help=MODEL + "; dense or compressed")
    sub.add_argument(
        "--format",
        required=True,
        choices=("dense", "onnx", "openvino", "torch", "gguf"),
        help="onnx and openvino (float32) and torch (a torch.export program) keep the factors; dense (a plain Hugging Face directory) and "
        "gguf (for llama.cpp, by its own converter) multiply them out and are as large as the original",
    )
    sub.add_argument("--out", required=True, help="directory to write (a file name for gguf); it must not exist")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of a logit, relative to the largest one where that exceeds 1 (default: %(default)s)",
    )

    sub = command(
        "serve",
        "answer over HTTP in OpenAI's protocol, with the best engine present",
        "  corank serve small\n  corank serve small --host 0.0.0.0 --port 8000 --engine builtin",
    )
    sub.add_argument("model", help=MODEL + "; dense or compressed")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    sub.add_argument("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    sub.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "vllm", "transformers", "builtin"),
        help="auto: vLLM if it is installed, else `transformers serve` if its packages are, else corank's own",
    )
    sub.add_argument("--name", help="name of the model in the protocol (default: its directory's)")

    sub = command(
        "demo", "compress a real 135M-parameter language model and look at the result", "  corank demo --out demo"
    )
    sub.add_argument("--out", default="runs/demo", help="directory for results (default: %(default)s)")
    sub.add_argument(
        "--keep", default="0.8", help="fraction of the decoder's parameters to keep (default: %(default)s)"
    )
    return parser


def _ways() -> list[str]:
    """Names of the ways to heal: those of their files, so that PyTorch need not be imported to know them."""
    files = (Path(__file__).parent / "heal" / "ways").glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if file.stem != "__init__")


def _method(sub: argparse.ArgumentParser, default: str | None = "best") -> None:
    group = sub.add_argument_group("method")
    group.add_argument("--method", default=None, help=f"see `corank methods` (default: {default})")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the method (see `corank methods NAME`), or one that all share: allocate=uniform|lagrange|..., "
        "pack=true, target=dense|shifted|anchored, refit=true, affine=true, floor=0.3, multiple_of=16|auto, currency=relative|energy; "
        "may be repeated",
    )
    group.add_argument(
        "--effort",
        choices=("fast", "balanced", "max"),
        help="of `best`: closed form, or one or four passes of training after it",
    )
    group.add_argument(
        "--heal",
        choices=("none", *_ways()),
        help="heal the result on the calibration text, see `corank heal --help`; --set epochs=1 says for how long",
    )
    group.add_argument("--minutes", type=float, help="end healing after so many minutes if that comes first")
    group.add_argument("--targets", help="roles, globs or re:patterns of the matrices to compress, separated by commas")
    group.add_argument("--ignore", help="the same, of matrices to leave alone")


def _budget(sub: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = sub.add_argument_group("budget (one of)")
    group.add_argument("--keep", help="fraction of parameters kept, e.g. 0.8 or 80%%")
    group.add_argument("--remove", help="fraction of parameters removed, e.g. 0.2")
    group.add_argument("--params", help="number of parameters, e.g. 5.4e9 or 90M")
    group.add_argument("--bytes", help="size, e.g. 10GiB")
    group.add_argument(
        "--scope",
        default=None,
        choices=("sites", "model"),
        help="what the budget counts: the selected matrices, or the whole model\n(default: sites for a fraction, model for a size)",
    )
    return group


def _data(sub: argparse.ArgumentParser, batch: int = 8, device: bool = True) -> None:
    group = sub.add_argument_group("calibration")
    group.add_argument(
        "--data",
        action="append",
        default=None,
        help="text, several to be mixed in equal shares: a .txt or .jsonl file (.gz too), datasets:NAME[:CONFIG[:SPLIT]], "
        "generated:MODEL, what the dense model writes by itself, or the built-in one; neither of these needs a download "
        "(default: builtin)",
    )
    group.add_argument("--samples", type=int, default=None, help="windows (default: 64)")
    group.add_argument("--length", type=int, default=None, help="tokens in a window (default: 512)")
    group.add_argument("--seed", type=int, default=None, help="of everything random (default: 0)")
    group.add_argument("--batch", type=int, default=batch, help="windows per forward pass (default: %(default)s)")
    if not device:
        return
    group.add_argument("--device", default="cpu", help="where blocks are computed (default: %(default)s)")
    group.add_argument("--dtype", default=None, help="dtype of the computation (default: float32 on the CPU)")


def _windows(sub: argparse.ArgumentParser, default: int) -> None:
    group = sub.add_argument_group("evaluation")
    group.add_argument(
        "--text",
        action="append",
        default=None,
        help="text to evaluate on; may be repeated (default: builtin-test and, outside its domain, builtin-code)",
    )
    group.add_argument(
        "--windows", type=int, default=default, help="windows per text, 0 for all (default: %(default)s)"
    )
    group.add_argument("--window", type=int, default=512, help="tokens in a window (default: %(default)s)")


def _tasks(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("tasks of lm-eval; perplexity is then measured only on texts named with --text")
    group.add_argument("--tasks", help="names of tasks, groups or tags, or globs, separated by commas")
    group.add_argument("--tasks-dir", metavar="FOLDER", help="folder of lm-eval task files, whose data may be local")
    group.add_argument("--limit", type=float, help="only so many documents of each task, or this fraction below 1")
    group.add_argument("--shots", type=int, help="examples in the prompt (default: each task's own number)")
    group.add_argument("--chat", action="store_true", help="apply the chat template")
    group.add_argument("--batch", type=int, default=8, help="sequences per forward pass (default: %(default)s)")
    group.add_argument(
        "--results", metavar="FILE", help="where lm-eval's own JSON goes (default: MODEL-lm-eval-DATE.json, here)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        the exit code: 0, 2 for bad input (one sentence on standard error), 130 when interrupted.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.version:
        from importlib.metadata import version

        print(f"corank {version('corank')}")
        return 0
    if parsed.command is None:
        parser.print_help()
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The parser knows nothing of PyTorch, so that --help answers at once.
    from transformers.utils.logging import disable_progress_bar

    from corank import commands
    from corank.errors import CorankError

    disable_progress_bar()  # corank has its own
    try:
        return getattr(commands, parsed.command)(parsed)
    except CorankError as error:
        print(f"corank: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("corank: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a place that cannot be read or written; what was half done is left for the next try
        print(f"corank: {error.filename or 'reading or writing'}: {error.strerror or error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
