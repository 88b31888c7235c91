"""The `vcr1` command. Every subcommand does its imports only when it runs."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vcr1_fast
from vcr1_fast.train.stopping import RunStopped

PROG = "vcr1"

SETTINGS = {
    "train": ("vcr1_fast.train.config", "TrainConfig"),
    "sft": ("vcr1_fast.train.config", "TrainConfig"),
    "plan": ("vcr1_fast.train.config", "TrainConfig"),
    "eval": ("vcr1_fast.evaluate.config", "EvalRun"),
    "chat": ("vcr1_fast.evaluate.config", "ChatConfig"),
    "data synth": ("vcr1_fast.data.synth", "SynthConfig"),
}
"""The dataclass of each command's settings, by module and name."""

OPTIONS = {
    "model.path": "--model FOLDER",
    "data.train": "--data FILE",
    "run.output": "--output FOLDER",
    "model": "--model FOLDER",
    "records": "--data FILE",
    "output": "--output FOLDER",
}
"""The option that gives a required setting."""

EVALUATED = frozenset(
    {"frames", "think", "system", "media_first", "prompts", "mrope", "video_text"}
)
CHATTED = EVALUATED - {"think", "prompts"}
"""Settings of evaluation and chat that a trained model remembers; chat asks its own questions."""


class _Parser(argparse.ArgumentParser):
    """Lists a command's settings below its options. They are imported only for that."""

    def format_help(self) -> str:
        text = super().format_help()
        command = self.prog.removeprefix(f"{PROG} ")
        if command in SETTINGS:
            from vcr1_fast.config.settings import help_text

            text += "\n" + help_text(settings_of(command))
        return text


def settings_of(command: str) -> type:
    """The dataclass of a command's settings."""
    from importlib import import_module

    module, name = SETTINGS[command]
    found: type = getattr(import_module(module), name)
    return found


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog=PROG, description="GRPO fine-tuning of video language models.", allow_abbrev=False
    )
    root.add_argument("--version", action="version", version=f"{PROG} {vcr1_fast.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    for name, text in (
        ("sft", "fine-tune on right answers"),
        ("train", "reinforce by GRPO"),
        ("plan", "what vcr1 train would take: steps, tokens, memory, disk; loads no weights"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--config", help="YAML file of settings")
        command.add_argument("--model", help="checkpoint folder or hub name (model.path)")
        command.add_argument("--data", help="records: .jsonl .json .csv .parquet (data.train)")
        command.add_argument(
            "--prompts", help="other prompt templates, YAML or JSON (data.prompts)"
        )
        command.add_argument("--output", help="folder of the run (run.output)")
        if name == "plan":
            command.add_argument("--processes", type=int, default=1, help="one a GPU (default: 1)")
            command.add_argument("--per-machine", type=int, help="processes of one machine")
            command.add_argument(
                "--memory-gib", type=float, help="of each GPU (default: what is free here)"
            )
        else:
            command.add_argument(
                "--dry-run", action="store_true", help="print the plan of the run, then stop"
            )
        if name != "sft":
            command.add_argument(
                "--reward",
                action="append",
                metavar="FILE.py:FUNCTION",
                help="a reward of your own, also module:function; repeatable (rewards.functions)",
            )
        _add_overrides(command)
        command.set_defaults(run=run_training)

    command = commands.add_parser("init", help="print a recipe: vcr1 init grpo > run.yaml")
    command.add_argument("recipe", nargs="?", help="which; default: list them")
    command.set_defaults(run=run_init)

    command = commands.add_parser("eval", help="answer and score records", allow_abbrev=False)
    command.add_argument("--config", help="YAML file of settings")
    command.add_argument("--model", help="checkpoint folder or hub name (model)")
    command.add_argument("--predictions", help="completions to score, no model (predictions)")
    command.add_argument("--data", help="records: .jsonl .json .csv .parquet (records)")
    command.add_argument("--prompts", help="other prompt templates, YAML or JSON (eval.prompts)")
    command.add_argument("--output", help="folder of the results (output)")
    _add_overrides(command)
    command.set_defaults(run=run_eval)

    command = commands.add_parser("chat", help="ask about a video or images", allow_abbrev=False)
    command.add_argument("--model", help="checkpoint folder or hub name (model)")
    command.add_argument("--video", help="file or folder of frames (video)")
    command.add_argument("--image", action="append", help="image file, repeatable (image)")
    command.add_argument(
        "--question", action="append", help="asked instead of the lines of the standard input"
    )
    _add_overrides(command)
    command.set_defaults(run=run_chat)

    command = commands.add_parser("parity", help="compare a vLLM or SGLang endpoint with training")
    command.add_argument("--model", required=True, help="the checkpoint that the endpoint serves")
    command.add_argument("--clip", required=True, help="video file that both are asked about")
    command.add_argument("--endpoint", required=True, help="address, http://HOST:PORT")
    command.add_argument("--question", default="What happens?", help="default: %(default)s")
    command.add_argument("--tokens", type=int, default=16, help="of the answer; default: 16")
    command.add_argument(
        "--frames", type=int, help="frames that training takes (default: its rule)"
    )
    command.add_argument("--dtype", default="float32", help="of our weights; default: %(default)s")
    command.add_argument("--limit", type=float, help="largest gap of a log-prob that agrees")
    command.add_argument(
        "--change-weights",
        action="store_true",
        help="also send changed weights, ask again, put them back (a server of docs/engines.md)",
    )
    command.set_defaults(run=run_parity)

    command = commands.add_parser("export", help="a checkpoint of a run as a model or adapter")
    command.add_argument("folder", help="of the run (run.output), or of one checkpoint")
    command.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--merged", action="store_true", help="the whole model (default)")
    form.add_argument("--adapter", action="store_true", help="the LoRA adapter alone")
    command.add_argument("--output", help="folder to write (default: RUN/exports/step-N)")
    command.add_argument("--push", metavar="USER/NAME", help="upload it to the Hugging Face hub")
    command.add_argument("--public", action="store_true", help="with --push: not a private one")
    command.set_defaults(run=run_export)

    command = commands.add_parser("report", help="curves and rollouts of a run, or of several")
    command.add_argument("folders", nargs="+", metavar="folder", help="of a run (run.output)")
    command.add_argument("--data", help="records trained on (default: the run's data.train)")
    command.add_argument(
        "--prompts", type=int, default=200, help="prompts with frames (default: %(default)s)"
    )
    command.add_argument("--watch", action="store_true", help="follow a run: every 30 seconds")
    command.set_defaults(run=run_report)

    command = commands.add_parser("bench", help="time the operations beside their peers")
    command.add_argument("names", nargs="*", help="which, or all; default: list them")
    command.add_argument("--device", choices=("cpu", "cuda"))
    command.add_argument("--threads", type=int, help="CPU threads")
    command.add_argument("--seconds", type=float, help="time for each row")
    command.set_defaults(run=run_bench)

    data = commands.add_parser("data", help="make and check data", allow_abbrev=False)
    kinds = data.add_subparsers(dest="kind", required=True, metavar="kind")
    command = kinds.add_parser("synth", help="synthetic clips and records", allow_abbrev=False)
    command.add_argument("output", help="folder to write to")
    _add_overrides(command)
    command.set_defaults(run=run_synth)

    command = kinds.add_parser("convert", help="published annotations to records")
    command.add_argument(
        "format",
        help="activitynet, charades, dream1k, got10k, mvbench, nextgqa, perception_test, quality, "
        "refcoco, timelens_100k, timelens_bench, video_r1, videochat_r15, videomme, vidtab; or "
        "conversations: messages, sharegpt, trl",
    )
    command.add_argument("annotations", help="the file (mvbench: folder) as its authors publish it")
    command.add_argument("output", help="records to write, JSONL")
    command.add_argument("--media", required=True, help="folder of the videos or images")
    command.add_argument("--benchmark", help="the published split that it is")
    command.add_argument("--task", help="the task that the questions of conversations are")
    command.set_defaults(run=run_convert)

    command = kinds.add_parser("check", help="faults of records and media, and blind baselines")
    command.add_argument("records", help="records; or an annotation file, with --format")
    command.add_argument("--format", help="check a published file as it is (see data convert)")
    command.add_argument("--train", help="records trained on: blind baselines are fitted on them")
    command.add_argument("--media", help="folder of the videos (default: the records' own)")
    command.add_argument(
        "--inside-root", action="store_true", help="media outside that folder are faults"
    )
    command.add_argument("--no-media", action="store_true", help="do not open the media")
    command.add_argument("--decode", action="store_true", help="also decode the frames")
    command.add_argument(
        "--decoder", choices=("pyav", "decord"), default="pyav", help="default: %(default)s"
    )
    command.add_argument(
        "--column", action="append", metavar="FIELD=COLUMN", help="repeatable (data.columns)"
    )
    command.add_argument("--task", help="check this task alone, also of rows that name none")
    command.add_argument("--json", help="write the report to this file")
    command.set_defaults(run=run_check)

    command = commands.add_parser("demo", help="learn from video on a laptop", allow_abbrev=False)
    command.add_argument("--output", default="runs/demo", help="default: %(default)s")
    command.add_argument("--quick", action="store_true", help="under two minutes")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument(
        "--family",
        help="model_type of the family; another than the shipped checkpoint's learns from scratch "
        "first, which takes longer",
    )
    command.add_argument(
        "--make-warm-start",
        action="store_true",
        help="make the shipped checkpoint again (about an hour), then stop",
    )
    command.set_defaults(run=run_demo)

    command = commands.add_parser("doctor", help="installed and missing parts")
    command.set_defaults(run=run_doctor)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return root


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line. Settings may stand anywhere among the options: argparse takes the
    first run of them only and hands back the others."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    command = f"{options.command} {getattr(options, 'kind', '')}".strip()
    for word in rest:
        name, equals, _ = word.partition("=")
        if hasattr(options, "overrides") and equals and not word.startswith("-"):
            options.overrides.append(word)
        elif command in SETTINGS and word.startswith("--"):
            from vcr1_fast.config.loader import suggestion

            hint = suggestion(settings_of(command), name.lstrip("-").replace("-", "_"))
            root.error(f"unrecognized argument {word}; settings are section.field=value{hint}")
        else:
            root.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Every error is one line; `--debug` shows its traceback.

    Status: 0; 1 where `data check` or `parity` finds faults or `eval` can score nothing; 2 for an
    error in settings, data, files or installed packages; 1 for any other error; 128 + the signal's
    number for a run that a signal ended.
    """
    options = parse(arguments)
    try:
        return options.run(options)
    except RunStopped as stopped:
        text, status = str(stopped), stopped.code
    except KeyboardInterrupt:
        text, status = "interrupted", 130
    except Exception as error:
        if options.debug:
            raise
        text, status = _describe(error)
    print(f"{PROG} {options.command}: {text}", file=sys.stderr)
    return status


def _describe(error: Exception) -> tuple[str, int]:
    """(one line, exit status) of an error."""
    if isinstance(error, ImportError) and type(error) in (ImportError, ModuleNotFoundError):
        return f"{error}; pip install 'vcr1_fast[train,report]' brings what the commands use", 2
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error), 2
    line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {line} (--debug shows the traceback)", 1


def run_training(options: argparse.Namespace) -> int:
    from vcr1_fast.config.loader import load_config
    from vcr1_fast.train.config import TrainConfig

    names = {
        "model.path": options.model,
        "data.train": options.data,
        "data.prompts": options.prompts,
        "run.output": options.output,
    }
    if options.command != "sft":
        names["rewards.functions"] = options.reward
    with _options_named():
        config = load_config(TrainConfig, options.config, _overrides(names, options))
    _warn_of_differences(config.model.path, config.data, "data.")
    if options.command == "plan" or options.dry_run:
        from vcr1_fast.train.dry_run import Machines, dry_run

        machines = Machines()
        if options.command == "plan":
            if options.processes < 1:
                raise ValueError(f"--processes must be at least 1, got {options.processes}")
            memory = options.memory_gib and options.memory_gib * 2**30
            machines = Machines(options.processes, options.per_machine, memory)
        lines, fits = dry_run(config, grpo=options.command != "sft", machines=machines)
        print(*lines, sep="\n")
        return 0 if fits else 2
    if options.command == "sft":
        from vcr1_fast.train.sft import sft as work
    else:
        from vcr1_fast.train.loop import train as work
    print(work(config))
    return 0


def run_init(options: argparse.Namespace) -> int:
    package = Path(vcr1_fast.__file__).parent
    # In an installed package, or beside it in a checkout.
    folders = (package / "recipes", package.parent / "recipes")
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if options.recipe is None:
        print(*files, sep="\n")
        return 0
    if options.recipe not in files:
        raise ValueError(f"no recipe {options.recipe!r}, there are {', '.join(files)}")
    print(files[options.recipe].read_text(encoding="utf-8"), end="")
    return 0


def run_eval(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from vcr1_fast.config.loader import load_config
    from vcr1_fast.evaluate.command import main_eval
    from vcr1_fast.evaluate.config import EvalRun

    names = {
        "model": options.model,
        "predictions": options.predictions,
        "records": options.data,
        "eval.prompts": options.prompts,
        "output": options.output,
    }
    overrides = _overrides(names, options)
    model, defaults = _remembered("model", options.config, overrides, EVALUATED, "eval")
    with _options_named():
        config = load_config(EvalRun, options.config, overrides, defaults=defaults)
    if model is None:
        return main_eval(config)
    _warn_of_differences(model, config.eval, "eval.")
    return main_eval(replace(config, model=str(model)))


def run_chat(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from vcr1_fast.config.loader import load_config
    from vcr1_fast.evaluate.chat import ChatConfig, main_chat

    names = {name: getattr(options, name) for name in ("model", "video", "image", "question")}
    overrides = _overrides(names, options)
    model, defaults = _remembered("model", None, overrides, CHATTED, "")
    with _options_named():
        config = load_config(ChatConfig, None, overrides, defaults=defaults)
    if model is None:
        return main_chat(config)
    _warn_of_differences(model, config, "")
    return main_chat(replace(config, model=str(model)))


def run_parity(options: argparse.Namespace) -> int:
    from vcr1_fast.evaluate.parity import main_parity

    return main_parity(options)


def run_export(options: argparse.Namespace) -> int:
    from vcr1_fast.train.export import check_push, export, push

    if options.public and not options.push:
        raise ValueError("--public goes with --push USER/NAME")
    if options.push:  # before an export that takes minutes
        check_push(options.push)
    folder = export(options.folder, options.step, adapter=options.adapter, output=options.output)
    print(folder)
    if options.push:
        print(push(folder, options.push, private=not options.public))
    return 0


def run_report(options: argparse.Namespace) -> int:
    from vcr1_fast.report.run import main_report

    return main_report(options.folders, options.data, prompts=options.prompts, watch=options.watch)


def run_bench(options: argparse.Namespace) -> int:
    from vcr1_fast.bench import main_bench

    given = {name: getattr(options, name) for name in ("device", "threads", "seconds")}
    named = ([f"--{name}", str(value)] for name, value in given.items() if value is not None)
    return main_bench(options.names, [argument for pair in named for argument in pair])


def run_synth(options: argparse.Namespace) -> int:
    from vcr1_fast.config.loader import load_config
    from vcr1_fast.data.synth import SynthConfig, write_dataset

    config = load_config(SynthConfig, None, options.overrides)
    for split, path in write_dataset(options.output, config).items():
        print(f"{split}: {path}")
    return 0


def run_convert(options: argparse.Namespace) -> int:
    from vcr1_fast.data.convert import convert

    done = convert(
        options.format,
        options.annotations,
        options.output,
        media_root=options.media,
        benchmark=options.benchmark,
        task=options.task,
    )
    tasks = ", ".join(f"{task} {count}" for task, count in done.tasks.items())
    print(
        f"{done.path}: {done.records} records ({tasks}) of {done.annotations} annotations on "
        f"{done.videos} videos or images, {done.quarantined} refused"
    )
    return 0


def run_check(options: argparse.Namespace) -> int:
    from json import dumps

    from vcr1_fast.evaluate.check import check, check_annotations, report_text
    from vcr1_fast.files import write_atomic

    how = {"train": options.train, "media": not options.no_media, "decode": options.decode}
    how |= {"decoder": options.decoder, "task": options.task, "columns": _columns(options.column)}
    if options.format is None:
        how["inside_root"] = options.inside_root
        report = check(options.records, media_root=options.media, **how)
    elif options.inside_root:
        raise ValueError("--inside-root is for records: convert published files first")
    else:
        report = check_annotations(options.format, options.records, media_root=options.media, **how)
    print(report_text(report))
    if options.json:
        write_atomic(options.json, dumps(report.as_json(), indent=1) + "\n")
    return 1 if report.faults else 0


def run_demo(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from vcr1_fast.demo.run import main_demo
    from vcr1_fast.demo.settings import QUICK, DemoConfig

    if options.make_warm_start:
        from vcr1_fast.demo.warm_start import make_warm_start

        print(make_warm_start(Path(options.output)))
        return 0
    config = replace(
        QUICK if options.quick else DemoConfig(), output=options.output, seed=options.seed
    )
    if options.family is not None:
        config = replace(config, family=options.family)
    return main_demo(config)


def run_doctor(options: argparse.Namespace) -> int:
    from vcr1_fast.doctor import main as doctor

    return doctor()


def _remembered(
    setting: str, path: str | None, overrides: list[str], names: frozenset[str], section: str
) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the model that `setting` names, and what it was trained with as defaults for
    `section` ("": the top level). None for a hub name and for no model, without defaults."""
    from vcr1_fast.config.loader import read_values
    from vcr1_fast.train.as_trained import read
    from vcr1_fast.train.export import model_folder

    named = read_values(path, overrides).get(setting)
    folder = model_folder(named) if isinstance(named, str) and named else None
    trained = None if folder is None else read(folder)
    if trained is None:
        return folder, {}
    print(f"as trained: {trained.text()}", file=sys.stderr)
    defaults = trained.within(names)
    return folder, {section: defaults} if section else defaults


def _warn_of_differences(model: str | Path, settings: Any, prefix: str) -> None:
    """Say which of a command's settings are not those that its model was trained with."""
    from vcr1_fast.train.as_trained import read

    trained = read(model)
    for line in trained.differences(vars(settings), prefix) if trained else ():
        print(f"warning: {line}", file=sys.stderr)


@contextmanager
def _options_named() -> Iterator[None]:
    """Name the option that gives a missing setting: nobody types run.output."""
    from vcr1_fast.config.section import ConfigError

    try:
        yield
    except ConfigError as error:
        option = OPTIONS.get(error.field)
        if error.reason != "missing" or option is None:
            raise
        raise ConfigError(error.field, f"missing; give {option}") from None


def _columns(pairs: list[str] | None) -> dict[str, str] | None:
    """field -> column of options FIELD=COLUMN."""
    for pair in pairs or ():
        if not all(pair.partition("=")):
            raise ValueError(f"--column {pair}: expected FIELD=COLUMN")
    split = (pair.partition("=") for pair in pairs or ())
    return {field: column for field, _, column in split} or None


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings, the last one wins"
    )


def _overrides(names: dict[str, str | list[str] | None], options: argparse.Namespace) -> list[str]:
    # Quoted, so that a path is never read as another YAML value.
    from json import dumps

    given = [f"{name}={dumps(value)}" for name, value in names.items() if value is not None]
    return [*given, *options.overrides]


if __name__ == "__main__":
    sys.exit(main())
