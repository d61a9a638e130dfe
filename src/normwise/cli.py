"""The command line: argument parsing only. What a command does stands in the module that it imports when it is called.

Exit status (docs/command-line.md): 0 success; 1 where a checked bound is broken or a baseline was not trained; 2 on bad input; 3 where
results could not be written or printed; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. All but 0 say why in one sentence, without a
traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from normwise import __version__
from normwise.errors import NormwiseError, OutputError, printable
from normwise.experiments.framework import interrupts
from normwise.experiments.framework.printing import in_plain_characters, printed, tell

_BROKEN, _BAD_INPUT, _NOT_DELIVERED = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit status.

    arguments: None for those of the process, which then belongs to the command: Ctrl-C, SIGTERM and SIGHUP end it with one sentence. With
    arguments of its own the command is a guest: Ctrl-C alone is looked after, and is this function's status, too.
    """
    with interrupts.watching(own=arguments is None), in_plain_characters():
        try:
            return _run(arguments)
        except KeyboardInterrupt:
            interrupts.tell()
            return interrupts.INTERRUPTED


def command() -> NoReturn:
    """The command of this process, from its first argument to its end."""
    try:
        status: Any = main()
    except SystemExit as end:    # --help and --version have printed
        status = end.code or 0
    interrupts.leave(status)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        try:
            args, unknown = _parser().parse_known_args(arguments)
        except SystemExit:  # --help has printed
            printed(lambda: None, "the documentation says the same")
            raise
        if unknown:
            raise _UsageError(f"unrecognized arguments: {' '.join(unknown)}. See {args.called} --help.")
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except _UsageError as error:
        return _sorry(str(error))
    except NormwiseError as error:
        return _sorry(" ".join(str(error).split("\n")), _NOT_DELIVERED if isinstance(error, OutputError) else _BAD_INPUT)


def _sorry(message: str, status: int = _BAD_INPUT) -> int:
    tell(f"normwise: {printable(message)}")
    return status


class _UsageError(Exception):
    """What argparse found wrong, as one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message.rstrip('.')}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="normwise", description="Keep every norm in a PyTorch training run where you want it.")
    parser.add_argument("--version", action="version", version=f"normwise {__version__}")
    parser.set_defaults(command=lambda args: _help(parser), called=parser.prog)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for add in (_add_demo, _add_compare, _add_race, _add_gan, _add_prune, _add_recipe, _add_tune, _add_advise, _add_inspect, _add_bench,
                _add_policies):
        add(commands)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return _BAD_INPUT


# ------------------------------------------------------------------------------------------------------------- studies

_TASKS = "images: cnn, plain, resnet, resnet_gn, vit, mixer, unet; text: lstm, gru, gpt, decoder; a table: tabular"
_ANY_TASK = "images, a text or a CSV file, as the task wants, or hf:NAME; default: bundled data"


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str | None = None
) -> argparse.ArgumentParser:
    """A command that calls ``run``, whose result is the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(command=run, called=parser.prog)
    return parser


def _add_study(commands: Any, name: str, summary: str, description: str, **helps: str) -> argparse.ArgumentParser:
    """A study with the options that all have. helps: of ``task``, where it takes one, and of those that differ between studies;
    called: the name of ``task`` in the help."""
    parser = _add_command(commands, name, _study, summary, f"{description} If you start it again, it resumes where it stopped.")
    if "task" in helps:
        parser.add_argument("task", metavar=helps.get("called", "TASK"), nargs="?" if name == "race" else None, help=helps["task"])
    parser.add_argument("--data", metavar="DIR", help=helps["data"])
    parser.add_argument("--budget", default="standard", metavar="NAME", help=helps["budget"])
    if "only" in helps:
        parser.add_argument("--only", type=_names, metavar="A,B", help=helps["only"])
    parser.add_argument("--seeds", type=_whole, metavar="N", help=helps["seeds"])
    parser.add_argument("--workers", type=_whole, default=_cores(), metavar="N", help="processes (default: one for each core, %(default)s)")
    parser.add_argument("--executor", metavar="URL", help="train on a cluster instead: dask://HOST:PORT, the address of a Dask scheduler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write one self-contained HTML page here")
    if name != "tune":    # whose trials are in a database
        parser.add_argument("--state", type=Path, metavar="FILE",
                            help="finished runs, to resume from (default: NAME.runs.jsonl beside --json, else in this folder)")  # fmt: skip
    parser.set_defaults(study=name, **({} if "task" in helps else {"task": name}))
    return parser


def _study(args: argparse.Namespace) -> int:
    """Runs the study of a command. Its module stands in the package of its name, and has ``run``, which says whether all is well."""
    from normwise.experiments.framework.study import Options, Outputs

    outputs = Outputs(args.json, args.report)
    study = import_module(f"normwise.experiments.{args.study}.study")
    if args.task is None:
        if args.state is None:
            raise _UsageError("name a TASK to race, or the finished runs to look at with --state FILE. See normwise race --help.")
        return 0 if study.look(args.state, outputs) else _BROKEN
    if getattr(args, "tiny", False) and getattr(args, "half", False):
        raise _UsageError("--tiny and --half are two sizes of one network: give one of them. See normwise race --help.")
    only, size = getattr(args, "only", None), next((name for name in ("tiny", "half") if getattr(args, name, False)), "standard")
    options = Options(args.task, args.data, args.budget, only, args.seeds, args.workers, args.state, args.executor, size,
                      getattr(args, "hold", False), getattr(args, "horizon", 1.0))  # fmt: skip
    return 0 if study.run(options, outputs) else _BROKEN


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return number


def _times(text: str) -> float:
    from normwise.experiments.framework.study import MOST_TIMES

    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give one from 1/{MOST_TIMES} to {MOST_TIMES}, as 0.5 or 2") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_compare(commands: Any) -> None:
    _add_study(
        commands, "compare", "train a task under every strategy and optimizer, each tuned equally, and report on test data",
        "Trains TASK under every strategy and optimizer, each tuned with the same number of trials on validation data, and reports on test "
        "data (docs/compare.md is the protocol).",
        task=_TASKS, data=_ANY_TASK,
        budget="quick, standard (default) or long", seeds="reported runs of each cell (default 3)",
        only="only these, beside the baseline 'nothing'; strategies: l2, l1, clip_value, clip_tensor_norm, normalise, max_norm, "
        "spectral_cap, soft_threshold, weight_decay, l2+max_norm, l1+clip_tensor_norm (the article's, the default); hyperball, "
        "relative_update, radial_brake, cpr, autoclip, zclip, orthogonal, orthogonal_penalty; optimizers: gd, momentum, adam (default); "
        "normalized_sgd, signum, lion, lars, lamb, muon, normuon, scion, adamh, muonh; all: every one",
    )  # fmt: skip


def _add_race(commands: Any) -> None:
    parser = _add_study(
        commands, "race", "how much sooner than the tuned baseline each contender reaches its result",
        "Tunes every contender with the same number of trials and finds the shortest horizon at which it reaches what the tuned baseline "
        "reaches at its end (docs/race.md is the protocol). Without TASK it prints what the finished runs in --state say.",
        task=_TASKS, data=_ANY_TASK, seeds="reported seeds (default: as many as the budget says)",
        budget="quick (minutes), standard (default; 2 to 5 core-hours) or long (about 20)",
        only="only these contenders, beside the baselines (adamw and sgd): schedulefree, torch_muon, muon, normuon, muonh, adamh, scion, "
        "ridge, ridge_small, ridge_roles, adamw_max_norm, auto, auto_half_batch, auto_double_batch, adamw_untuned, sgd_untuned, "
        "schedulefree_untuned, muon_untuned",
    )  # fmt: skip
    parser.add_argument("--horizon", type=_times, default=1.0, metavar="TIMES",
                        help="multiply the task's steps: 0.5, 2 (default %(default)g)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a model that trains in seconds, to see that everything works")
    parser.add_argument("--half", action="store_true", help="the network at half of its width (resnet, vit, lstm, gpt, decoder)")


def _add_gan(commands: Any) -> None:
    _add_study(
        commands, "gan", "which norm keeps a GAN's training stable: strategies and losses, each tuned equally, judged by what is drawn",
        "Trains a small DCGAN under every strategy and loss, each tuned with the same number of trials, and judges what it draws "
        "(docs/gan.md is the protocol).",
        budget="quick (two minutes), standard (default; 2 to 2.7 core-hours) or long (50)", seeds="reported seeds of each cell (default 5)",
        only="only these strategies and losses, beside the baseline 'nothing'", data="images, or hf:NAME; default: scikit-learn's digits",
    )  # fmt: skip


def _add_prune(commands: Any) -> None:
    parser = _add_study(
        commands, "prune", "train under the group lasso, remove the zero units for good, and measure the smaller network",
        "Trains TASK with and without the group lasso, removes the units that became zero for good, and measures accuracy, size, training "
        "step and inference of the smaller network against the full one.",
        task="cnn or resnet", data="parquet or IDX files (default: scikit-learn's digits)",
        budget="quick, standard (default) or long", seeds="reported runs of each network (default 3)",
    )  # fmt: skip
    parser.add_argument("--hold", action="store_true", help="under the lasso each weight keeps its norm, so that units go one by one")


def _add_recipe(commands: Any) -> None:
    parser = _add_study(
        commands, "recipe", "norms in fine-tuning and long training: every way to hold them, tuned equally, on fresh seeds",
        "Trains a small network under every arm of a recipe, each tuned with the same number of trials, and reports on seeds that no "
        "choice has seen (docs/recipes.md is the protocol).",
        task="plasticity (labels that are reshuffled), spikes (bad batches), finetune (a second text at equal forgetting of the first) or "
             "quantise (weights of four bits)",
        data="images (plasticity, quantise) or text (spikes; finetune: the first), or hf:NAME; default: bundled data",
        budget="quick, standard (default) or long", seeds="reported seeds of each arm (default 5)",
        only="only these arms, beside the baselines", called="NAME",
    )  # fmt: skip
    parser.set_defaults(study="recipes")


def _add_tune(commands: Any) -> None:
    parser = _add_study(
        commands, "tune", "which rules, optimizer and rate help a training, judged on fresh seeds beside nothing",
        "Searches over rules, the weights they act on, their strength and radius, the optimizer and its rate, and judges the best on fresh "
        "seeds in pairs with nothing (docs/tune.md is the protocol).",
        task=f"package.module:function of yours, or a task ({_TASKS})", data=f"for a task: {_ANY_TASK}",
        budget="quick, standard (default) or long", seeds="pairs of runs to judge with, 6 at least",
        only="only these rules and optimizers, the first optimizer yours (default: every rule; adam, momentum, muon, auto, advised)",
        called="TARGET",
    )  # fmt: skip
    parser.add_argument("--trials", type=_whole, metavar="N", help="trials of the search (default: as many as the budget says)")
    parser.add_argument("--steps", type=_whole, metavar="N", help="steps of every run (default: as the budget says; of a function 1000)")
    parser.add_argument("--seed", type=_counted, default=0, metavar="N", help="seed of the sampler and the runs (default 0)")
    parser.add_argument("--maximize", action="store_true", help="a function's metric is better when it is higher")
    parser.add_argument("--objectives", type=_names, default=["metric"], metavar="A,B", help="metric (default), and step_ms, size or both")
    parser.add_argument("--lr", type=_range, metavar="LOW,HIGH", help="where to look for the first optimizer's learning rate")
    parser.add_argument("--storage", metavar="FILE|URL", help="an SQLite file (default: NAME.db beside --json, else in this folder), or a "
                        "database that machines share, as postgresql+psycopg://USER:PASSWORD@HOST/DATABASE")  # fmt: skip
    parser.add_argument("--name", help="name of the study (default: tune-TARGET)")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="write the answer here as YAML (default: NAME.yaml)")
    parser.add_argument("--tiny", action="store_true", help="a model that trains in seconds, to see that everything works")
    parser.set_defaults(command=_tune)


def _tune(args: argparse.Namespace) -> int:
    from normwise.experiments.framework.study import Outputs
    from normwise.experiments.tune import study

    options = study.TuneOptions(
        args.task, args.data, args.budget, args.only, args.seeds, args.workers, None, args.executor, "tiny" if args.tiny else "standard",
        storage=args.storage, name=args.name, trials=args.trials, steps=args.steps, seed=args.seed, maximize=args.maximize,
        objectives=args.objectives, lr=args.lr, policy=args.policy,
    )  # fmt: skip
    return 0 if study.run(options, Outputs(args.json, args.report)) else _BROKEN


def _counted(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 0")
    return int(text)


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range: give two numbers, as 1e-4,1e-2") from None
    return low, high


# ----------------------------------------------------------------------------- demo, advise, inspect, bench and policies


def _add_demo(commands: Any) -> None:
    _add_command(
        commands, "demo", _demo, "what a few rules do to a small network, in half a minute",
        "Trains the article's CNN on scikit-learn's digits with a few rules and prints what became of its norms. "
        "Exits 1 where a bound does not hold.",
    )  # fmt: skip


def _demo(args: argparse.Namespace) -> int:
    from normwise.experiments.demo import run

    return 0 if run() else _BROKEN


def _add_advise(commands: Any) -> None:
    parser = _add_command(
        commands, "advise", _advise, "which rules and which optimizer to start with, for a model of yours, and why",
        "Calls FUNCTION, which returns a model, or (model, batches, loss) for a probe, and advises a policy and an optimizer "
        "for a goal. Nothing is trained, and the probe puts everything back.",
    )  # fmt: skip
    parser.add_argument("function", metavar="PACKAGE.MODULE:FUNCTION", help="a function of yours that takes no arguments")
    parser.add_argument("--goal", default="speed", metavar="NAME", help="speed (default), generalisation, sparsity, stability, lipschitz, "
                        "quantisation, finetuning or plasticity")  # fmt: skip
    parser.add_argument("--steps", type=_whole, default=25, metavar="N", help="batches of the probe (default 25)")
    parser.add_argument("--copy", action="store_true", help="probe a copy of the model, which takes its memory once more")
    parser.add_argument("--yaml", type=Path, metavar="FILE", help="write the policy here")
    parser.add_argument("--python", type=Path, metavar="FILE", help="write code that trains under it here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")


def _advise(args: argparse.Namespace) -> int:
    from normwise.experiments import advice

    advice.command(args.function, args.goal, args.steps, args.copy, advice.Files(args.yaml, args.python, args.json))
    return 0


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands, "inspect", _inspect, "which norms a checkpoint has, how far it moved, and whether it keeps to a policy",
        "Measures every tensor of CHECKPOINT without loading it: norms, units, singular values, outliers, what is not finite. "
        "Exits 1 where a bound of --policy is broken. With --json it resumes where it was interrupted.",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a safetensors or torch file, an index.json, a folder")
    parser.add_argument("--against", type=Path, metavar="BASE", help="another checkpoint, to measure what changed; an adapter's base")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="a policy as YAML, whose bounds on weights are measured")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of transformers: tells roles and units")
    parser.add_argument("--model", metavar="PACKAGE.MODULE:FUNCTION", help="a function of yours that returns the module; tells the same")
    parser.add_argument("--no-spectra", action="store_false", dest="spectra", help="norms alone, as fast as the file is read")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write one self-contained HTML page here")
    parser.add_argument("--state", type=Path, metavar="FILE", help="finished tensors (default: NAME.tensors.jsonl beside --json)")


def _inspect(args: argparse.Namespace) -> int:
    from normwise.experiments import inspection
    from normwise.experiments.framework.study import Outputs

    asked = inspection.Asked(args.checkpoint, args.against, args.policy, args.config, args.model, args.spectra, args.state)
    return 0 if inspection.command(asked, Outputs(args.json, args.report)) else _BROKEN


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands, "bench", _bench, "measure what control costs, interleaved with what it is compared to",
        "Measures NAME, and exits 1 where it misses a bar. Without NAME it lists what there is.",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here")


def _bench(args: argparse.Namespace) -> int:
    from normwise.experiments.bench import runner
    from normwise.experiments.framework.study import Outputs, deliver

    if args.name is None:
        printed(lambda: print(runner.listing()), "the same command lists them again")
        return 0
    bench = runner.named(args.name)
    sound = deliver(bench.run, runner.show, Outputs(args.json), complaints=lambda found: runner.missed(bench, found))
    return 0 if sound else _BROKEN


def _add_policies(commands: Any) -> None:
    parser = _add_command(
        commands, "policies", _policies, "list the named rules, explain one of them, or check a policy's YAML file",
        "Lists the named rules; with RULE explains that one, with FILE.yaml checks the policy in it and lists its rules.",
    )  # fmt: skip
    parser.add_argument("what", nargs="?", metavar="RULE|FILE.yaml",
                        help="a named rule to explain, or a policy to check; without it the list of all named rules")  # fmt: skip


def _policies(args: argparse.Namespace) -> int:
    from normwise.policy.listing import explain_file, explained, named_rules

    is_file = args.what is not None and (Path(args.what).suffix or os.sep in args.what or os.path.lexists(args.what))
    text = named_rules() if args.what is None else explain_file(Path(args.what)) if is_file else explained(args.what)
    interrupts.say(lambda: "Interrupted.")
    printed(lambda: print(text), "print them again")
    return 0
