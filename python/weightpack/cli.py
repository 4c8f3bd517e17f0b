"""The command line. Every option is a keyword of the library call of the same name.

Data goes to standard output, messages and progress to standard error. Exit codes: 0 done, 1 failed,
2 usage, 3 input refused, 4 a check fell below its threshold, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from .errors import ConfigError, WeightpackError
from .terminal import message

DONE, FAILED, USAGE, REFUSED, BELOW_THRESHOLD, INTERRUPTED = 0, 1, 2, 3, 4, 130

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def _remember_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj["debug"] = True


def _shared(command: _Command) -> _Command:
    """The options that every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(command)
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show where in the code an error was raised.",
    )(command)


def _thresholds(command: _Command) -> _Command:
    command = click.option(
        "--max-error", type=float, metavar="R", help="Exit with 4 if a tensor's relative RMS error is above R."
    )(command)
    return click.option("--min-snr", type=float, metavar="DB", help="Exit with 4 if a tensor's SNR is below DB.")(
        command
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=lambda c, p, v: _version(c, v))
def cli() -> None:
    """Pack model weights on any CPU, in the exact bytes that the backend libraries read."""


def _version(context: click.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from . import _rust

        click.echo(f"weightpack {_rust.__version__}")
        context.exit(DONE)


@cli.command()
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--to", default="nf4", show_default=True, metavar="FORMAT", help="Format or recipe; see `weightpack formats`."
)
@click.option("--double-quant", is_flag=True, help="nf4, fp4: quantize the scales as well.")
@click.option("--block-size", type=int, metavar="N", help="nf4, fp4: weights that share a scale.  [default: 64]")
@click.option(
    "--group-size", type=int, metavar="N", help="Weights of a row that share a scale, for formats with groups."
)
@click.option("--compute-dtype", metavar="DTYPE", help="Type that 4-bit layers compute in.  [default: the source's]")
@click.option("--keep", multiple=True, metavar="REGEX", help="Leave these tensors in source precision.")
@click.option("--only", multiple=True, metavar="REGEX", help="Pack no other tensors than these.")
@click.option("--assign", multiple=True, metavar="REGEX=FORMAT", help="Format for these tensors; first match wins.")
@click.option("--recipe", type=click.Path(), metavar="FILE.toml", help="Rules from a file.")
@click.option("--components", metavar="A,B", help="Components of a pipeline to convert.")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of a folder.")
@click.option("--max-memory", default="256MB", show_default=True, metavar="SIZE", help="Bound on anonymous memory.")
@click.option("--threads", type=int, metavar="N", help="Worker threads.  [default: one per usable core]")
@click.option("--dry-run", is_flag=True, help="Print the plan (each tensor, its format and why) and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace DST once the new files are complete.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run left.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Measure each tensor's error on the way.")
@click.option(
    "--on-nonfinite",
    type=click.Choice(["refuse", "keep"]),
    default="refuse",
    show_default=True,
    help="What to do with weights that are not finite.",
)
@click.option(
    "--layers",
    type=click.Choice(["auto", "host", "names"]),
    default="auto",
    show_default=True,
    help="How linear layers are told: by the model class in its library, or by tensor names.",
)
@click.option(
    "--names",
    type=click.Choice(["source", "host"]),
    default="source",
    show_default=True,
    help="GGUF to safetensors: tensor names of the file, or those of transformers or diffusers.",
)
@click.option("--arch", metavar="NAME", help="GGUF: names of this architecture, or `none`.  [default: as detected]")
@click.option(
    "--fallback",
    type=click.Choice(["auto", "error", "q8_0", "f16", "keep"]),
    default="auto",
    show_default=True,
    help="GGUF: type of rows that a block does not divide.",
)
@click.option("--importance", type=click.Path(), metavar="FILE.gguf", help="GGUF: importance vectors (imatrix).")
@click.option(
    "--search",
    type=click.Choice(["ref", "weighted"]),
    default="ref",
    show_default=True,
    help="GGUF: search scales as llama.cpp does, or as if all columns counted the same.",
)
@click.option("--requantize", is_flag=True, help="GGUF: pack tensors anew that are packed already.")
@_thresholds
@_shared
def convert(
    src: str, dst: str, *, as_json: bool, min_snr: float | None, max_error: float | None, **options: Any
) -> int:
    """Convert checkpoint SRC into DST, in one pass and bounded memory.

    SRC is a model folder, a diffusers pipeline folder, a .safetensors, an *.index.json or a .gguf.
    DST is a folder, or a file ending in .safetensors or .gguf.
    """
    from .convert_ import convert as run

    click.get_current_context().find_root().obj["destination"] = dst
    if (min_snr is not None or max_error is not None) and not options["verify"]:
        raise ConfigError("--min-snr and --max-error need what --verify measures")
    if options["dry_run"]:
        report = run(src, dst, **options)
    else:
        with _progress("converting") as shown:
            report = run(src, dst, on_progress=shown, **options)
    for warning in report.warnings:
        message("warning", warning)
    if as_json:
        click.echo(report.to_json_string())
    else:
        from . import tables

        (tables.show_plan if report.dry_run else tables.show_conversion)(report)
    errors = [(tensor.name, tensor.error) for tensor in report.tensors if tensor.error is not None]
    return _judge(errors, min_snr, max_error)


@cli.command()
@click.argument("path", type=click.Path())
@_shared
def inspect(path: str, *, as_json: bool) -> int:
    """Show the tensors of a checkpoint: shape, type, format, size. Reads headers only."""
    from .inspect_ import inspect as run

    info = run(path)
    if as_json:
        click.echo(info.to_json_string())
    else:
        from . import tables

        tables.show_inspection(info)
    return DONE


@cli.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--threads", type=int, metavar="N", help="Worker threads.  [default: one per usable core]")
@_thresholds
@_shared
def diff(a: str, b: str, *, threads: int | None, as_json: bool, min_snr: float | None, max_error: float | None) -> int:
    """Compare checkpoint B with A, tensor by tensor, in any two formats."""
    from .diff_ import diff as run

    with _progress("comparing") as shown:
        report = run(a, b, threads=threads, on_progress=shown)
    if as_json:
        click.echo(report.to_json_string())
    else:
        from . import tables

        tables.show_difference(report)
    code = _judge([(pair.name, pair.error) for pair in report.tensors], min_snr, max_error)
    if (min_snr is not None or max_error is not None) and not (report.is_complete and not report.unequal):
        message("error", "the checkpoints do not hold the same tensors")
        return BELOW_THRESHOLD
    return code


@cli.command()
@_shared
def formats(*, as_json: bool) -> int:
    """List every format and recipe: size, whether it is read and written, container, exactness, and
    which library reads the result. Every format that is read converts to every one that is written."""
    from .recipes import recipe_rows
    from .targets import format_table

    if as_json:
        from dataclasses import asdict

        rows = {"formats": format_table(), "recipes": recipe_rows()}
        listed: dict[str, Any] = {key: [asdict(row) for row in found] for key, found in rows.items()}
        listed["sources"] = [row.name for row in format_table()]
        listed["targets"] = [row.name for row in format_table() if row.encodes != "never"]
        click.echo(json.dumps(listed, indent=2))
    else:
        from . import tables

        tables.show_formats(format_table(), recipe_rows())
    return DONE


@cli.command()
@click.option("--keep", type=click.Path(), metavar="DIR", help="Leave the model and what it becomes in DIR.")
@_shared
def demo(*, keep: str | None, as_json: bool) -> int:
    """Make a small model, convert it to NF4 and to GGUF, and check the results."""
    from .demo import run

    result = run(keep, say=lambda text: message("demo", text))
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        from . import tables

        tables.show_demo(result)
    return DONE if result.passed else BELOW_THRESHOLD


def _progress(verb: str) -> Any:
    from .progress import progress

    return progress(verb)


def _judge(errors: Sequence[tuple[str, Any]], min_snr: float | None, max_error: float | None) -> int:
    failed = [
        (name, error)
        for name, error in errors
        if (min_snr is not None and error.snr_db < min_snr)
        or (max_error is not None and error.relative_rms > max_error)
    ]
    for name, error in failed[:5]:
        message("error", f"{name}: SNR {error.snr_db:.2f} dB, relative RMS error {error.relative_rms:.4g}")
    if failed:
        bounds = [f"SNR {min_snr} dB"] if min_snr is not None else []
        bounds += [f"relative RMS error {max_error}"] if max_error is not None else []
        message("error", f"{len(failed)} of {len(errors)} tensors fall below the threshold ({', '.join(bounds)})")
        return BELOW_THRESHOLD
    return DONE


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code."""
    state: dict[str, Any] = {}
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        with cli.make_context("weightpack", words, obj=state) as context:
            result = cli.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else DONE
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.UsageError as error:
        error.show(sys.stderr)
        return USAGE
    except click.ClickException as error:
        error.show(sys.stderr)
        return FAILED
    except (KeyboardInterrupt, click.Abort):
        message("error", "interrupted")
        if _is_resumable(state):
            message("hint", "the same command with --resume goes on from here")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read standard output has gone; nothing more is written to it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except WeightpackError as error:
        _explain(error, state, error.message, error.hint)
        if isinstance(error, ConfigError):
            return USAGE
        # The base class itself is raised for defects only.
        return FAILED if type(error) is WeightpackError else REFUSED
    except OSError as error:
        _explain(error, state, _describe(error), None)
        return FAILED if _was_writing(error, state) else REFUSED
    except MemoryError as error:
        _explain(error, state, "out of memory", "lower --max-memory or --threads")
        return FAILED
    except Exception as error:  # The last resort: one line for the person, the place with --debug.
        _explain(
            error, state, f"{type(error).__name__}: {error}", "this is a defect of weightpack; --debug shows where"
        )
        return FAILED


def _explain(error: BaseException, state: dict[str, Any], text: str, hint: str | None) -> None:
    if state.get("debug"):
        traceback.print_exception(error, file=sys.stderr)
    message("error", text)
    if hint is not None:
        message("hint", hint)


def _describe(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    where = f' "{error.filename}"' if error.filename is not None else ""
    return f"{error.strerror[:1].lower()}{error.strerror[1:]}{where}"


def _is_resumable(state: dict[str, Any]) -> bool:
    """Whether an interrupted conversion left work that the next one can use."""
    destination = state.get("destination")
    if destination is None:
        return False
    folder, name = os.path.split(os.path.abspath(destination))
    return os.path.isdir(folder) and any(entry.startswith(f"{name}.partial-") for entry in os.listdir(folder))


def _was_writing(error: OSError, state: dict[str, Any]) -> bool:
    """Whether the error belongs to the result and not to the input."""
    if error.errno in _DISK_FULL or "write" in (error.strerror or ""):
        return True
    destination = state.get("destination")
    if destination is None or error.filename is None:
        return False
    # What is under construction stands beside the destination, under a name that begins with its own.
    return os.path.abspath(os.fsdecode(error.filename)).startswith(os.path.abspath(destination))
